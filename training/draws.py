"""What an iteration draws, for the whole batch and from (seed, iteration) alone, cut into parts."""

from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from base import distributed
from images.augment import apply_augmentation, draw_augmentation
from models import LOSSES, Conditions, Levels, sigma_grid, sigma_trained


class Sources(NamedTuple):
    """What an iteration draws from; the levels lie on the device that draws."""
    shape: tuple                # of x_t, without the batch
    levels: Levels
    conditions: Conditions
    real: object = None         # real images or their latents, where a loss needs them
    pairs: object = None        # the teacher's noise-image pairs, for DMD's regression


def seeded(seed, step, device):
    """A generator of (seed, iteration): a resumed run, or one on more processes, draws the same."""
    mixed = np.random.default_rng([seed, step]).integers(2 ** 32)
    return None if device == "meta" else torch.Generator(device).manual_seed(int(mixed))


def steps_trained(config, step):
    """How many steps the student takes here, the last of which is trained."""
    n = len(config.sigmas)
    if config.trained_step == "random":                 # one for the whole batch: DMD2 Sec. 4.5
        n = 1 + int(np.random.default_rng([config.seed, step, n]).integers(n))
    return n


def draw(config, step, sources):
    """Everything random of one iteration: the same tensors of the whole batch on every rank."""
    B, levels = config.batch, sources.levels
    count, on_host = sources.conditions.count, sources.conditions.on_host
    device = levels.table.device
    rng = seeded(config.seed, step, device.type)
    # Indices into files are drawn on the host, where the files are.
    host_rng = rng if device.type == "cpu" else seeded(config.seed, step, "cpu")
    file_index = partial(torch.randint, size=(B,), generator=host_rng)
    normal = partial(torch.randn, generator=rng, device=device)
    if config.stage == 0:
        return draw_for_teacher(config, step, sources, rng, host_rng, file_index, normal)

    student_turn, loss, n = (step % config.ttur == 0, LOSSES[config.loss],
                             steps_trained(config, step))
    drawn = {"sigmas": config.sigmas[:n], "seen": step // config.ttur * B,
             "z": normal(B, *sources.shape), "noises": normal(B, n - 1, *sources.shape),
             "index": None if not count else file_index(count) if on_host else torch.randint(
                 count, (B,), generator=rng, device=device),
             "sigma_adapted": loss.adapted_noise(levels, B, rng),
             "eps_adapted": normal(B, *sources.shape)}
    if student_turn:
        drawn |= {"sigma": loss.student_noise(levels, B, rng), "eps": normal(B, *sources.shape)}
    if sources.real is not None:                        # DMD2's GAN (Deviation 13)
        drawn["real_index"] = file_index(len(sources.real))
        for name in ("real", "fake", "gan") if student_turn else ("real", "fake"):
            drawn |= {f"sigma_{name}": sigma_grid(levels, B, rng),
                      f"eps_{name}": normal(B, *sources.shape)}
    if sources.pairs is not None and student_turn:      # DMD's regression
        drawn["pair_index"] = file_index(len(sources.pairs))
    return drawn


def draw_for_teacher(config, step, sources, rng, host_rng, file_index, normal):
    """Stage 0: real images, and the noise that such a teacher is trained with."""
    if rng:
        torch.manual_seed(rng.initial_seed() + distributed.rank())          # for dropout
    drawn = {"real_index": file_index(len(sources.real)),
             "sigma": sigma_trained(sources.levels, config.batch, rng),
             "eps": normal(config.batch, *sources.shape), "seen": step * config.batch}
    if config.augment:
        drawn["augment"] = draw_augmentation(config.batch, config.augment, host_rng)
    return drawn


def cut(drawn, config, sources, options):
    """This rank's share of the batch as parts of --batch-per-gpu images, with what they index."""
    device, conditions = sources.levels.table.device, sources.conditions
    share, size = config.batch // options.world_size, options.batch_per_gpu
    first = distributed.rank() * share

    def moved(tensor):                                  # without waiting for the copy
        pinned = tensor.pin_memory() if device.type == "cuda" else tensor
        return pinned.to(device, non_blocking=True)

    def embed(conditions, index):
        return conditions.embed(index if conditions.on_host else moved(index))

    parts = []
    for start in range(first, first + share, size):
        part = SimpleNamespace(**{name: value[start:start + size] if torch.is_tensor(value) else
                                  value for name, value in drawn.items()})
        if "index" in drawn:
            part.y = conditions.embed(part.index)
        if sources.real is not None:
            images, index = sources.real.take(part.real_index.tolist())
            part.real = sources.real.to_x(moved(images))
            part.y_real = embed(sources.real.conditions or conditions, index)
        if "augment" in drawn:
            part.real, part.augment_labels = apply_augmentation(part.real, part.augment)
        if "pair_index" in drawn:
            z_ref, image_ref, index = sources.pairs.take(part.pair_index.tolist())
            part.z_ref, part.image_ref = moved(z_ref), moved(image_ref).float()
            part.y_ref = embed(conditions, index)
        parts.append(part)
    return parts
