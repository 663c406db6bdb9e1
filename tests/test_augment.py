"""EDM's augmentation against values derived by hand from its definition."""

import math

import pytest
import torch

from images.augment import (OFF_CENTRE, SYM6, apply_augmentation, draw_augmentation, inverse_map,
                            warp)

COLUMNS = ("left_right", "up_down", "scale", "angle", "stretch", "axis", "right", "down")
SIZES = (8, 28, 32, 64)


def only(**on):
    """One image's parameters, all others off. float64 [1,8]"""
    return torch.tensor([[on.get(name, 0.0) for name in COLUMNS]], dtype=torch.float64)


def draw(batch, p, seed=0):
    return draw_augmentation(batch, p, torch.Generator().manual_seed(seed))


def random_images(batch, channels, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(batch, channels, size, size, dtype=torch.float64, generator=generator) - 1


def centred(size):
    """Each pixel's position from the image's centre, x to the right, y down: two of [S,S]."""
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def forwards(x, y, size, scale, angle, stretch, axis, right, down):
    """Where a point of the image goes: scale, turn anticlockwise (y is down), stretch, shift."""
    def turn(x, y, angle):
        cos, sin = math.cos(angle), math.sin(angle)
        return x * cos + y * sin, y * cos - x * sin

    x, y = turn(x * 2 ** (scale / 5), y * 2 ** (scale / 5), angle)
    along, across = turn(x, y, -axis)
    x, y = turn(along * 2 ** (stretch / 5), across / 2 ** (stretch / 5), axis)
    return x + right * size / 8, y + down * size / 8


def backwards(row, size):
    """M and t of the map back, from where three points go."""
    origin, right, down = [torch.tensor(forwards(x, y, size, *row[2:].tolist()),
                                        dtype=torch.float64) for x, y in ((0, 0), (1, 0), (0, 1))]
    M = torch.linalg.inv(torch.stack([right - origin, down - origin], dim=1))
    return M, -M @ origin


def sources(row, size):
    """Where each pixel of the new image comes from, [2,S,S]; and which ones feel no mirror image.

    A pixel weighs samples 3 pixels to each side of it, and each of them 3.5 of the old image.
    """
    M, t = backwards(row, size)
    q = torch.einsum("ij,jhw->ihw", M, torch.stack(centred(size))) + t[:, None, None]
    reach = 3 * M.abs().sum(1) + 3.5
    return q, (q.abs() + reach[:, None, None] <= (size - 1) / 2).all(0)


# ---- The filter ----

def test_sym6_is_orthogonal_to_itself_two_taps_on():
    taps = torch.tensor(SYM6, dtype=torch.float64)
    assert taps.sum().item() == pytest.approx(2 ** 0.5, abs=1e-10)
    for two_taps in range(6):
        shifted = (taps[2 * two_taps:] * taps[:12 - 2 * two_taps]).sum().item()
        assert shifted == pytest.approx(float(two_taps == 0), abs=1e-10)


def test_sym6_has_six_vanishing_moments_and_its_weight_near_the_middle():
    """With orthogonality: one of Daubechies' 12-tap filters; the other ones lean to one side."""
    k = torch.arange(12, dtype=torch.float64) - 5.5
    alternating = torch.tensor(SYM6, dtype=torch.float64) * (-1) ** torch.arange(12)
    for moment in range(6):
        assert (alternating * (k / 5.5) ** moment).sum().item() == pytest.approx(0, abs=1e-9)
    assert abs(OFF_CENTRE) < 0.5 and max(SYM6) == SYM6[5]


# ---- What is drawn ----

def test_each_transform_is_switched_on_with_probability_p_on_its_own():
    N, p = 100_000, 0.3
    on = (draw(N, p) != 0).double()
    assert torch.equal(on[:, 6], on[:, 7])
    rates = on.mean(0)[[0, 1, 2, 3, 4, 5, 6]].tolist()
    # Half of all mirrored; half of the chosen turned over; half of the stretched along an axis.
    assert rates == pytest.approx([0.5, p / 2, p, p, p, p / 2, p], abs=0.006)     # 4 sigma
    together = (on.T @ on / N)[[0, 1, 2, 3, 4], [2, 3, 4, 6, 6]].tolist()
    assert together == pytest.approx([p / 2, p * p / 2, p * p, p * p, p * p], abs=0.005)
    assert torch.equal(on[:, 5] * on[:, 4], on[:, 5])


def test_sizes_are_standard_normal_and_angles_uniform_over_the_circle():
    drawn = draw(100_000, 1.0)
    for column in (2, 4, 6, 7):
        w = drawn[:, column]
        assert w.mean().item() == pytest.approx(0, abs=0.015)
        assert w.std().item() == pytest.approx(1, abs=0.01)
        assert (w.abs() < 1).float().mean().item() == pytest.approx(0.6827, abs=0.006)
    for angle in (drawn[:, 3], drawn[:, 5][drawn[:, 5] != 0]):
        shares = torch.histc(angle, 8, -math.pi, math.pi) / len(angle)
        assert shares.sum().item() == pytest.approx(1, abs=1e-6)            # none outside
        assert shares.tolist() == pytest.approx([1 / 8] * 8, abs=0.006)
    assert torch.corrcoef(drawn.T).sub(torch.eye(8)).abs().max() < 0.015


def test_any_p_mirrors_half_of_the_images_and_p_0_does_nothing():
    few = draw(10_000, 1e-9)
    assert few[:, 0].mean().item() == pytest.approx(0.5, abs=0.02)
    assert few[:, 1:].count_nonzero() == 0
    x = random_images(64, 3, 32)
    same, told = apply_augmentation(x, draw(64, 0.0))
    assert torch.equal(same, x) and torch.equal(told, torch.zeros(64, 9, dtype=x.dtype))


def test_a_draw_follows_from_its_generator_alone():
    assert torch.equal(draw(64, 0.12), draw(64, 0.12))
    assert not torch.equal(draw(64, 0.12), draw(64, 0.12, seed=1))
    # The same numbers decide for every p: more of them are on, none is another.
    low, high = draw(256, 0.1), draw(256, 0.5)
    assert torch.equal(low[low != 0], high[low != 0])


# ---- Labels ----

@pytest.mark.parametrize("on, expected", [
    (dict(), [0, 0, 0, 0, 0, 0, 0, 0, 0]),
    (dict(left_right=1), [1, 0, 0, 0, 0, 0, 0, 0, 0]),
    (dict(up_down=1), [0, 1, 0, 0, 0, 0, 0, 0, 0]),
    (dict(scale=-1.5), [0, 0, -1.5, 0, 0, 0, 0, 0, 0]),
    (dict(angle=math.pi / 2), [0, 0, 0, -1, 1, 0, 0, 0, 0]),
    (dict(angle=-math.pi / 3), [0, 0, 0, -0.5, -math.sqrt(0.75), 0, 0, 0, 0]),
    (dict(stretch=0.8), [0, 0, 0, 0, 0, 0.8, 0, 0, 0]),
    (dict(stretch=2, axis=math.pi / 6), [0, 0, 0, 0, 0, math.sqrt(3), 1, 0, 0]),
    (dict(right=0.25, down=-2), [0, 0, 0, 0, 0, 0, 0, 0.25, -2]),
])
def test_labels(on, expected):
    _, told = apply_augmentation(random_images(1, 1, 8), only(**on))
    assert told.tolist()[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_untouched_images_keep_their_very_pixels_and_have_zero_labels(size, channels):
    x, parameters = random_images(200, channels, size).float(), draw(200, 0.12)
    augmented, told = apply_augmentation(x, parameters)
    assert augmented.shape == x.shape and augmented.dtype == x.dtype and told.shape == (200, 9)
    same = (augmented == x).flatten(1).all(1)
    assert torch.equal(same, (told == 0).all(1))
    assert 20 < same.sum() < 100                    # 0.5 * 0.94 * 0.88^4 of 200 is 56


# ---- The matrix of each transform: the pixel at p of the new image is q = M p + t of the old. ----

@pytest.mark.parametrize("on, M, t", [
    (dict(), [[1, 0], [0, 1]], [0, 0]),
    (dict(scale=5), [[0.5, 0], [0, 0.5]], [0, 0]),                      # twice as large
    (dict(scale=-2.5), [[2 ** 0.5, 0], [0, 2 ** 0.5]], [0, 0]),
    (dict(angle=math.pi / 2), [[0, -1], [1, 0]], [0, 0]),               # the right was the bottom
    (dict(angle=-math.pi / 2), [[0, 1], [-1, 0]], [0, 0]),
    (dict(stretch=5), [[0.5, 0], [0, 2]], [0, 0]),                      # wider and lower
    (dict(stretch=5, axis=math.pi / 2), [[2, 0], [0, 0.5]], [0, 0]),
    (dict(stretch=5, axis=math.pi / 4), [[1.25, 0.75], [0.75, 1.25]], [0, 0]),  # along (1, -1)
    (dict(right=1, down=-2), [[1, 0], [0, 1]], [-4, 8]),                # 32 / 8 pixels each
    (dict(scale=5, right=1, down=-2), [[0.5, 0], [0, 0.5]], [-2, 4]),   # the shift is not scaled
    (dict(scale=5, angle=math.pi / 2, right=1), [[0, -0.5], [0.5, 0]], [0, -2]),
])
def test_matrix(on, M, t):
    got_M, got_t = inverse_map(only(**on), 32)
    torch.testing.assert_close(got_M[0], torch.tensor(M, dtype=torch.float64))
    torch.testing.assert_close(got_t[0], torch.tensor(t, dtype=torch.float64))


def test_the_inverse_map_undoes_scale_then_turn_then_stretch_then_shift():
    parameters = draw(50, 1.0).double()
    for row, M, t in zip(parameters, *inverse_map(parameters, 32)):
        expected_M, expected_t = backwards(row, 32)
        torch.testing.assert_close(M, expected_M)
        torch.testing.assert_close(t, expected_t)


# ---- Images ----

def test_flips_are_exact():
    x = random_images(1, 3, 32)
    for on, expected in ((dict(left_right=1), x.flip(3)), (dict(up_down=1), x.flip(2)),
                         (dict(left_right=1, up_down=1), x.flip(2, 3))):
        assert torch.equal(apply_augmentation(x, only(**on))[0], expected)


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_lost_between_up_and_down_sampling(size):
    x = random_images(2, 3, size)
    torch.testing.assert_close(warp(x, *inverse_map(only().repeat(2, 1), size)), x,
                               rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("right, down", [(1, 0), (0, -1), (-3, 2), (6, 7)])
def test_shifts_by_whole_pixels_are_exact_and_bring_in_the_mirror_image(size, right, down):
    x = random_images(1, 3, size)
    shifted, _ = apply_augmentation(x, only(right=8 * right / size, down=8 * down / size))
    inside = (..., slice(max(down, 0), size + min(down, 0)),
              slice(max(right, 0), size + min(right, 0)))
    torch.testing.assert_close(shifted[inside], x.roll((down, right), (2, 3))[inside],
                               rtol=0, atol=1e-9)

    def mirrored(shift):                        # ... 2 1 0 1 2 ... : the edge itself comes once
        old = (torch.arange(size) - shift).abs()
        return old.minimum(2 * (size - 1) - old)

    torch.testing.assert_close(shifted, x[:, :, mirrored(down)][..., mirrored(right)],
                               rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [32, 64])
def test_a_slope_is_carried_exactly_by_every_map(size):
    """Filters and bilinear sampling keep linear images: this fixes order, signs and centre."""
    parameters = draw(200, 1.0).double()
    parameters[:, :2] = 0
    X, Y = centred(size)
    slope = 0.3 + 0.02 * X - 0.05 * Y
    augmented, _ = apply_augmentation(slope.expand(200, 1, size, size), parameters)
    checked = 0
    for row, image in zip(parameters, augmented[:, 0]):
        (x, y), inside = sources(row, size)
        torch.testing.assert_close(image[inside], (0.3 + 0.02 * x - 0.05 * y)[inside],
                                   rtol=0, atol=1e-9)
        checked += inside.sum().item()
    assert checked > 10_000


def waves(x, y, size):
    return (0.6 * torch.cos(2 * math.pi * x / size + 0.3)
            + 0.3 * torch.sin(3 * math.pi * y / size + 1))


@pytest.mark.parametrize("on", [
    dict(scale=2), dict(scale=-1), dict(angle=0.7), dict(stretch=1.5), dict(stretch=-1, axis=1.0),
    dict(right=0.3, down=-0.2), dict(scale=1, angle=2, stretch=-1, axis=0.5, right=0.3, down=-0.2)])
def test_a_smooth_image_equals_its_formula_within_interpolation_error(on):
    """Bilinear steps of half a pixel: (1/2)^2 / 8 of the second derivatives, here 0.025 each."""
    image = waves(*centred(32), 32)
    augmented, _ = apply_augmentation(image[None, None], only(**on))
    (x, y), inside = sources(only(**on)[0], 32)
    assert inside.sum() > 50
    assert (augmented[0, 0] - waves(x, y, 32))[inside].abs().max() < 0.002


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns_are_torchs(turns):
    image = waves(*centred(32), 32).expand(1, 3, 32, 32)
    turned, _ = apply_augmentation(image, only(angle=turns * math.pi / 2))
    difference = (turned - torch.rot90(image, turns, (2, 3))).abs()
    assert difference[..., 3:-3, 3:-3].max() < 0.002 and difference.max() < 0.02


def test_flips_come_before_the_rest():
    x, rest = random_images(1, 3, 32), dict(scale=0.5, angle=1, right=0.2)
    torch.testing.assert_close(apply_augmentation(x, only(left_right=1, up_down=1, **rest))[0],
                               apply_augmentation(x.flip(2, 3), only(**rest))[0])


def test_no_map_leads_out_of_the_mirrored_image():
    """However far: a constant image stays what it is."""
    parameters = torch.cat([only(scale=-15), only(right=30, down=-50), only(stretch=20, axis=1)])
    grey = torch.full((3, 1, 16, 16), 0.7, dtype=torch.float64)
    torch.testing.assert_close(apply_augmentation(grey, parameters)[0], grey)


@pytest.mark.parametrize("size", SIZES)
def test_an_image_does_not_depend_on_those_beside_it(size):
    x, parameters = random_images(60, 3, size).float(), draw(60, 0.3)
    together, told = apply_augmentation(x, parameters)
    for start in (0, 20, 40):
        part = slice(start, start + 20)
        alone, told_alone = apply_augmentation(x[part], parameters[part])
        torch.testing.assert_close(alone, together[part], rtol=0, atol=1e-5)
        assert torch.equal(told_alone, told[part])


def test_the_given_images_and_parameters_are_left_as_they_were():
    x, parameters = random_images(8, 1, 8), draw(8, 1.0)
    before = x.clone(), parameters.clone()
    apply_augmentation(x, parameters)
    assert torch.equal(x, before[0]) and torch.equal(parameters, before[1])
