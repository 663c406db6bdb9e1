"""What a run will cost: one iteration of it, run on tensors without data, and counted."""

import copy
import dataclasses
import itertools
import math
import weakref
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from images.real import Images
from metrics.judge import HEUN_STEPS
from models import Conditions, Guided
from training.draws import Sources, draw, steps_trained
from training.kept import Rows
from training.roles import Roles, assemble, store_frozen, trainable
from weights.checkpoint import untrained

# On a CPU, as measured: what glibc's heap leaves free between tensors, and what libraries load.
HOLES, FIRST_USE = 0.15, 40 * 2 ** 20
STATUS = Path("/proc/self/status")      # Linux alone has it
TOKENS = 77                             # of a prompt, as CLIP has them
TERAFLOPS = 40                          # a second of one GPU, at which hours are said; measured
                                        # ones are experiments.bench's


# ---- An iteration on the meta device: shapes alone, nothing is computed ----

class Pass(NamedTuple):
    """One pass of a network, as an iteration makes it."""
    role: str                   # teacher, previous, student, adapted; distance: the regression's
    batches: int                # stacked in this pass
    gradient: str               # "none"; "input": through frozen weights; "weights": into them
    output: str                 # "denoised", or the discriminator's "logits"


class Unmoved:
    """What AdamW holds of a network: two moments of each trained weight."""

    def __init__(self, network, keeps_gradients=False):
        self.param_groups = [{"params": list(network.parameters())}]
        self.found_inf, self.keeps_gradients = torch.zeros((), device="meta"), keeps_gradients
        self.moments = []

    def step(self):
        trained = [p for p in self.param_groups[0]["params"] if p.requires_grad]
        self.moments = self.moments or [torch.empty_like(p) for p in trained for _ in range(2)]

    def zero_grad(self, set_to_none):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = parameter.grad if self.keeps_gradients else None


def shapes_alone(network):
    """A network on the meta device that can be asked without a pipeline."""
    with torch.device("meta"):
        built = untrained(network).eval()
        if "unet" in network:
            width = TOKENS * built.text_width + sum(built.y_rest)
            built.conditions = Conditions(
                2 ** 20, lambda index: torch.empty(len(index), width, device="meta"),
                torch.empty(1, width), on_host=True)
            built.pixels = None
    return built


def passed(roles, name):
    """The network whose passes count as this role's: of a guided teacher, the one inside."""
    network = getattr(roles, name)
    return network.network if isinstance(network, Guided) else network


class Rehearsal:
    """A stage's networks and sources on the meta device, and the iteration that runs on them."""

    def __init__(self, iterate, config, network, precision="fp32"):
        self.iterate, self.config, self.passes = iterate, config, []
        with torch.device("meta"):
            teacher = shapes_alone(network)
            self.roles = roles = (assemble(config, teacher) if config.stage else
                                  Roles(trainable(teacher), copy.deepcopy(teacher)))
        roles.previous = roles.previous and copy.deepcopy(teacher)
        roles.distance = self.distance
        roles.student_ddp, roles.adapted_ddp = roles.student, roles.adapted
        for name in ("teacher", "previous", "student", "adapted"):
            if network := passed(roles, name):
                network.requires_grad_(name in ("student", "adapted"))
                network.register_forward_hook(self.hook(name), with_kwargs=True)
        roles.ema.requires_grad_(False)
        store_frozen(roles, precision)

        # Stand-ins for files: blank images, and one pair for all.
        shape, images, pair = teacher.shape, None, None
        if config.gan_weight or config.stage == 0:
            blank = np.zeros(shape, np.uint8)
            images = Images("blank", shape, np.zeros(2 ** 20, np.int64), lambda index: blank, 1)
        if config.regression_weight:
            row = np.zeros(1, [("z", np.float32, shape), ("image", np.float16, shape),
                               ("index", np.int64)])
            pair = Rows([np.broadcast_to(row, config.regression_pairs)], config.regression_pairs)
        self.sources = Sources(shape, teacher.levels.to("meta"), teacher.conditions, images, pair)

    def hook(self, role):
        def record(network, inputs, options, output):
            trained = any(p.requires_grad for p in network.parameters())
            gradient = ("none" if not torch.is_grad_enabled() else "weights" if trained else
                        "input" if inputs[0].requires_grad else "none")
            self.passes.append(Pass(role, len(inputs[0]), gradient,
                                    options.get("output", "denoised")))
        return record

    def distance(self, x, y):
        """In place of LPIPS, whose own memory and FLOPs are not counted."""
        self.passes.append(Pass("distance", len(x), "input", "denoised"))
        return (x - y).square().mean((1, 2, 3))

    def run(self, step, optimizers, world_size=1, batch_per_gpu=1, parts=1, autocast=nullcontext):
        """The passes of this iteration, of a few of a rank's parts."""
        share = SimpleNamespace(world_size=world_size, batch_per_gpu=batch_per_gpu)
        every_part = draw(self.config, step, self.sources, share)
        self.passes = []
        self.iterate(self.config, self.roles, optimizers, every_part[:parts],
                     step % self.config.ttur == 0, autocast)
        return self.passes

    def optimizers(self, keep_gradients=False):
        return [Unmoved(network, keep_gradients) for network in (self.roles.student,
                                                                  self.roles.adapted) if network]


