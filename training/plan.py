"""What a run takes of a process's memory, by purpose, and of the disk."""

import dataclasses
import itertools
import math
import weakref
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from training.rehearsal import Rehearsal, Remembered, storages, tensors

# On a CPU, as measured: what glibc's heap leaves free between tensors, and what libraries load.
HOLES, FIRST_USE = 0.15, 40 * 2 ** 20
STATUS = Path("/proc/self/status")      # Linux alone has it
ACTIVATIONS = "activations and noise beside them"


class Kernels(TorchFunctionMode):
    """The meta device takes the kernels that a real one would: fused attention, bf16's casts."""

    CAST = (F.conv2d, F.conv_transpose2d, F.linear, F.scaled_dot_product_attention)
    NORMS = (F.group_norm, F.layer_norm)    # which autocast brings to fp32 on a GPU, not on a CPU

    def __init__(self, precision, cache=True, on_gpu=False):
        super().__init__()
        self.bf16, self.cache, self.copies = precision == "bf16", cache, {}
        self.on_gpu = on_gpu

    def cast(self, value):
        """As autocast: the bf16 copy of a trained weight is kept, any other made anew."""
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        if not (self.cache and value.is_leaf and value.requires_grad):
            return value.bfloat16()
        if id(value) not in self.copies:
            self.copies[id(value)] = value.bfloat16()
        return self.copies[id(value)]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.bf16 and function in self.CAST:
            args = [self.cast(value) for value in args]
        if self.bf16 and self.on_gpu and function in self.NORMS:
            args = [value.float() if isinstance(value, torch.Tensor) else value for value in args]
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return function(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that are made under it and still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.sizes = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = storages((args, kwargs))
        result = function(*args, **(kwargs or {}))
        for tensor in tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes and storage._cdata not in before:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def free(self, key):
        self.now -= self.sizes.pop(key)


class How(NamedTuple):
    """What the memory of a process depends on beside the preset."""
    batch_per_gpu: int
    world_size: int = 1
    precision: str = "fp32"
    shard: bool = False
    recompute: bool = False
    ema_on_host: bool = False
    on_gpu: bool = False


def memory(iterate, config, network, *how, **more):
    """Bytes by purpose for one process."""
    how = How(*how, **more)
    return rehearsed(iterate, config, network, how)(how)


def rehearsed(iterate, config, network, how):
    """(how, config) -> bytes by purpose, where the activations are those of this iteration."""
    rehearsal = Rehearsal(iterate, config, network, how.precision, how.recompute)
    roles, parts = rehearsal.roles, config.batch // how.world_size // how.batch_per_gpu
    several = how.world_size > 1
    optimizers = rehearsal.optimizers(keep_gradients=several)
    for optimizer in optimizers:
        optimizer.step()                                # AdamW's moments come with its first
        if several:                                     # DistributedDataParallel's buckets
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.empty_like(parameter)
    with Remembered(), LiveBytes() as live:
        rehearsal.run(0, optimizers, how.world_size, how.batch_per_gpu, min(parts, 2),
                      lambda: Kernels(how.precision, not how.shard, how.on_gpu))
    moments = sum(4 * moment.numel() for one in optimizers for moment in one.moments)
    gradients = 0 if several else max(map(weight_bytes, trained(roles)))
    alive = {ACTIVATIONS: max(live.peak - gradients, 0)}
    return lambda how, config=config: held(config, roles, moments, how) | alive


def by_gpus(iterate, config, network, hows, gpus):
    """(how, GPUs, bytes of one of them) for each, with one pass of so many images an iteration."""
    of = {}
    for how, n in itertools.product(hows, gpus):
        if how.shard and n == 1:
            continue
        kind = how._replace(world_size=min(n, 2), ema_on_host=False)    # what activations know
        batch = dataclasses.replace(config, batch=n * how.batch_per_gpu)
        if kind not in of:
            of[kind] = rehearsed(iterate, batch, network, kind)
        yield how, n, sum(of[kind](how._replace(world_size=n), batch).values())


def trained(roles):
    return [network for network in (roles.student, roles.adapted) if network]


def weight_bytes(network):
    return sum(p.numel() * p.element_size() for p in network.parameters())


def held(config, roles, moments, how):
    """What stays from one iteration to the next, and the gradients."""
    share, weights = how.world_size if how.shard else 1, [*map(weight_bytes, trained(roles))]
    gradients = sum(weights) if how.world_size > 1 and not how.shard else max(weights)
    accumulated = config.batch > how.world_size * how.batch_per_gpu
    sizes = {"trained weights": sum(weights) // share,
             "moving average": 0 if how.ema_on_host else weight_bytes(roles.ema) // share,
             "Adam states": moments // share,
             # Of several parts they wait whole for the last one, which sums them over the ranks.
             "gradients": gradients if accumulated else gradients // share}
    if how.shard:
        sizes["blocks that are whole"] = max(map(whole_blocks, trained(roles)))
    if roles.teacher:
        sizes["teacher and previous student"] = sum(
            weight_bytes(one) for one in (roles.teacher, roles.previous) if one) // share
    return sizes


def whole_blocks(network):
    """At most a block, the next one, and what is in no block; and gradients but for the next."""
    blocks = [*map(weight_bytes, network.blocks)]
    return 3 * max(blocks) + 2 * (weight_bytes(network) - sum(blocks))


def process_bytes(name):
    """VmRSS is what this process holds now, VmHWM the most it ever held. None: nobody knows."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    found = next((line for line in lines if line.startswith(name)), None)
    return found and 1024 * int(found.split()[1])


def process_memory(tensors):
    """Bytes of the whole process, on a CPU, if all its tensors take so many."""
    now = process_bytes("VmRSS")
    return now and now + FIRST_USE + (1 + HOLES) * tensors


def disk(config, sizes, shape):
    """Most bytes of a run's folder by purpose, but for pictures and latents of a GAN's images."""
    newest = sizes["trained weights"] + sizes["moving average"] + sizes["Adam states"]
    found = {"checkpoints": 3 * newest + sizes["trained weights"]}      # a third while it is saved
    if config.regression_weight:                        # z in float32, image in float16, class
        found["noise-image pairs"] = config.regression_pairs * (6 * math.prod(shape) + 8)
    return found
