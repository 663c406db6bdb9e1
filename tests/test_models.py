"""Noise levels, samplers, roll-out, GAN head and moving average."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from gaussians import full, gaussian_denoiser, mixture_denoiser
from helpers import small_network
from models import (KARRAS, LOSSES, AdaptedWithHead, Conditions, GANHead, Guided, Levels,
                    classes_as_conditions, denoise_together, from_uint8, karras, level, roll_out,
                    sample_every_step, sample_heun, sample_seeds, sample_student, sigma_dm,
                    sigma_grid, sigma_lognormal, sigma_sid, to_uint8, update_ema)
from presets.datasets import EQUAL_WIDTH_SIGMAS, PMDD_SIGMAS

SAMPLERS = (sigma_grid, sigma_dm, sigma_sid, sigma_lognormal)
SIGMAS = PMDD_SIGMAS

# Of a network trained in variance-preserving form on 200 levels: sigma from 0.01 to about 10, its
# first input at unit variance, shares of the way spread by index.
BETAS = torch.linspace(1e-4, 0.045, 200, dtype=torch.float64)
VP_TABLE = (1 / (1 - BETAS).cumprod(0) - 1).sqrt()


def vp_at(share):
    """Between two levels of the table, in a straight line."""
    place = torch.as_tensor(share, dtype=torch.float64) * 199
    below = place.floor().long().clamp(0, 198)
    sigma = VP_TABLE[below] + (place - below) * (VP_TABLE[below + 1] - VP_TABLE[below])
    return sigma if torch.is_tensor(share) else sigma.item()


VP = Levels(VP_TABLE, vp_at, lambda sigma: math.sqrt(1 + sigma ** 2), sigma_grid)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def fraction(sigma):
    """The inverse of karras, from EDM Eq. 5 by hand."""
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    return (sigma.double() ** (1 / 7) - low) / (high - low)


# ---- Noise levels ----

def test_the_karras_grid_runs_from_0_002_to_80_in_equal_steps_of_sigma_to_the_one_seventh():
    grid = KARRAS.table
    assert grid.shape == (1000,) and grid.dtype == torch.float64
    assert [grid[0].item(), grid[-1].item()] == pytest.approx([0.002, 80], rel=1e-12)
    expected = torch.arange(1000).double() / 999
    torch.testing.assert_close(fraction(grid), expected, rtol=0, atol=1e-12)


def test_the_schedules_of_pmdd_have_their_printed_values():
    assert SIGMAS[0] == EQUAL_WIDTH_SIGMAS[0] == 80
    assert [f"{s:.3f}" for s in SIGMAS[1:]] == ["2.515", "0.170"]
    assert [f"{s:.3g}" for s in EQUAL_WIDTH_SIGMAS[1:]] == ["9.96", "0.452"]
    assert (karras(0.5), karras(0.25)) == SIGMAS[1:]
    assert (karras(0.67), karras(0.33)) == EQUAL_WIDTH_SIGMAS[1:]


@pytest.mark.parametrize("sampler, first, last", [(sigma_grid, 0, 999), (sigma_dm, 20, 980)])
def test_levels_are_uniform_over_exactly_their_range_of_the_grid(sampler, first, last):
    draws = 400_000
    sigma = sampler(KARRAS, draws, seeded()).flatten()
    index = (fraction(sigma) * 999).round().long()
    assert torch.equal(sigma, KARRAS.table.float()[index])
    counts = index.bincount(minlength=1000)
    assert counts[:first].sum() == counts[last + 1:].sum() == 0
    inside, expected = counts[first:last + 1].double(), draws / (last + 1 - first)
    assert inside[0] > 0 and inside[-1] > 0
    chi_square = ((inside - expected) ** 2 / expected).sum() / (len(inside) - 1)
    assert abs(chi_square - 1) < 5 * math.sqrt(2 / len(inside))


@pytest.mark.parametrize("low, high, first, last", [
    (0.0, 1.0, 0, 199), (0.02, 0.98, 4, 196), (0.25, 0.25, 50, 50), (1.0, 1.0, 199, 199)])
def test_a_range_of_levels_is_its_share_of_any_table(low, high, first, last):
    sigma = sigma_grid(VP, 20_000, seeded(), low, high).flatten()
    assert sigma.unique().tolist() == VP_TABLE[first:last + 1].float().tolist()
    if (low, high) == (0.02, 0.98):
        assert torch.equal(sigma, sigma_dm(VP, 20_000, seeded()).flatten())


def test_sid_levels_lie_below_four_fifths_of_the_way_through_any_levels():
    sigma = sigma_sid(VP, 20_000, seeded())
    assert VP_TABLE[0] - 1e-6 < sigma.min() < VP_TABLE[1]
    assert vp_at(0.799) < sigma.max() <= vp_at(0.8)


def test_sid_levels_are_uniform_in_the_karras_fraction_from_0_to_0_8_and_off_the_grid():
    u = fraction(sigma_sid(KARRAS, 100_000, seeded()))
    assert -1e-6 < u.min() < 1e-4 and 0.7999 < u.max() < 0.800001
    assert [u.mean().item(), u.std().item()] == pytest.approx([0.4, 0.8 / math.sqrt(12)], abs=4e-3)
    quartiles = u.quantile(torch.tensor([0.25, 0.75]).double()).tolist()
    assert quartiles == pytest.approx([0.2, 0.6], abs=6e-3)
    off_grid = (u * 999 - (u * 999).round()).abs()
    assert (off_grid > 0.25).double().mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("options, mean, std", [
    ({}, -1.2, 1.2), (dict(mean=0.3, std=0.5), 0.3, 0.5)])
def test_edms_levels_are_log_normal(options, mean, std):
    log = sigma_lognormal(KARRAS, 100_000, seeded(), **options).double().log()
    standard = (log - mean) / std
    moments = [standard.pow(k).mean().item() for k in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.15)
    assert moments[:2] == pytest.approx([0, 1], abs=0.02)


def test_edms_networks_were_trained_with_its_log_normal_noise():
    assert KARRAS.trained is sigma_lognormal


def test_each_loss_has_the_noise_of_its_paper():
    noise = {name: (loss.student_noise, loss.adapted_noise) for name, loss in LOSSES.items()}
    assert noise == {"dm": (sigma_dm, sigma_grid), "sid": (sigma_sid, None),
                     "none": (sigma_dm, sigma_grid)}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_gives_each_image_a_float32_level_that_only_its_generator_decides(sampler):
    state = torch.get_rng_state()
    sigma = sampler(KARRAS, 5, seeded(1))
    assert sigma.shape == (5, 1, 1, 1) and sigma.dtype == torch.float32 and (sigma > 0).all()
    assert len(sigma.unique()) > 1
    assert torch.equal(sigma, sampler(KARRAS, 5, seeded(1)))
    assert not torch.equal(sigma, sampler(KARRAS, 5, seeded(2)))
    assert torch.equal(state, torch.get_rng_state())


def test_one_level_is_the_same_for_every_image_in_the_images_own_type():
    sigma = level(2.5, torch.zeros(3, 1, 2, 2, dtype=torch.float64))
    assert torch.equal(sigma, full(2.5, batch=3))


# ---- The student's roll-out ----

class Recorder:
    """A denoiser that remembers what it was called with."""

    def __init__(self, denoiser, levels=KARRAS):
        self.denoiser, self.levels, self.calls = denoiser, levels, []

    def __call__(self, x_t, sigma, y=None):
        self.calls.append((x_t.clone(), sigma.clone(), y))
        return self.denoiser(x_t, sigma, y)


def student_and_inputs(batch=3):
    return (small_network(1).double(), normal(batch, 1, 8, 8), torch.eye(10).double()[2:2 + batch],
            [normal(batch, 1, 8, 8, seed=seed) for seed in (1, 2)])


def test_the_roll_out_alternates_denoising_and_new_noise():
    network, z, y, (eps2, eps3) = student_and_inputs()
    student = Recorder(network)
    inputs, outputs = roll_out(student, z, y, SIGMAS, [eps2, eps3])
    assert len(student.calls) == 2
    x_t1 = SIGMAS[0] * z
    first = network(x_t1, full(SIGMAS[0]), y)
    x_t2 = first + SIGMAS[1] * eps2
    second = network(x_t2, full(SIGMAS[1]), y)
    x_t3 = second + SIGMAS[2] * eps3
    for ours, by_hand in zip(inputs + outputs, [x_t1, x_t2, x_t3, first, second], strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-12, atol=1e-12)
        assert not ours.requires_grad


def test_a_one_step_roll_out_asks_the_student_nothing():
    student = Recorder(gaussian_denoiser(0, 1))
    z = normal(2, 1, 4, 4)
    inputs, outputs = roll_out(student, z, None, SIGMAS[:1], [])
    assert outputs == [] and not student.calls and torch.equal(inputs[0], 80 * z)


def test_the_first_input_has_the_scale_that_the_students_levels_say():
    z, sigmas = normal(2, 1, 4, 4), (12.0, 1.5)
    student = Recorder(gaussian_denoiser(0, 1), VP)
    inputs, _ = roll_out(student, z, None, sigmas, [normal(2, 1, 4, 4, seed=1)])
    assert torch.equal(inputs[0], math.sqrt(1 + 12 ** 2) * z)
    assert torch.equal(student.calls[0][0], inputs[0]) and (student.calls[0][1] == 12).all()
    image = sample_student(student, z, None, lambda: normal(2, 1, 4, 4, seed=1), sigmas=sigmas)
    assert torch.equal(image, student(inputs[1], full(1.5), None))      # later noise keeps its size


@pytest.mark.parametrize("shape", [(7,), (3, 5)])
def test_denoising_together_keeps_each_images_condition_whatever_its_shape(shape):
    def student(x_t, sigma, y):
        assert y.shape == (len(x_t), *shape)
        return x_t + sigma * y.flatten(1).sum(1).reshape(-1, 1, 1, 1)

    inputs, y = [normal(4, 1, 2, 2, seed=seed) for seed in range(3)], normal(4, *shape, seed=9)
    together = denoise_together(student, inputs, SIGMAS, y)
    for ours, x_t, sigma in zip(together, inputs, SIGMAS):
        torch.testing.assert_close(ours, student(x_t, full(sigma), y))


@pytest.mark.parametrize("labelled", [True, False])
def test_denoising_together_equals_denoising_one_by_one_and_passes_the_gradient(labelled):
    network, z, y, noises = student_and_inputs()
    y = y if labelled else None
    network = network if labelled else small_network(1, label_dim=0).double()
    student = Recorder(network)
    inputs = [80 * z, *noises]
    together = denoise_together(student, inputs, SIGMAS, y)
    assert len(student.calls) == 1 and len(together) == 3
    for ours, x_t, sigma in zip(together, inputs, SIGMAS):
        torch.testing.assert_close(ours, network(x_t, full(sigma), y), rtol=1e-10, atol=1e-12)
    together[1].sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_element_k_of_every_step_is_the_image_of_a_sampler_with_k_plus_one_steps():
    student, z, y, noises = student_and_inputs()
    drawn = []

    def noise():
        drawn.append(noises[len(drawn)])
        return drawn[-1]

    images = sample_every_step(student, z, y, noise, sigmas=SIGMAS)
    assert len(images) == 3 and len(drawn) == 2 and not images[2].requires_grad
    for k, image in enumerate(images):
        drawn.clear()
        alone = sample_student(student, z, y, noise, sigmas=SIGMAS[:k + 1])
        assert torch.equal(image, alone) and len(drawn) == k
    inputs, outputs = roll_out(student, z, y, SIGMAS, noises)
    by_hand = [*outputs, student(inputs[-1], full(SIGMAS[-1]), y)]
    torch.testing.assert_close(images, [x.detach() for x in by_hand], rtol=1e-12, atol=1e-12)


# ---- Heun's method ----

def edm_sigmas(steps):
    """EDM Eq. 5."""
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    return [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)]


@pytest.mark.parametrize("steps", [1, 2, 18, 40])
def test_heun_makes_one_evaluation_less_than_twice_its_steps(steps):
    denoiser = Recorder(gaussian_denoiser(0, 1))
    sample_heun(denoiser, normal(2, 1, 2, 2), None, steps=steps)
    assert len(denoiser.calls) == 2 * steps - 1


def test_heun_follows_edms_noise_levels_down_to_zero():
    denoiser, labels = Recorder(gaussian_denoiser(0, 1)), object()
    sample_heun(denoiser, normal(2, 1, 2, 2), labels, steps=18)
    sigmas = edm_sigmas(18)
    expected = [s for pair in zip(sigmas, sigmas[1:]) for s in pair] + sigmas[-1:]
    seen = [sigma.unique().item() for _, sigma, _ in denoiser.calls]
    assert seen == pytest.approx(expected, rel=1e-12)
    assert all(sigma.shape == (2, 1, 1, 1) and y is labels for _, sigma, y in denoiser.calls)


def test_one_heun_step_is_the_denoised_noise():
    z, denoiser = normal(2, 1, 2, 2), gaussian_denoiser(0.3, 0.5)
    image = sample_heun(denoiser, z, None, steps=1)
    torch.testing.assert_close(image, denoiser(80 * z, full(80.0)))


@pytest.mark.parametrize("levels", [KARRAS, VP], ids=["karras", "vp"])
def test_heun_runs_through_the_networks_own_levels_from_its_own_first_input(levels):
    denoiser, z = Recorder(gaussian_denoiser(0.3, 0.5), levels), normal(2, 1, 2, 2)
    sample_heun(denoiser, z, None, steps=5)
    first = levels.table[-1].item()
    torch.testing.assert_close(denoiser.calls[0][0], z * levels.first_scale(first))
    sigmas = [levels.at(1 - i / 4) for i in range(5)]
    assert [s[0].item() for _, s, _ in denoiser.calls[::2]] == pytest.approx(sigmas)
    assert [sigmas[0], sigmas[-1]] == pytest.approx([first, levels.table[0].item()], rel=1e-9)


def heun_error(steps, mean=0.3, std=0.5):
    """Largest distance from the exact probability-flow solution, for data from N(mean, std^2).

    In x the solution is mean + C sqrt(std^2 + sigma^2), down to sigma_min; then one denoising.
    """
    z = torch.linspace(-3, 3, 13).double()[None, None, None]
    denoiser = gaussian_denoiser(mean, std)
    x = mean + (80 * z - mean) * math.sqrt((std ** 2 + 0.002 ** 2) / (std ** 2 + 80 ** 2))
    exact = denoiser(x, full(0.002))
    return (sample_heun(denoiser, z, None, steps=steps) - exact).abs().max().item()


def test_heun_reaches_the_exact_probability_flow_solution_to_second_order():
    errors = [heun_error(intervals + 1) for intervals in (64, 128, 256, 512)]
    assert errors[-1] < 1e-4
    ratios = [coarse / fine for coarse, fine in zip(errors, errors[1:])]
    assert ratios == pytest.approx([4.0] * 3, abs=0.25)


def test_heun_keeps_its_state_in_float64_and_returns_the_type_of_z():
    denoiser = Recorder(gaussian_denoiser(0.3, 0.5))
    z = normal(2, 1, 2, 2, dtype=torch.float32)
    x = sample_heun(denoiser, z, None, steps=40)
    assert {call[0].dtype for call in denoiser.calls} == {torch.float64}
    assert x.dtype == torch.float32
    exact = sample_heun(gaussian_denoiser(0.3, 0.5), z.double(), None, steps=40)
    assert torch.equal(x, exact.float())


def heun_coefficients(steps, std=0.5, **churn):
    """The image of a Gaussian teacher is linear in z and in each added noise: its coefficients."""
    calls = []

    def noise():
        calls.append(0.0)
        impulse = torch.zeros(steps + 1, 1, 1, 1, dtype=torch.float64)
        impulse[len(calls)] = 1
        return impulse

    z = torch.zeros(steps + 1, 1, 1, 1, dtype=torch.float64)
    z[0] = 1
    denoiser = Recorder(gaussian_denoiser(0, std))
    x = sample_heun(denoiser, z, None, noise, steps=steps, **churn)
    return x.flatten(), len(calls), [call[1][0].item() for call in denoiser.calls[::2]]


@pytest.mark.parametrize("churn", [0.0, 10.0, 80.0, 1000.0])
def test_churn_keeps_the_variance_of_a_gaussian(churn):
    coefficients, drawn, _ = heun_coefficients(400, churn=churn)
    assert drawn == (400 if churn else 0)
    assert coefficients.square().sum().item() == pytest.approx(0.25, rel=1e-2)
    if churn:
        assert coefficients[1:].square().sum() > 0.02          # and the noise is in the image


@pytest.mark.parametrize("churn, gamma", [(4.0, 0.1), (100.0, math.sqrt(2) - 1)])
def test_churn_raises_each_level_between_its_limits_by_gamma_of_algorithm_2(churn, gamma):
    _, drawn, seen = heun_coefficients(40, churn=churn, churn_min=0.05, churn_max=50.0)
    sigmas = edm_sigmas(40)
    raised = [0.05 <= s <= 50 for s in sigmas]
    assert drawn == sum(raised) and 0 < drawn < 40
    expected = [s * (1 + gamma) if up else s for s, up in zip(sigmas, raised)]
    assert seen == pytest.approx(expected, rel=1e-9)


def test_churn_noise_scales_the_noise_that_is_added_and_nothing_else():
    once, *_ = heun_coefficients(40, churn=10.0)
    more, *_ = heun_coefficients(40, churn=10.0, churn_noise=1.5)
    factor = torch.tensor([1.0] + [1.5] * 40).double()
    torch.testing.assert_close(more, factor * once, rtol=1e-10, atol=1e-14)


# ---- Guidance ----

class Elementwise(nn.Module):
    """A denoiser [B,1,2,2] that answers by its condition; counts its passes."""

    shape, levels, pixels = (1, 2, 2), VP, staticmethod(to_uint8)

    def __init__(self, null):
        super().__init__()
        self.conditions = Conditions(4, lambda index: index[:, None].double(), null)
        self.passes = []

    def forward(self, x_t, sigma, y):
        self.passes.append(len(x_t))
        weight = y.flatten(1).sum(1)[:, None, None, None]
        return torch.sin(x_t * (1 + weight)) / (1 + sigma)


def guided(weight, null=torch.zeros(1)):  # noqa: B008 - it is only read
    network = Elementwise(null)
    inputs = normal(3, 1, 2, 2), torch.tensor([0.3, 1.0, 7.0]).double().reshape(3, 1, 1, 1)
    return network, Guided(network, weight), inputs, normal(3, 1, seed=2)


def test_guidance_of_weight_one_is_the_network_and_of_nought_the_network_without_condition():
    for weight, condition in ((1.0, lambda y: y), (0.0, torch.zeros_like)):
        network, guidance, inputs, y = guided(weight)
        torch.testing.assert_close(guidance(*inputs, y), network(*inputs, condition(y)))


@pytest.mark.parametrize("null", [torch.zeros(()), torch.full((1,), 0.7)], ids=["zeros", "own"])
def test_guidance_in_x0_is_guidance_in_epsilon_in_one_stacked_pass(null):
    network, guidance, (x_t, sigma), y = guided(4.5, null)
    x0 = guidance(x_t, sigma, y)
    assert network.passes == [6] and x0.shape == x_t.shape
    without, asked = ((x_t - network(x_t, sigma, condition)) / sigma        # epsilon of each
                      for condition in (null.double().expand_as(y), y))
    torch.testing.assert_close(x0, x_t - sigma * (without + 4.5 * (asked - without)))
    assert not torch.allclose(x0, network(x_t, sigma, y))


def test_guidance_tells_of_its_network_what_samplers_ask_and_keeps_no_weight_of_its_own():
    network, guidance, _, _ = guided(3.0)
    for name in ("shape", "levels", "conditions", "pixels"):
        assert getattr(guidance, name) is getattr(network, name)
    assert not guidance.state_dict()
    assert copy.deepcopy(guidance).to("meta").null.device.type == "meta"    # it goes along
    images, index = sample_seeds(guidance, [1, 2], partial(sample_heun, steps=3), [3, 0])
    assert index.tolist() == [3, 0] and set(network.passes) == {4} and len(network.passes) == 5


# ---- Conditions ----

def test_classes_become_one_hot_vectors_and_none_of_them_zeros():
    conditions = classes_as_conditions(5)
    assert conditions.count == 5
    assert torch.equal(conditions.embed(torch.tensor([4, 0])), torch.eye(5)[[4, 0]])
    assert not conditions.null.expand(2, 5).any()
    with torch.device("meta"):                          # as a network is built from a checkpoint
        assert not classes_as_conditions(5).null.is_meta
    without = classes_as_conditions(0)
    assert without.count == 0 and without.embed(None) is without.null is None


# ---- One seed, one image ----

class Mixture:
    """An elementwise denoiser whose class moves its modes."""

    shape, levels, conditions = (1, 4, 4), KARRAS, classes_as_conditions(10)

    def __call__(self, x_t, sigma, y):
        shift = (y @ torch.arange(10, dtype=y.dtype))[:, None, None, None] / 10
        denoise = mixture_denoiser([0.3, 0.7], [-1.0, 0.8], [0.4, 0.6])
        return (shift + denoise((x_t - shift).double(), sigma.double())).to(x_t.dtype)


SEEDS = [7, 3, 2 ** 31, 0, 11]
STUDENT = partial(sample_student, sigmas=SIGMAS)
CHURNED = partial(sample_heun, steps=6, churn=3.0)


@pytest.mark.parametrize("sampler", [STUDENT, CHURNED], ids=["student", "heun"])
@pytest.mark.parametrize("network, tolerance", [(Mixture(), 0), (small_network(2).double(), 1e-7)],
                         ids=["elementwise", "network"])
def test_a_seed_gives_the_same_image_whatever_the_batch(network, tolerance, sampler):
    together, classes = sample_seeds(network, SEEDS, sampler)
    together_by_two = [sample_seeds(network, SEEDS[i:i + 2], sampler) for i in (0, 2, 4)]
    alone = [sample_seeds(network, [seed], sampler) for seed in SEEDS]
    assert together.std() > 0.01 and len(together.unique(dim=0)) == len(SEEDS)
    for parts in (together_by_two, alone):
        assert torch.equal(torch.cat([part[1] for part in parts]), classes)
        difference = (torch.cat([part[0] for part in parts]) - together).abs().max()
        assert difference <= tolerance * together.abs().max()


def test_each_seeds_generator_draws_noise_then_class_then_what_the_sampler_asks_for():
    drawn = []

    def sampler(network, z, y, noise):
        drawn.extend([z, y, noise(), noise()])
        return z

    images, classes = sample_seeds(Mixture(), SEEDS[:2], sampler)
    for i, seed in enumerate(SEEDS[:2]):
        generator = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, 1, 4, 4, generator=generator)
        assert torch.equal(drawn[0][i], draw())
        assert classes[i] == torch.randint(10, (1,), generator=generator)
        assert torch.equal(drawn[1][i], torch.eye(10)[classes[i]])
        assert torch.equal(drawn[2][i], draw()) and torch.equal(drawn[3][i], draw())


def test_classes_are_drawn_from_all_of_them():
    _, classes = sample_seeds(Mixture(), range(300), lambda network, z, y, noise: z)
    assert classes.bincount(minlength=10).min() > 10 and classes.max() == 9


def test_a_class_asked_for_changes_the_class_and_no_noise():
    images, drawn = sample_seeds(Mixture(), SEEDS, STUDENT)
    same, _ = sample_seeds(Mixture(), SEEDS, STUDENT, drawn.tolist())
    assert torch.equal(images, same)
    asked, classes = sample_seeds(Mixture(), SEEDS, STUDENT, [4] * 5)
    assert classes.tolist() == [4] * 5
    assert torch.equal(asked[drawn == 4], images[drawn == 4])
    each, classes = sample_seeds(Mixture(), SEEDS, STUDENT, [4, 4, 1, 4, 4])
    assert classes.tolist() == [4, 4, 1, 4, 4]
    assert [torch.equal(a, b) for a, b in zip(asked, each)] == [True, True, False, True, True]


def test_a_network_without_classes_is_asked_for_none():
    student = Recorder(gaussian_denoiser(0, 1))
    student.shape, student.conditions = (1, 2, 2), classes_as_conditions(0)
    images, classes = sample_seeds(student, [0, 1], STUDENT)
    assert classes is None and all(call[2] is None for call in student.calls)


def test_pixels_survive_the_way_to_floats_and_back_and_rounding_truncates():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(pixels)), pixels)
    assert from_uint8(pixels).dtype == torch.float32
    assert [from_uint8(pixels)[i].item() for i in (0, 255)] == [-1.0, 1.0]
    x0 = torch.tensor([-9 * 127.5, -127.5, -0.001, 0, 0.999, 1.001, 127.5, 9 * 127.5]) / 127.5
    assert to_uint8(x0).tolist() == [0, 0, 127, 128, 128, 129, 255, 255]
    assert to_uint8(x0).dtype == torch.uint8


# ---- GAN head ----

@pytest.mark.parametrize("channels", [4, 5, 16, 21, 32, 48, 64])
@pytest.mark.parametrize("resolution", [1, 2, 3, 4, 6, 8, 16])
def test_a_gan_head_gives_each_image_one_logit_that_follows_every_part_of_it(channels, resolution):
    torch.manual_seed(0)
    head = GANHead(channels, resolution).double()
    encoded = normal(8, channels, resolution, resolution).requires_grad_()
    logits = head(encoded)
    assert logits.shape == (8, 1)
    torch.testing.assert_close(head(encoded[:1]), logits[:1])           # an image for itself
    slope = torch.autograd.grad(logits.sum(), encoded)[0].detach()
    assert (slope.abs().sum((0, 1)) > 0).all()
    # A small move changes the logit by its slope: neither constant nor a step.
    move = 1e-3 * normal(*encoded.shape, seed=1)
    change = (head(encoded + move) - logits).flatten().detach()
    assert change.abs().median() > 1e-5
    assert (change - (slope * move).sum((1, 2, 3))).abs().max() < 0.1 * change.abs().max()


def test_a_gan_head_of_imagenets_teacher_has_the_layers_of_dmd2():
    head = GANHead(768, 8)
    convolutions = [layer for layer in head.layers if isinstance(layer, nn.Conv2d)]
    assert [(c.kernel_size[0], c.stride[0], c.padding[0]) for c in convolutions] == [
        (4, 2, 1), (4, 4, 0), (1, 1, 0)]
    norms = [layer for layer in head.layers if isinstance(layer, nn.GroupNorm)]
    assert [norm.num_groups for norm in norms] == [32, 32]
    assert sum(isinstance(layer, nn.SiLU) for layer in head.layers) == 2


def count_calls(modules):
    counts = []
    for module in modules:
        module.register_forward_hook(lambda *args: counts.append(1))
    return counts


def test_the_adapted_network_with_a_head_denoises_as_it_does_without():
    network, inputs = small_network(3), (normal(2, 1, 8, 8).float(), torch.tensor([0.5, 9.0]))
    y = torch.eye(10)[:2]
    assert torch.equal(AdaptedWithHead(network)(*inputs, y), network(*inputs, y))


def test_the_logits_come_from_one_pass_of_the_encoder_and_none_of_the_decoder():
    network = small_network(3)
    adapted = AdaptedWithHead(network)
    x_t, sigma, y = normal(2, 1, 8, 8).float(), torch.tensor([0.5, 9.0]), torch.eye(10)[:2]
    expected = adapted.head(network(x_t, sigma, y, output="encoder"))
    encoder = count_calls(network.model.enc.values())
    decoder = count_calls(network.model.dec.values())
    logits = adapted(x_t, sigma, y, output="logits")
    assert logits.shape == (2, 1) and torch.equal(logits, expected)
    assert len(encoder) == len(network.model.enc) and not decoder


# ---- Moving average ----

def test_with_a_ramp_up_the_half_life_is_a_share_of_what_was_seen_until_it_is_long_enough():
    ema, student = parameters(1.0), parameters(5.0)
    update_ema(ema, student, images=50, halflife=8000, rampup=0.05, seen=1000)
    torch.testing.assert_close(ema[0], parameters(3.0)[0])          # half-life 50
    for rampup, seen in ((0.05, 10 ** 6), (0.0, 0)):
        ema = parameters(1.0)
        update_ema(ema, student, images=8000, halflife=8000, rampup=rampup, seen=seen)
        torch.testing.assert_close(ema[0], parameters(3.0)[0])
    update_ema(ema, student, images=50, halflife=8000, rampup=0.05, seen=0)
    assert torch.equal(ema[0], student[0])                          # at first it is the student


def parameters(*values):
    return nn.ParameterList([torch.full((2,), v, dtype=torch.float64) for v in values])


@pytest.mark.parametrize("updates", [1, 4, 1000])
def test_after_the_half_life_the_old_average_counts_half(updates):
    ema, student = parameters(1.0, -3.0), parameters(5.0, 7.0)
    for _ in range(updates):
        update_ema(ema, student, images=8000 / updates, halflife=8000)
    torch.testing.assert_close(list(ema), list(parameters(3.0, 2.0)), rtol=1e-12, atol=0)
    assert torch.equal(student[0], parameters(5.0)[0])


def test_without_a_half_life_the_average_is_the_student():
    ema, student = small_network(0), small_network(1)
    update_ema(ema, student, images=1, halflife=0)
    pairs = zip(ema.parameters(), student.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
