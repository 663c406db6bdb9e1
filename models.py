"""Noise levels, conditions, samplers, the student's roll-out, the GAN head, the moving average.

Everywhere: images in [-1, 1], x_t = x0 + sigma * eps. A denoiser is a callable
D(x_t, sigma, y, output="denoised") -> x0 with sigma [B,1,1,1] and y, its condition, [B,...] or
None; output="encoder" gives the features of its encoder. It tells:

    shape                 of x_t, without the batch
    levels                the noise that it was trained on (Levels)
    sigma_data            its denoising loss has the weight sigma^-2 + sigma_data^-2
    conditions            what can be asked of it (Conditions)
    encoder_channels, encoder_resolution        of these features, for DMD2's head
    config                of what is trained or saved: the arguments that rebuild it
    blocks                its largest parts, each called once in a pass: --shard, --recompute
    pixels                x0 -> uint8 images [B,C,H,W]

EDM = arXiv:2206.00364, DMD = arXiv:2311.18828, DMD2 = arXiv:2405.14867, SiD = arXiv:2404.04057,
PMDD = "Progressive Data-Free Diffusion Distillation", whose steps are counted as sampled here.
"""

import math
from functools import partial
from typing import Callable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from losses import dm_loss, sid_loss

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7
SEEDS = 2 ** 32                 # torch's generator on a CPU looks at no more bits of a seed


# ---- Noise levels ----

class Levels(NamedTuple):
    """The noise levels that a denoiser was trained on, ascending."""
    table: torch.Tensor         # [N] float64
    at: Callable                # share of the way from the lowest (0) to the highest (1) -> sigma
    first_scale: Callable       # sigma of the first step -> what z is multiplied by to be its input
    trained: Callable           # sampler of the noise that it was trained with

    def to(self, device):
        return self._replace(table=self.table.to(device))


def karras(fraction):
    """EDM Eq. 5 from sigma_min (0) to sigma_max (1)."""
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    return (low + fraction * (high - low)) ** RHO


# Each sampler: (levels, batch, generator) -> sigma [B,1,1,1], float32, on the device of the levels.

def sigma_grid(levels, batch, generator, low=0.0, high=1.0):
    """Uniform over the levels from one share of the table to another: DMD's adapted network."""
    table, end = levels.table, len(levels.table)
    ends = min(round(low * end), end - 1), min(round(high * end) + 1, end)
    return table[torch.randint(*ends, (batch, 1, 1, 1), generator=generator,
                               device=table.device)].float()


sigma_dm = partial(sigma_grid, low=0.02, high=0.98)     # DMD Eq. 7: the middle of the levels


def sigma_sid(levels, batch, generator, low=0.0, high=0.8):
    """SiD's student loss: u uniform in [0, 0.8], u = 0 at the lowest level; between the levels."""
    u = torch.rand(batch, 1, 1, 1, generator=generator, device=levels.table.device)
    return levels.at(low + (high - low) * u.double()).float()


def sigma_lognormal(levels, batch, generator, mean=-1.2, std=1.2):
    """EDM's training noise."""
    normal = torch.randn(batch, 1, 1, 1, generator=generator, device=levels.table.device)
    return (mean + std * normal).exp()


def falling(sigmas):
    """Whether these levels fall from step to step and stay above 0."""
    return all(a > b > 0 for a, b in zip([math.inf, *sigmas], sigmas))


# The 1000 levels into which DMD divides EDM's noise. EDM's networks take sigma z as pure noise.
KARRAS = Levels(karras(torch.arange(1000, dtype=torch.float64) / 999), karras, lambda sigma: sigma,
                sigma_lognormal)


# ---- The student's losses, each with its noise ----

class StudentLoss(NamedTuple):
    """A row of the table that --loss chooses from."""
    of: Callable            # config -> loss(x0, sigma, eps, y, *, teacher, adapted); None: no such
    student_noise: Callable     # at which noise it compares the denoisers (Deviation 5)
    adapted_noise: Callable | None      # at which the adapted network learns; None: as the teacher


LOSSES = {
    "dm": StudentLoss(lambda config: partial(dm_loss, weighting=config.dm_weighting),
                      sigma_dm, sigma_grid),
    "sid": StudentLoss(lambda config: partial(sid_loss, alpha=config.alpha),
                       sigma_sid, None),
    "none": StudentLoss(lambda config: None, sigma_dm, sigma_grid)}     # the extra terms alone


# ---- Conditions ----

class Conditions(NamedTuple):
    """What a network can be asked for, classes or prompts, each known by its index."""
    count: int                  # 0: nothing can be asked for
    embed: Callable             # index [B] -> y [B,...]; None where count is 0
    null: torch.Tensor | None   # y of no condition, broadcastable to y: for guidance
    on_host: bool = False       # whether an index is looked up on the host, as of prompts
    texts: Sequence = ()        # the prompts


