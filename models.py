"""Noise levels, samplers, the student's roll-out, the GAN head and the moving average.

Everywhere: images in [-1, 1], x_t = x0 + sigma * eps, a denoiser is a callable
D(x_t, sigma, y) -> x0 with sigma [B,1,1,1] and y one-hot [B,label_dim] or None.
EDM = arXiv:2206.00364, DMD = arXiv:2311.18828, DMD2 = arXiv:2405.14867, SiD = arXiv:2404.04057.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

SIGMA_MIN, SIGMA_MAX, RHO, LEVELS = 0.002, 80.0, 7, 1000


# ---- Noise levels. Each sampler: (batch, generator) -> sigma [B,1,1,1], float32. ----

def karras(fraction):
    """Noise level a fraction of the way from sigma_min (0) to sigma_max (1): EDM Eq. 5."""
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    return (low + fraction * (high - low)) ** RHO


def karras_grid():
    """The 1000 levels into which DMD divides EDM's noise, index 0 = sigma_min. [LEVELS] float64"""
    return karras(torch.arange(LEVELS, dtype=torch.float64) / (LEVELS - 1))


def sigma_grid(batch, generator, first=0, last=LEVELS - 1):
    """Uniform over the grid's levels first..last: DMD's adapted net, and DMD2's GAN."""
    device = generator.device
    index = torch.randint(first, last + 1, (batch, 1, 1, 1), generator=generator, device=device)
    return karras(index.double() / (LEVELS - 1)).float()


