"""What a run will cost: updates, images, network passes, memory."""

from functools import partial

import torch

from edm_networks import EDMPrecond
from losses import (denoising_loss, dm_loss, gan_adapted_loss, gan_student_loss, sid_loss,
                    unforget_loss)
from models import AdaptedWithHead, denoise_together


def passes(config):
    """Images through a forward and through a backward pass, over the whole run."""
    scored = 0
    if config.evaluate_every:
        scored = -(-config.iterations // config.evaluate_every) * config.evaluate_images
    if config.stage == 0:
        return {"updates": config.iterations, "images seen": config.iterations * config.batch,
                "images forward through a network to score": scored * 35}
    turns = -(-config.iterations // config.ttur)
    n = len(config.sigmas) if config.trained_step == "last" else (len(config.sigmas) + 1) / 2
    earlier = n - 1 if config.unforget_weight else 0
    distill = 0 if config.loss == "none" else 2
    forward = config.iterations * (n + 1) + turns * (distill + earlier * (
        1 if config.external_sampling else 2) + bool(config.regression_weight))
    backward = config.iterations + turns * (1 + earlier + (distill if config.loss == "sid" else 0)
                                            + bool(config.regression_weight))
    return {"student updates": turns, "adapted updates": config.iterations,
            "images generated": config.iterations * config.batch,
            "images forward through a network": round(forward * config.batch),
            "images backward through a network": round(backward * config.batch),
            "images forward through a network to score": scored * len(config.sigmas),
            "images forward through the teacher for pairs": config.regression_pairs * (
                2 * config.regression_steps - 1) if config.regression_weight else 0}


class SavedBytes:
    """Bytes that autograd keeps for the backward pass, each storage once, weights left out."""

    def __init__(self, modules):
        self.weights = {p.untyped_storage()._cdata for m in modules for p in m.parameters()}
        self.seen = {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.seen[storage._cdata] = (storage.nbytes(), tensor)   # kept, so that no id is reused
        return tensor

    def total(self):
        return sum(size for size, _ in self.seen.values())


def memory(config, network_config, batch_per_gpu):
    """Bytes by purpose for one process, counted on the meta device: nothing is computed."""
    with torch.device("meta"):
        student, teacher = EDMPrecond(**network_config), EDMPrecond(**network_config)
        adapted = EDMPrecond(**network_config)
        adapted = AdaptedWithHead(adapted) if config.gan_weight else adapted
        x = torch.empty(batch_per_gpu, *student.image_shape)
        y = torch.empty(len(x), student.label_dim) if student.label_dim else None
        sigma = torch.empty(len(x), 1, 1, 1)
        weights = 4 * sum(p.numel() for p in student.parameters())
        if config.stage == 0:
            with SavedBytes([student]) as activations:
                denoising_loss(x, sigma, x, y, adapted=student)
            return {"weights and moving average": 2 * weights, "gradients": weights,
                    "Adam states": 2 * weights, "activations of one part": activations.total()}
        turns = student_turn(config, student, teacher, adapted, x, sigma, y), adapted_turn(
            config, adapted, x, sigma, y)
    n, trained = len(config.sigmas), weights + 4 * sum(p.numel() for p in adapted.parameters())
    previous = n > 1 and config.method == "pmdd" and (
        config.external_sampling or config.unforget_weight > 0)
    return {"student and adapted weights": trained,
            "teacher and previous student": weights * (2 if previous else 1),
            "moving average": weights, "gradients": trained, "Adam states": 2 * trained,
            "activations of one part": max(turns)}


def student_turn(config, student, teacher, adapted, x, sigma, y):
    """Activations of a student update; of DMD's regression without those of LPIPS itself."""
    for frozen in (teacher, adapted):
        frozen.requires_grad_(False)
    with SavedBytes([student, adapted, teacher]) as kept:
        n = len(config.sigmas)
        first = 0 if config.unforget_weight else n - 1
        *earlier, x0 = denoise_together(student, [x] * (n - first), config.sigmas[first:], y)
        distill = {"dm": partial(dm_loss, weighting=config.dm_weighting),
                   "sid": partial(sid_loss, alpha=config.alpha)}.get(config.loss)
        graph = [unforget_loss(earlier, earlier)]
        if distill:
            graph.append(distill(x0, sigma, x, y, teacher=teacher, adapted=adapted))
        if config.gan_weight:
            graph.append(gan_student_loss(x0, sigma, x, y,
                                          discriminator=partial(adapted, output="logits")))
        if config.regression_weight:
            graph.append(student(x, sigma, y))
    return kept.total()


def adapted_turn(config, adapted, x, sigma, y):
    adapted.requires_grad_(True)
    with SavedBytes([adapted]) as kept:
        graph = [denoising_loss(x, sigma, x, y, adapted=adapted)]
        if config.gan_weight:
            graph.append(gan_adapted_loss(x, x, sigma, x, sigma, x, y, y,
                                          discriminator=partial(adapted, output="logits")))
    return kept.total()


def report(config, network_config, batch_per_gpu, world_size):
    """The lines that --dry-run prints."""
    lines = [f"{name}: {value:,}" for name, value in passes(config).items()]
    sizes = memory(config, network_config, batch_per_gpu)
    parts = config.batch // world_size // batch_per_gpu
    lines += [f"processes: {world_size}, each {parts} part(s) of {batch_per_gpu} images an "
              "iteration"]
    lines += [f"memory, {name}: {size / 2**20:,.0f} MiB" for name, size in sizes.items()]
    return lines + [f"memory, all of one process: {sum(sizes.values()) / 2**20:,.0f} MiB"]