def classes_as_conditions(label_dim):
    """One-hot classes, all zeros for none: EDM's networks."""
    if not label_dim:
        return Conditions(0, lambda index: None, None)
    null = torch.zeros((), device="cpu")                # also where the network is built on "meta"
    return Conditions(label_dim, lambda index: F.one_hot(index, label_dim).float(), null)


class Guided(nn.Module):
    """Classifier-free guidance (arXiv:2207.12598): D(null) + w (D(y) - D(null)), exact in x0."""

    def __init__(self, network, weight):
        super().__init__()
        self.network, self.weight = network, weight
        self.register_buffer("null", network.conditions.null, persistent=False)
        for name in ("shape", "levels", "conditions", "pixels"):
            setattr(self, name, getattr(network, name))

    @property
    def blocks(self):
        return self.network.blocks

    def forward(self, x_t, sigma, y):
        both = torch.cat([self.null.to(y).expand_as(y), y])
        twice = torch.cat([x_t, x_t]), torch.cat([sigma, sigma]), both
        without, asked = self.network(*twice).chunk(2)
        return without + self.weight * (asked - without)


def unguided(network):
    """The network itself, where guidance is around it."""
    return network.network if isinstance(network, Guided) else network


# ---- Sampling ----

def level(sigma, x):
    """One noise level for every image of x. [B,1,1,1]"""
    return torch.full((len(x), 1, 1, 1), float(sigma), dtype=x.dtype, device=x.device)


@torch.no_grad()
def roll_out(student, z, y, sigmas, noises):
    """PMDD Eq. 7 = DMD2 Sec. 4.5: inputs x_t1..x_tn, and outputs x0 of all steps but the last.
    z, and one of noises for each step after the first: standard normal [B,C,H,W]."""
    inputs, outputs = [student.levels.first_scale(sigmas[0]) * z], []
    for sigma, next_sigma, eps in zip(sigmas, sigmas[1:], noises):
        outputs.append(student(inputs[-1], level(sigma, z), y))
        inputs.append(outputs[-1] + next_sigma * eps)
    return inputs, outputs


def denoise_together(student, inputs, sigmas, y):
    """[student(x_tk, t_k) for each k] in one batched pass."""
    sigma = torch.cat([level(s, x) for s, x in zip(sigmas, inputs)])
    y = None if y is None else torch.cat([y] * len(inputs))
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
    sigmas = [denoiser.levels.at(1 - i / max(steps - 1, 1)) for i in range(steps)] + [0.0]
    x = z.double() * denoiser.levels.first_scale(sigmas[0])
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
        if not all(0 <= seed < SEEDS for seed in seeds):
            raise ValueError(f"seeds {min(seeds)} to {max(seeds)}: allowed are 0 to {SEEDS - 1}")
        self.generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]
        self.shape, self.device = tuple(shape), device

    def __call__(self):
        noise = torch.empty(len(self.generators), *self.shape, device=self.device)
        for image, generator in zip(noise, self.generators):
            image.normal_(generator=generator)
        return noise

    def indices(self, count):
        return torch.cat([torch.randint(count, (1,), generator=g, device=self.device)
                          for g in self.generators])


def sample_seeds(network, seeds, sampler, asked=None, device="cpu"):
    """Images x0 [B,C,H,W] and the index of what was asked for [B], None where nothing can be.

    Each seed's generator draws its z, then its condition, which `asked` (one for each seed) takes
    the place of, then whatever the sampler asks for: sampler(network, z, y, noise) is
    sample_student or sample_heun with its options bound.
    """
    noise, conditions = SeededNoise(seeds, network.shape, device), network.conditions
    z = noise()
    if not conditions.count:
        return sampler(network, z, None, noise), None
    # EDM draws a class also where one is asked for; diffusers, between z and the noise, nothing.
    if asked is None or not conditions.on_host:
        index = noise.indices(conditions.count)
    if asked is not None:
        index = torch.as_tensor(asked, device=device)
    return sampler(network, z, conditions.embed(index).to(z), noise), index


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
        self.head = GANHead(network.encoder_channels, network.encoder_resolution)

    @property
    def blocks(self):
        return [*self.network.blocks, *self.head.layers[::3]]      # its convolutions

    def forward(self, x_t, sigma, y, output="denoised"):
        if output == "logits":                          # whose losses are fp32 under autocast too
            return self.head(self.network(x_t, sigma, y, output="encoder")).float()
        return self.network(x_t, sigma, y)


@torch.no_grad()
def update_ema(ema, student, images, halflife, rampup=0.0, seen=0):
    """After a half-life of images, at most a share of those `seen`, the old average counts half."""
    halflife = min(halflife, rampup * seen) if rampup else halflife     # EDM F.2 (Deviation 10)
    keep = 0.5 ** (images / halflife) if halflife else 0.0
    for average, weight in zip(ema.parameters(), student.parameters()):
        average.lerp_(weight.to(average.device), 1 - keep)              # it may be on the host
