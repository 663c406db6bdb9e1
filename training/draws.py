"""What an iteration draws: from (seed, iteration) alone, for the whole batch, cut into parts."""

import math
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from numpy.random import default_rng

from base import distributed
from images.augment import apply_augmentation, draw_augmentation
from models import LOSSES, Conditions, Levels, sigma_grid


class Sources(NamedTuple):
    """What an iteration draws from; the levels lie on the device that draws."""
    shape: tuple                # of x_t, without the batch
    levels: Levels
    conditions: Conditions
    real: object = None         # real images or their latents, where a loss needs them
    pairs: object = None        # the teacher's noise-image pairs, for DMD's regression

    def take(self, files, indices):
        """Rows of real images or of pairs, as many as indices(count) gives, each with its y."""
        *rows, index = files.take(indices(files.count).tolist())
        conditions = files.conditions or self.conditions
        rows = [files.to_x(self.moved(row)) for row in rows]
        return *rows, conditions.embed(index if conditions.on_host else self.moved(index))

    def moved(self, tensor):                            # without waiting for the copy
        pinned = tensor.pin_memory() if self.levels.table.is_cuda else tensor
        return pinned.to(self.levels.table.device, non_blocking=True)


def generators(seed, step, device):
    """On the device and on the host, where indices into files are drawn; on a CPU both are one."""
    mixed = int(default_rng([seed, step]).integers(2 ** 32))
    host = torch.Generator().manual_seed(mixed)
    return torch.Generator(device).manual_seed(mixed) if device.type == "cuda" else host, host


def steps_trained(config, step):
    """How many steps the student takes, the last of which is trained: for the whole batch one."""
    n, last = len(config.sigmas), config.trained_step == "last"             # DMD2 Sec. 4.5
    return n if last else 1 + int(default_rng([config.seed, step, n]).integers(n))


def draw(config, step, sources, options):
    """Everything random of one iteration. A rank draws the whole batch and keeps its share, so that
    a run resumed, or on more processes, is the same, but for the dropout of stage 0."""
    B, size, levels, asked = config.batch, options.batch_per_gpu, sources.levels, sources.conditions
    rng, host_rng = generators(config.seed, step, levels.table.device)
    here, host = dict(generator=rng, device=levels.table.device), dict(generator=host_rng)
    share, between = B // options.world_size, dict(zip(("low", "high"), config.noise_range))
    mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)

    def normal(*steps):
        return torch.randn(B, *steps, *sources.shape, **here)[mine]

    def noise(sampler, *k):                             # several of each image, where k is given
        return sampler(levels, math.prod(k, start=B), rng).unflatten(0, (B, *k))[mine], normal(*k)

    def indices(count, on_host=True):
        return torch.randint(count, (B,), **(host if on_host else here))[mine]

    drawn, student_turn = SimpleNamespace(), step % config.ttur == 0
    if config.stage == 0:
        draw_for_teacher(drawn, config, step, sources, noise, indices, here, host_rng, mine)
    else:
        n, loss, k = steps_trained(config, step), LOSSES[config.loss], config.adapted_noises
        drawn.sigmas, drawn.seen = config.sigmas[:n], step // config.ttur * B
        drawn.z, drawn.noises = normal(), normal(n - 1)
        drawn.y = asked.embed(asked.count and indices(asked.count, asked.on_host))
        drawn.sigma_adapted, drawn.eps_adapted = noise(loss.adapted_noise or levels.trained, k)
        if student_turn:
            drawn.sigma, drawn.eps = noise(partial(loss.student_noise, **between))
        if sources.real is not None:                    # DMD2's GAN has its own (Deviation 13)
            drawn.real, drawn.y_real = sources.take(sources.real, indices)
            drawn.sigma_real, drawn.eps_real = noise(sigma_grid)
            drawn.sigma_fake, drawn.eps_fake = noise(sigma_grid)
            drawn.sigma_gan, drawn.eps_gan = noise(sigma_grid)
        if sources.pairs is not None and student_turn:  # DMD's regression
            drawn.z_ref, drawn.image_ref, drawn.y_ref = sources.take(sources.pairs, indices)
    return [SimpleNamespace(**{name: value[k:k + size] if torch.is_tensor(value) else value
                               for name, value in vars(drawn).items()})
            for k in range(0, share, size)]


def draw_for_teacher(drawn, config, step, sources, noise, indices, here, host_rng, mine):
    """Stage 0: real images, and the noise that such a teacher is trained with."""
    torch.manual_seed(here["generator"].initial_seed() + distributed.rank())    # for dropout
    drawn.seen = step * config.batch
    drawn.real, drawn.y_real = sources.take(sources.real, indices)
    drawn.sigma, drawn.eps = noise(sources.levels.trained)
    if config.caption_dropout:                          # for guidance: arXiv:2207.12598
        dropped = torch.rand(config.batch, 1, **here)[mine] < config.caption_dropout
        drawn.y_real = torch.where(dropped, sources.conditions.null, drawn.y_real)
    if config.augment:
        augmentation = draw_augmentation(config.batch, config.augment, host_rng)[mine]
        drawn.real, drawn.augment_labels = apply_augmentation(drawn.real, augmentation)