def sigma_dm(batch, generator):
    """DMD Eq. 7: the middle of the grid, 2 % to 98 %."""
    return sigma_grid(batch, generator, first=LEVELS * 2 // 100, last=LEVELS * 98 // 100)


def sigma_sid(batch, generator):
    """SiD's student loss: u uniform in [0, 0.8], u = 0 at sigma_min; no grid."""
    u = torch.rand(batch, 1, 1, 1, generator=generator, device=generator.device)
    return karras(0.8 * u.double()).float()


def sigma_lognormal(batch, generator, mean=-1.2, std=1.2):
    """EDM's training noise; also SiD's adapted net."""
    normal = torch.randn(batch, 1, 1, 1, generator=generator, device=generator.device)
    return (mean + std * normal).exp()


# ---- Sampling ----

def level(sigma, x):
    """One noise level for every image of x. [B,1,1,1]"""
    return torch.full((len(x), 1, 1, 1), float(sigma), dtype=x.dtype, device=x.device)


def first_sigmas(sigmas, steps):
    if not 1 <= steps <= len(sigmas):
        raise ValueError(f"steps is {steps}; this student was trained for 1 to {len(sigmas)}")
    return tuple(sigmas[:steps])


@torch.no_grad()
def roll_out(student, z, y, sigmas, noises):
    """PMDD Eq. 7 = DMD2 Sec. 4.5: inputs x_t1..x_tn, and outputs x0 of all steps but the last.

    z and each of noises: standard normal [B,C,H,W]; noises has one for every step after the first.
    """
    inputs, outputs = [sigmas[0] * z], []
    for sigma, next_sigma, eps in zip(sigmas, sigmas[1:], noises):
        outputs.append(student(inputs[-1], level(sigma, z), y))
        inputs.append(outputs[-1] + next_sigma * eps)
    return inputs, outputs


def denoise_together(student, inputs, sigmas, y):
    """[student(x_tk, t_k) for each k] in one batched pass."""
    sigma = torch.cat([level(s, x) for s, x in zip(sigmas, inputs)])
    y = None if y is None else y.repeat(len(inputs), 1)
    return student(torch.cat(inputs), sigma, y).chunk(len(inputs))


@torch.no_grad()
def sample_every_step(student, z, y, noise, *, sigmas):
    """DMD2 Sec. 4.4: denoise, add noise, denoise, ...; noise() gives a fresh normal like z.

    Element k of the list is the image of a (k+1)-step sampler, so one roll-out gives them all.
    """
    inputs, outputs = roll_out(student, z, y, sigmas, (noise() for _ in sigmas[1:]))
    return outputs + [student(inputs[-1], level(sigmas[-1], z), y)]


def sample_student(student, z, y, noise, *, sigmas):
    return sample_every_step(student, z, y, noise, sigmas=sigmas)[-1]


@torch.no_grad()
def sample_heun(denoiser, z, y, noise=None, *, steps, churn=0.0, churn_min=0.0,
                churn_max=math.inf, churn_noise=1.0):
    """EDM Alg. 2 with 2 steps - 1 evaluations; state in float64. Churn 0 solves the ODE."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; allowed: at least 1")
    fractions = [1 - i / max(steps - 1, 1) for i in range(steps)]
    sigmas = [SIGMA_MAX if f == 1 else karras(f) for f in fractions] + [0.0]
    x = z.double() * sigmas[0]
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        # Raise the noise a little: gamma of Alg. 2.
        if churn > 0 and churn_min <= sigma <= churn_max:
            sigma_hat = sigma * (1 + min(churn / steps, math.sqrt(2) - 1))
            x = x + math.sqrt(sigma_hat ** 2 - sigma ** 2) * churn_noise * noise().double()
            sigma = sigma_hat
        # Euler step, then Heun's correction except into sigma = 0.
        slope = (x - denoiser(x, level(sigma, x), y)) / sigma
        x_next = x + (next_sigma - sigma) * slope
        if next_sigma > 0:
            next_slope = (x_next - denoiser(x_next, level(next_sigma, x), y)) / next_sigma
            x_next = x + (next_sigma - sigma) * (slope + next_slope) / 2
        x = x_next
    return x.to(z.dtype)


class SeededNoise:
    """One generator per image, as EDM: an image depends on its seed, never on its batch."""

    def __init__(self, seeds, shape, device):
        self.generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]
        self.shape, self.device = tuple(shape), device

    def __call__(self):
        noise = torch.empty(len(self.generators), *self.shape, device=self.device)
        for image, generator in zip(noise, self.generators):
            image.normal_(generator=generator)
        return noise

    def classes(self, label_dim):
        return torch.cat([torch.randint(label_dim, (1,), generator=g, device=self.device)
                          for g in self.generators])


def given_classes(classes, batch, label_dim, device):
    """One class for all, or one for each image. [B]"""
    classes = torch.as_tensor(classes, device=device)
    if classes.min() < 0 or classes.max() >= label_dim:
        raise ValueError(f"classes run from {classes.min()} to {classes.max()}; allowed: 0 to "
                         f"{label_dim - 1}")
    return classes.expand(batch)


def sample_seeds(network, seeds, sampler, classes=None, device="cpu"):
    """Images x0 [B,C,H,W] and their classes [B] (None without labels) for a list of seeds.

    Each generator draws its z, then its class, then whatever the sampler asks for:
    sampler(network, z, y, noise) is sample_student or sample_heun with its options bound.
    """
    if classes is not None and not network.label_dim:
        raise ValueError(f"classes are {classes}; allowed: none, this network is unconditional")
    noise = SeededNoise(seeds, network.image_shape, device)
    z, y = noise(), None
    if network.label_dim:
        drawn = noise.classes(network.label_dim)
        classes = drawn if classes is None else given_classes(classes, len(z), network.label_dim,
                                                              device)
        y = F.one_hot(classes, network.label_dim).to(z.dtype)
    return sampler(network, z, y, noise), classes


def to_uint8(x0):
    """EDM's rounding: [-1, 1] -> 0..255, truncated."""
    return (x0 * 127.5 + 128).clip(0, 255).to(torch.uint8)


def from_uint8(pixels):
    """EDM's data range: 0..255 -> [-1, 1]."""
    return pixels.float() / 127.5 - 1


# ---- GAN head and moving average ----

class GANHead(nn.Module):
    """DMD2 F.1: from the encoder's last output [B,C,R,R] to one logit [B,1]."""

    def __init__(self, channels, resolution):
        super().__init__()

        def norm():     # the U-Nets' groups: at 1x1 one of two channels would say nothing
            return nn.GroupNorm(math.gcd(min(32, max(channels // 4, 1)), channels), channels)

        layers = []
        while resolution > 4 and resolution % 2 == 0:
            layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), norm(), nn.SiLU()]
            resolution //= 2
        layers += [nn.Conv2d(channels, channels, resolution, stride=resolution), norm(), nn.SiLU(),
                   nn.Conv2d(channels, 1, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, encoded):
        return self.layers(encoded).flatten(1)


class AdaptedWithHead(nn.Module):
    """The adapted network that is also DMD2's discriminator: the head sits on its encoder."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.head = GANHead(network.model.encoder_channels, network.model.encoder_resolution)

    def forward(self, x_t, sigma, y, output="denoised"):
        if output == "denoised":
            return self.network(x_t, sigma, y)
        # "logits", whose losses are in fp32 even under autocast
        return self.head(self.network(x_t, sigma, y, output="encoder")).float()


@torch.no_grad()
def update_ema(ema, student, images, halflife_images):
    """After `halflife_images` images the old average counts half."""
    keep = 0.5 ** (images / halflife_images) if halflife_images else 0.0
    torch._foreach_lerp_(list(ema.parameters()), list(student.parameters()), 1 - keep)
