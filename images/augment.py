"""The augmentation that EDM trains with (arXiv:2206.00364, F.2), and its nine labels.

Drawn for the whole batch at once, then applied to any slice of it: an image never depends on which
images it shares a batch with. The labels tell the network what was done to each image; all zero
means untouched, and that is what the network is told when it samples.
"""

import math

import torch
import torch.nn.functional as F

from base.devices import full_precision

# The low-pass filter of the wavelet sym6, 12 taps that sum to sqrt(2).
SYM6 = (0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
        0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
        -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148)
# The taps' centre of mass lies this far before their middle; left out, rotations and scales would
# be about a point a fifth of a pixel beside the image's centre.
OFF_CENTRE = 5.5 - sum(k * tap for k, tap in enumerate(SYM6)) / sum(SYM6)


def draw_augmentation(batch, p, generator):
    """What happens to each image, 0 where a transform is off: float32 [batch, 8].

    Columns: flip left-right, flip up-down, log2 scale / 0.2, rotation (radians, anticlockwise),
    log2 stretch / 0.2, direction of the stretch (radians), shift right, shift down (size / 8).
    """
    device = generator.device
    on = torch.rand(batch, 6, generator=generator, device=device)
    coin = torch.rand(batch, 3, generator=generator, device=device) < 0.5
    angle = math.pi * (2 * torch.rand(batch, 2, generator=generator, device=device) - 1)
    scale, stretch, *shift = torch.randn(4, batch, generator=generator, device=device)
    drawn = torch.stack([coin[:, 0], coin[:, 1], scale, angle[:, 0],
                         stretch, coin[:, 2] * angle[:, 1], *shift], dim=1)
    # Any p > 0 mirrors half of the images left-right; p = 0 is no augmentation at all.
    on = on < torch.tensor([float(p > 0), p, p, p, p, p], device=device)
    return drawn.where(on[:, [0, 1, 2, 3, 4, 4, 5, 5]], 0)


def apply_augmentation(x, parameters):
    """x [B,C,S,S] in [-1, 1], parameters [B,8] -> augmented images, labels [B,9]."""
    # Found where the parameters were drawn: with a generator on the host, no GPU is waited for.
    moved = parameters[:, 2:].any(dim=1).nonzero().flatten()
    parameters = parameters.to(x)
    left_right, up_down = parameters[:, :2].bool().T.reshape(2, -1, 1, 1, 1)
    augmented = torch.where(left_right, x.flip(3), x)
    augmented = torch.where(up_down, augmented.flip(2), augmented)
    if len(moved):                                         # the others keep their very pixels
        with full_precision(x.device.type):
            augmented[moved] = warp(augmented[moved], *inverse_map(parameters[moved], x.shape[-1]))
    return augmented, labels(parameters)


def labels(parameters):
    """[B,8] -> [B,9], 0 for every transform that is off."""
    left_right, up_down, scale, angle, stretch, axis, *shift = parameters.unbind(1)
    return torch.stack([left_right, up_down, scale, angle.cos() - 1, angle.sin(),
                        stretch * axis.cos(), stretch * axis.sin(), *shift], dim=1)


def inverse_map(parameters, size):
    """M [B,2,2] and t [B,2]: the pixel at q of the old image goes to p of the new, q = M p + t.

    Positions in pixels from the image's centre, x to the right and y down. Forwards: scale,
    rotate, stretch, shift; so q = S^-1 R^-1 A^-1 (p - shift).
    """
    _, _, scale, angle, stretch, axis = parameters[:, :6].unbind(1)
    s = 2 ** (0.2 * stretch)
    unstretch = rotation(axis).mT @ torch.diag_embed(torch.stack([1 / s, s], 1)) @ rotation(axis)
    M = 2 ** (-0.2 * scale)[:, None, None] * rotation(angle) @ unstretch
    shift = parameters[:, 6:, None] * size / 8
    return M, -(M @ shift)[..., 0]


def rotation(angle):
    """Clockwise as seen, y pointing down: the inverse of a turn by `angle`. [B,2,2]"""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=1).unflatten(1, (2, 2))


def warp(x, M, t):
    """The image whose pixel at p is x at M p + t, between its pixels and beyond its edges.

    Up-sampled, sampled bilinearly, down-sampled by the transpose: a wavelet's filter is orthogonal
    to itself two taps on, so a shift by whole pixels comes out exact.
    """
    B, C, size, _ = x.shape
    # A whole mirror image on each side; the 10 rows at each end lack taps. The few samples that
    # fall still farther out are mirrored by grid_sample.
    up = upsampling(size, margin=size + 4).to(x)[10:-10]
    down = upsampling(size, margin=0).to(x).mT / 2
    x_up = up @ x @ up.mT
    # Both grids in half pixels from their middle; pixel centres lie OFF_CENTRE before that middle.
    shift = OFF_CENTRE * (M.sum(2) - 1) + 2 * t
    N, N_up = down.shape[1], len(up)
    theta = torch.cat([M * (N - 1), 2 * shift[..., None]], dim=2) / (N_up - 1)      # -1..1 each
    grid = F.affine_grid(theta, (B, C, N, N), align_corners=True)
    sampled = F.grid_sample(x_up, grid, padding_mode="reflection", align_corners=True)
    return down @ sampled @ down.mT


def upsampling(size, margin):
    """Matrix [2 (size + 2 margin) + 10, size]: pad by reflection, double, filter (one axis)."""
    position = torch.arange(-margin, size + margin) % (2 * size - 2)
    padded = torch.eye(size, dtype=torch.float64)[position.minimum(2 * size - 2 - position)]
    taps = math.sqrt(2) * torch.tensor(SYM6, dtype=torch.float64)       # each output's share is 1
    return F.conv_transpose1d(padded.T[:, None], taps[None, None], stride=2)[:, 0].T
