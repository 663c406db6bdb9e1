"""Images that depend on nothing but their seeds: the same bits in any company, on any cores."""

from functools import partial

import torch

from base.devices import compile_network, set_precision
from base.distributed import say
from base.errors import UserError
from models import sample_every_step, sample_heun, sample_seeds


def prepare(network, device, precision="fp32", compiled=False):
    set_precision(precision)
    network.to(device).requires_grad_(False)
    if device.type == "cuda" and precision != "fp32":       # the layout of tensor cores
        network.to(memory_format=torch.channels_last)
    if compiled:
        say("compiling the network: the first images can take minutes")
        compile_network(network, dynamic=False)
    return network


def pass_size(network, device):
    """Images of one pass, always: kernels choose their order of summation by shape."""
    pixels = 2 ** 12 if device.type == "cpu" else 2 ** 16 if network.conditions.on_host else 2 ** 18
    return max(1, min(1024, pixels // (network.shape[1] * network.shape[2])))


def seed_blocks(seeds, network, device):
    size = max(16, pass_size(network, device))
    return [seeds[start:start + size] for start in range(0, len(seeds), size)]


def every_step(sigmas):
    """A student's sampler: the images after 1, 2, .. steps, of one roll-out."""
    return partial(sample_every_step, sigmas=sigmas)


def heun(steps, **churn):
    """A teacher's sampler: a list like a student's, of one."""
    return lambda *inputs: [sample_heun(*inputs, steps=steps, **churn)]


def choose_classes(labels, seeds, classes):
    """One class for each seed, or None: "random", "balanced", or one class for all."""
    if not classes or labels == "random":
        return None
    return [seed % classes if labels == "balanced" else labels for seed in seeds]


def sample_block(network, seeds, sampler, asked, device, precision="fp32"):
    """uint8 [B,C,H,W] for each list element of the sampler, and the index of what was asked for.

    asked: one for each seed; None: drawn from the seed itself, as EDM does.
    """
    size, parts = pass_size(network, device), []

    def padded(values, start):
        chunk = list(values[start:start + size])
        return chunk + chunk[-1:] * (size - len(chunk))

    for start in range(0, len(seeds), size):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            images, index = sample_seeds(network, padded(seeds, start), sampler,
                                         asked and padded(asked, start), device)
        kept = min(size, len(seeds) - start)
        if not all(x0.isfinite().all() for x0 in images):
            raise UserError(f"the images of seeds {seeds[start]} to {seeds[start + kept - 1]} are "
                            "not finite: the network's weights are damaged, or of a run that "
                            "diverged; use another checkpoint")
        parts.append([network.pixels(x0[:kept]) for x0 in images]
                     + ([] if index is None else [index[:kept]]))
    joined = [torch.cat(part) for part in zip(*parts)]
    return (joined, None) if index is None else (joined[:-1], joined[-1])
