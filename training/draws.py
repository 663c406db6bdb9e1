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

    def moved(self, tensor):                            # without waiting for the copy
        device = self.levels.table.device
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device,
                                                                             non_blocking=True)

    def embed(self, index, of=None):
        conditions = of or self.conditions
        return conditions.embed(index if conditions.on_host else self.moved(index))


def seeded(seed, step, device):
    """A generator of (seed, iteration): a resumed run, or one on more processes, draws the same."""
    mixed = np.random.default_rng([seed, step]).integers(2 ** 32)
    return None if device == "meta" else torch.Generator(device).manual_seed(int(mixed))


def steps_trained(config, step):
    """How many steps the student takes, the last of which is trained: for the whole batch one."""
    n = len(config.sigmas)
    one = 1 + int(np.random.default_rng([config.seed, step, n]).integers(n)) if n else 0
    return one if config.trained_step == "random" else n                    # DMD2 Sec. 4.5


def draw(config, step, sources):
    """Everything random of one iteration: the same tensors of the whole batch on every rank."""
    B, levels, conditions = config.batch, sources.levels, sources.conditions
    device = levels.table.device
    rng = seeded(config.seed, step, device.type)
    # Indices into files are drawn on the host, where the files are.
    host_rng = rng if device.type == "cpu" else seeded(config.seed, step, "cpu")
    normal = partial(torch.randn, generator=rng, device=device)
    if config.stage == 0:
        return draw_for_teacher(config, step, sources, rng, host_rng, normal)

    n, loss = steps_trained(config, step), LOSSES[config.loss]
    where = (host_rng, "cpu") if conditions.on_host else (rng, device)
    drawn = {"sigmas": config.sigmas[:n], "seen": step // config.ttur * B,
             "z": normal(B, *sources.shape), "noises": normal(B, n - 1, *sources.shape),
             "index": conditions.count and torch.randint(conditions.count, (B,),
                                                         generator=where[0], device=where[1]),
             "sigma_adapted": loss.adapted_noise(levels, B, rng),
             "eps_adapted": normal(B, *sources.shape)}
    if step % config.ttur == 0:                         # the student's turn
        drawn |= {"sigma": loss.student_noise(levels, B, rng), "eps": normal(B, *sources.shape)}
    if sources.real is not None or sources.pairs is not None:
        draw_from_files(drawn, config, step, sources, rng, host_rng, normal)
    return drawn


def draw_from_files(drawn, config, step, sources, rng, host_rng, normal):
    """DMD2's GAN: real images, and noise of its own (Deviation 13); DMD's regression: pairs."""
    student_turn, B = step % config.ttur == 0, config.batch
    if sources.real is not None:
        drawn["real_index"] = torch.randint(len(sources.real), (B,), generator=host_rng)
        for name in ("real", "fake", "gan") if student_turn else ("real", "fake"):
            drawn |= {f"sigma_{name}": sigma_grid(sources.levels, B, rng),
                      f"eps_{name}": normal(B, *sources.shape)}
    if sources.pairs is not None and student_turn:
        drawn["pair_index"] = torch.randint(len(sources.pairs), (B,), generator=host_rng)


def draw_for_teacher(config, step, sources, rng, host_rng, normal):
    """Stage 0: real images, and the noise that such a teacher is trained with."""
    B = config.batch
    if rng:
        torch.manual_seed(rng.initial_seed() + distributed.rank())          # for dropout
    drawn = {"real_index": torch.randint(len(sources.real), (B,), generator=host_rng),
             "sigma": sigma_trained(sources.levels, B, rng), "eps": normal(B, *sources.shape),
             "seen": step * B}
    if config.caption_dropout:
        chance = torch.rand(B, 1, generator=rng, device=sources.levels.table.device)
        drawn["dropped"] = chance < config.caption_dropout
    if config.augment:
        drawn["augment"] = draw_augmentation(B, config.augment, host_rng)
    return drawn


def cut(drawn, config, sources, options):
    """This rank's share of the batch as parts of --batch-per-gpu images, with what they index."""
    share, size, parts = config.batch // options.world_size, options.batch_per_gpu, []
    begin = distributed.rank() * share
    for start in range(begin, begin + share, size):
        part = SimpleNamespace(**{name: value[start:start + size] if torch.is_tensor(value) else
                                  value for name, value in drawn.items()})
        if "index" in drawn:
            part.y = sources.conditions.embed(part.index)
        if "real_index" in drawn or "pair_index" in drawn:
            take_from_files(part, drawn, sources)
        parts.append(part)
    return parts


def take_from_files(part, drawn, sources):
    """Real images and pairs, and what they are of."""
    if "real_index" in drawn:
        images, index = sources.real.take(part.real_index.tolist())
        part.real = sources.real.to_x(sources.moved(images))
        part.y_real = sources.embed(index, sources.real.conditions)
    if "dropped" in drawn:                              # for guidance: arXiv:2207.12598
        part.y_real = torch.where(part.dropped, sources.conditions.null, part.y_real)
    if "augment" in drawn:
        part.real, part.augment_labels = apply_augmentation(part.real, part.augment)
    if "pair_index" in drawn:
        z_ref, image_ref, index = sources.pairs.take(part.pair_index.tolist())
        part.z_ref, part.image_ref = sources.moved(z_ref), sources.moved(image_ref).float()
        part.y_ref = sources.embed(index)