def one_image(config):
    return dataclasses.replace(config, batch=1)


class Counted(NamedTuple):
    """Of one image, averaged over the run's iterations."""
    passes: Counter             # Pass -> how often
    flops: float                # what torch.utils.flop_counter knows: convolutions and products


def kinds(config):
    """(iteration, share of the run) for each kind: the step that is trained, whose turn it is."""
    turns = {True: -(-config.iterations // config.ttur) if config.stage else config.iterations}
    turns[False] = config.iterations - turns[True]
    steps = range(1, len(config.sigmas) + 1) if config.trained_step == "random" else [
        len(config.sigmas)]
    for turn, n in itertools.product((True, False), steps):
        if turns[turn]:
            yield next(step for step in itertools.count() if steps_trained(config, step) == n and (
                step % config.ttur == 0 or not config.stage) == turn), turns[turn] / len(steps)


def count(iterate, config, network):
    """The passes and FLOPs of a run for each image of its batch."""
    rehearsal = Rehearsal(iterate, one_image(config), network)
    passes, flops = Counter(), 0
    for step, times in kinds(config):
        with FlopCounterMode(display=False) as counter:
            for one in rehearsal.run(step, rehearsal.optimizers()):
                passes[one] += times
        flops += times * counter.get_total_flops()
    return Counted(passes, flops)


def forward_flops(network):
    """Of one image."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        built = shapes_alone(network)
        y = built.conditions.embed(torch.zeros(1, dtype=torch.long))
        built(torch.empty(1, *built.shape), torch.ones(1), y)
    return counter.get_total_flops()


def totals(config, counted):
    """Images through a forward and through a backward pass, over the whole run."""
    scored = 0
    if config.evaluate_every:
        scored = -(-config.iterations // config.evaluate_every) * config.evaluate_images
    if config.stage == 0:
        return {"updates": config.iterations, "images seen": config.iterations * config.batch,
                "images forward through a network to score": scored * (2 * HEUN_STEPS - 1)}

    def images(output, *gradients):
        return round(config.batch * sum(
            times * one.batches for one, times in counted.passes.items()
            if one.role != "distance" and one.output == output and one.gradient in gradients))

    found = {"student updates": -(-config.iterations // config.ttur),
             "adapted updates": config.iterations,
             "images generated": config.iterations * config.batch,
             "images forward through a network": images("denoised", "none", "input", "weights"),
             "images backward through a network": images("denoised", "input", "weights")}
    if config.gan_weight:
        found["images through the discriminator and back"] = images("logits", "input", "weights")
    return found | {
        "images forward through a network to score": scored * len(config.sigmas),
        "images forward through the teacher for pairs": bool(config.regression_weight)
        * config.regression_pairs * (2 * config.regression_steps - 1)
        * (1 if config.guidance == 1 else 2)}


# ---- Memory ----

class Kernels(TorchFunctionMode):
    """The meta device takes the kernels that a real one would: fused attention, bf16's casts."""

    CAST = (F.conv2d, F.conv_transpose2d, F.linear, F.scaled_dot_product_attention)

    def __init__(self, precision):
        super().__init__()
        self.bf16, self.copies = precision == "bf16", {}

    def cast(self, value):
        """As autocast: the bf16 copy of a trained weight is kept, any other made anew."""
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.bfloat16()
        return self.copies.setdefault(id(value), value.bfloat16())

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.bf16 and function in self.CAST:
            args = [self.cast(value) for value in args]
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return function(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that are made under it and still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.sizes = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs))
                  if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes and storage._cdata not in before:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def free(self, key):
        self.now -= self.sizes.pop(key)


def memory(iterate, config, network, batch_per_gpu, world_size=1, precision="fp32"):
    """Bytes by purpose for one process."""
    rehearsal = Rehearsal(iterate, config, network, precision)
    roles, parts = rehearsal.roles, config.batch // world_size // batch_per_gpu
    optimizers = rehearsal.optimizers(keep_gradients=world_size > 1)
    trained = [sum(4 * p.numel() for p in net.parameters())
               for net in (roles.student, roles.adapted) if net]
    if world_size > 1:                                  # DistributedDataParallel's buckets
        for optimizer in optimizers:
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.empty_like(parameter)
    with LiveBytes() as live:
        for _ in range(2):                              # AdamW's moments come with the first
            live.peak = live.now
            rehearsal.run(0, optimizers, world_size, batch_per_gpu, min(parts, 2),
                          lambda: Kernels(precision))
    moments = sum(4 * moment.numel() for one in optimizers for moment in one.moments)
    gradients = sum(trained) if world_size > 1 else max(trained)
    alive = live.peak - moments - (0 if world_size > 1 else gradients)
    sizes = {"trained weights": sum(trained), "moving average": trained[0],
             "Adam states": moments, "gradients": gradients,
             "activations and noise beside them": max(alive, 0)}
    if config.stage:
        frozen = sum(p.numel() * p.element_size() for net in (roles.teacher, roles.previous) if net
                     for p in net.parameters())
        sizes["teacher and previous student"] = frozen
    return sizes


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
    """Most bytes of a run's folder by purpose, but for pictures."""
    newest = sizes["trained weights"] + sizes["moving average"] + sizes["Adam states"]
    found = {"checkpoints": 3 * newest + sizes["trained weights"]}      # a third while it is saved
    if config.regression_weight:                        # z in float32, image in float16, class
        found["noise-image pairs"] = config.regression_pairs * (6 * math.prod(shape) + 8)
    return found


# ---- What --dry-run prints ----

def report(iterate, stage):
    config, options = stage.config, stage.options
    network = options.network
    parts = config.batch // options.world_size // options.batch_per_gpu
    sizes = memory(iterate, config, network, options.batch_per_gpu, options.world_size,
                   options.precision)
    total = math.fsum(sizes.values())
    counted = count(iterate, config, network)
    lines = [f"  {name}: {value}" for name, value in vars(config).items()]
    lines += [f"{name}: {value:,}" for name, value in totals(config, counted).items()]
    flops = counted.flops * config.batch
    hours = flops / (TERAFLOPS * 1e12 * options.world_size) / 3600
    lines += [f"parameters of the network: {sizes['moving average'] // 4:,}",
              f"FLOPs of all iterations: {flops:.3g}; at {TERAFLOPS} TFLOP/s a GPU, without "
              f"evaluations: {hours:.3g} hours"]
    lines += [f"disk space, {name}: {size / 2**20:,.0f} MiB"
              for name, size in disk(config, sizes, shapes_alone(network).shape).items()]
    lines += [f"processes: {options.world_size}, each {parts} part(s) of {options.batch_per_gpu} "
              "images an iteration"]
    lines += [f"memory, {name}: {size / 2**20:,.0f} MiB" for name, size in sizes.items()]
    lines += [f"memory, all tensors of one process: {total / 2**20:,.0f} MiB"]
    on_cpu = options.device == "cpu" or not (options.device or torch.cuda.is_available())
    if on_cpu and (whole := process_memory(total)):
        lines += ["memory, one whole process, with Python, libraries and the heap's holes: "
                  f"{whole / 2**20:,.0f} MiB"]
    return "\n".join(lines)
