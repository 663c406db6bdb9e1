"""What a run will cost: updates, images, network passes, memory."""

from functools import partial

import torch

from edm_networks import EDMPrecond
from losses import denoising_loss, dm_loss, sid_loss, unforget_loss
from models import AdaptedWithHead, denoise_together


def passes(config):
    """Images through a forward and through a backward pass, over the whole run."""
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
            "images backward through a network": round(backward * config.batch)}


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
        for frozen in (teacher, adapted):
            frozen.requires_grad_(False)
        n, B = len(config.sigmas), batch_per_gpu
        z = torch.empty(B, *student.image_shape)
        y = torch.empty(B, student.label_dim) if student.label_dim else None
        sigma = torch.empty(B, 1, 1, 1)

        with SavedBytes([student, adapted, teacher]) as student_turn:
            first = 0 if config.unforget_weight else n - 1
            *earlier, x0 = denoise_together(student, [z] * (n - first), config.sigmas[first:], y)
            distill = {"dm": partial(dm_loss, weighting=config.dm_weighting),
                       "sid": partial(sid_loss, alpha=config.alpha)}.get(config.loss)
            if distill:
                kept = distill(x0, sigma, z, y, teacher=teacher, adapted=adapted)
            kept = (kept if distill else 0) + unforget_loss(earlier, earlier)
        adapted.requires_grad_(True)
        with SavedBytes([student, adapted, teacher]) as adapted_turn:
            denoising_loss(z, sigma, z, y, adapted=adapted)

    weights = sum(p.numel() for p in student.parameters()) * 4
    trained = weights + sum(p.numel() for p in adapted.parameters()) * 4
    frozen = weights * (2 if config.unforget_weight or n > 1 and config.external_sampling
                        and config.trained_step == "last" else 1)
    return {"student and adapted weights": trained, "teacher and previous student": frozen,
            "moving average": weights, "gradients": trained, "Adam states": 2 * trained,
            "activations of one part": max(student_turn.total(), adapted_turn.total())}


def report(config, network_config, batch_per_gpu, world_size):
    """The lines that --dry-run prints."""
    lines = [f"{name}: {value:,}" for name, value in passes(config).items()]
    sizes = memory(config, network_config, batch_per_gpu)
    parts = config.batch // world_size // batch_per_gpu
    lines += [f"processes: {world_size}, each {parts} part(s) of {batch_per_gpu} images an "
              "iteration"]
    lines += [f"memory, {name}: {size / 2**20:,.0f} MiB" for name, size in sizes.items()]
    return lines + [f"memory, all of one process: {sum(sizes.values()) / 2**20:,.0f} MiB"]
