"""What a run will cost: updates, images, network passes, memory, FLOPs."""

import math
import weakref
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from edm_networks import EDMPrecond
from losses import (denoising_loss, dm_loss, gan_adapted_loss, gan_student_loss, sid_loss,
                    unforget_loss)
from models import AdaptedWithHead, denoise_together, roll_out


# ---- Network passes: the limit of an iteration ----

class Pass(NamedTuple):
    """One pass that an iteration cannot do without."""
    role: str                   # teacher, previous, student, adapted; distance: the regression's
    batches: int = 1            # stacked in this pass
    gradient: str = "none"      # "input": through frozen weights; "weights": into the weights
    output: str = "denoised"    # or the discriminator's "logits"


def has_previous(config):
    """Whether a frozen student of the stage before takes part."""
    begins = config.start_from or (config.method == "pmdd" and config.stage > 1)
    return bool(begins and len(config.sigmas) > 1 and config.trained_step == "last"
                and (config.external_sampling or config.unforget_weight))


def iteration_passes(config, n, student_turn):
    """The passes of one iteration that trains step n, for each part of its batch."""
    if config.stage == 0:
        return [Pass("student", gradient="weights")]
    external = has_previous(config) and config.external_sampling
    unforget = has_previous(config) and config.unforget_weight > 0
    passes = [Pass("previous" if external else "student")] * (n - 1)        # the roll-out
    if student_turn:
        passes.append(Pass("student", n if unforget else 1, "weights"))
        if config.loss != "none":
            gradient = "input" if config.loss == "sid" else "none"
            passes += [Pass("teacher", 1, gradient), Pass("adapted", 1, gradient)]
        if unforget and not external:
            passes.append(Pass("previous", n - 1))
        if config.gan_weight:
            passes.append(Pass("adapted", 1, "input", "logits"))
        if config.regression_weight:
            passes += [Pass("student", 1, "weights"), Pass("distance", 1, "input")]
    else:
        passes.append(Pass("student"))
    passes.append(Pass("adapted", 1, "weights"))
    if config.gan_weight:
        passes.append(Pass("adapted", 2, "weights", "logits"))
    return passes


def run_passes(config):
    """How often each pass is made in the whole run, for the whole batch."""
    steps = [len(config.sigmas)]
    if config.trained_step == "random":                     # each equally often
        steps = range(1, len(config.sigmas) + 1)
    turns = -(-config.iterations // config.ttur) if config.stage else config.iterations
    counts = Counter()
    for n in steps:
        for turn, times in ((True, turns), (False, config.iterations - turns)):
            for one in iteration_passes(config, n, turn):
                counts[one] += times / len(steps)
    return counts


def passes(config):
    """Images through a forward and through a backward pass, over the whole run."""
    scored = 0
    if config.evaluate_every:
        scored = -(-config.iterations // config.evaluate_every) * config.evaluate_images
    if config.stage == 0:
        return {"updates": config.iterations, "images seen": config.iterations * config.batch,
                "images forward through a network to score": scored * 35}
    counts = run_passes(config)

    def images(output, *gradients):
        return round(config.batch * sum(
            times * one.batches for one, times in counts.items()
            if one.role != "distance" and one.output == output and one.gradient in gradients))

    figures = {"student updates": -(-config.iterations // config.ttur),
               "adapted updates": config.iterations,
               "images generated": config.iterations * config.batch,
               "images forward through a network": images("denoised", "none", "input", "weights"),
               "images backward through a network": images("denoised", "input", "weights")}
    if config.gan_weight:
        figures["images through the discriminator and back"] = images("logits", "input", "weights")
    return figures | {
        "images forward through a network to score": scored * len(config.sigmas),
        "images forward through the teacher for pairs": config.regression_pairs * (
            2 * config.regression_steps - 1) if config.regression_weight else 0}


# ---- Memory and FLOPs, counted on the meta device: nothing is computed ----

# On a CPU, as measured: what glibc's heap leaves free between tensors, and what libraries load.
HOLES, FIRST_USE = 0.15, 40 * 2 ** 20
STATUS = Path("/proc/self/status")      # Linux alone has it


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

    def __init__(self, *modules):
        super().__init__()
        before = [t for m in modules for p in m.parameters() for t in (p, p.grad) if t is not None]
        before += [b for m in modules for b in m.buffers()]
        self.now = self.peak = 0
        self.sizes = {t.untyped_storage()._cdata: 0 for t in before}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def free(self, key):
        self.now -= self.sizes.pop(key)


def memory(config, network_config, batch_per_gpu, world_size=1, precision="fp32"):
    """Bytes by purpose for one process."""
    parts = config.batch // world_size // batch_per_gpu
    with torch.device("meta"):
        student, teacher, adapted, previous = (EDMPrecond(**network_config).eval()
                                               for _ in range(4))
        adapted = AdaptedWithHead(adapted) if config.gan_weight else adapted
    own, taught = (4 * sum(p.numel() for p in network.parameters())
                   for network in (student, adapted))
    teacher.requires_grad_(False)
    previous.requires_grad_(False)
    if world_size > 1 or parts > 1:                     # gradients that stay while a part runs
        for network in (student, adapted):
            for parameter in network.parameters():
                parameter.grad = torch.empty_like(parameter)

    def peak(turn, *arguments):
        with LiveBytes(student, teacher, adapted, previous) as live, Kernels(precision):
            with torch.device("meta"):
                drawn = draws(config, network_config, batch_per_gpu)
            turn(config, *arguments, drawn, min(parts, 2))
            del drawn
        return live.peak

    if config.stage == 0:
        turns = [peak(teacher_turn, student)]
        trained, frozen, gradients = own, {}, own
    else:
        source = previous if has_previous(config) and config.external_sampling else student
        turns = [peak(student_turn, student, teacher, adapted, previous, source),
                 peak(adapted_turn, adapted)]
        trained, gradients = own + taught, own + taught if world_size > 1 else max(own, taught)
        frozen = {"teacher and previous student": own * (2 if has_previous(config) else 1)}
    held = gradients if world_size > 1 or parts > 1 else 0
    return {"trained weights": trained, **frozen, "moving average": own, "Adam states": 2 * trained,
            "gradients": gradients, "activations and noise beside them":
                max(max(turns) + held - gradients, 0)}


def process_bytes(name):
    """VmRSS is what this process holds now, VmHWM the most it ever held. None: nobody knows."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    found = next((line for line in lines if line.startswith(name)), None)
    return found and 1024 * int(found.split()[1])


def process_memory(tensors):
    """Bytes of the whole process, on a CPU, if all its tensors take so many."""
    now = process_bytes("VmRSS")
    return now and now + FIRST_USE + (1 + HOLES) * tensors


def draws(config, network_config, batch_per_gpu):
    """What is drawn for the whole batch, and the part of it that one pass takes."""
    size, channels = network_config["img_resolution"], network_config["img_channels"]
    classes, n = network_config["label_dim"], max(len(config.sigmas), 1)
    noise = n + 2 + 3 * bool(config.gan_weight) if config.stage else 1
    whole = [torch.empty(config.batch, channels, size, size) for _ in range(noise)]
    x = whole[0][:batch_per_gpu]
    y = torch.empty(config.batch, classes)[:batch_per_gpu] if classes else None
    return whole, x, torch.empty(batch_per_gpu, 1, 1, 1), y


def student_turn(config, student, teacher, adapted, previous, source, drawn, parts):
    """A student update as in train.py; of DMD's regression without LPIPS's own activations."""
    _, x, sigma, y = drawn
    n, unforget = len(config.sigmas), has_previous(config) and config.unforget_weight > 0
    first, distill = 0 if unforget else n - 1, {
        "dm": partial(dm_loss, weighting=config.dm_weighting),
        "sid": partial(sid_loss, alpha=config.alpha)}.get(config.loss)
    adapted.requires_grad_(False)
    generated = []
    for _ in range(parts):
        inputs, targets = roll_out(source, x, y, config.sigmas, [x] * (n - 1))
        *earlier, x0 = denoise_together(student, inputs[first:], config.sigmas[first:], y)
        generated.append(x0.detach())
        loss = 0 * x0.sum() + unforget_loss(earlier, targets)
        if distill:
            loss = loss + distill(x0, sigma, x, y, teacher=teacher, adapted=adapted)
        if unforget and source is not previous:
            with torch.no_grad():
                denoise_together(previous, inputs[:-1], config.sigmas[:-1], y)
        if config.gan_weight:
            loss = loss + gan_student_loss(x0, sigma, x, y,
                                           discriminator=partial(adapted, output="logits"))
        if config.regression_weight:
            loss = loss + student(x, sigma, y).mean()
        loss.backward()
    adapted.requires_grad_(True)


def adapted_turn(config, adapted, drawn, parts):
    _, x, sigma, y = drawn
    for _ in range(parts):
        loss = denoising_loss(x, sigma, x, y, adapted=adapted)
        if config.gan_weight:
            loss = loss + gan_adapted_loss(x, x, sigma, x, sigma, x, y, y,
                                           discriminator=partial(adapted, output="logits"))
        loss.backward()


def teacher_turn(config, student, drawn, parts):
    _, x, sigma, y = drawn
    for _ in range(parts):
        denoising_loss(x, sigma, x, y, adapted=student.train()).backward()


def flops(network_config, one):
    """Floating-point operations of a pass for one image; a multiplication and an addition are two.

    Of what torch.utils.flop_counter knows: convolutions and products of matrices.
    """
    with torch.device("meta"):
        network = EDMPrecond(**network_config).eval()
        if one.output == "logits":
            network = AdaptedWithHead(network)
        x = torch.empty(1, *getattr(network, "network", network).image_shape)
        sigma, classes = torch.empty(1, 1, 1, 1), network_config["label_dim"]
        y = torch.empty(1, classes) if classes else None
    network.requires_grad_(one.gradient == "weights")
    with FlopCounterMode(display=False) as counter:
        with torch.set_grad_enabled(one.gradient != "none"):
            x = x.requires_grad_() if one.gradient == "input" else x
            out = network(x, sigma, y, **({"output": "logits"} if one.output == "logits" else {}))
        if one.gradient != "none":
            out.sum().backward()
    return one.batches * counter.get_total_flops()


def iteration_flops(config, network_config):
    """Of an iteration's passes for the whole batch, on average; without the regression's LPIPS."""
    per_pass = {one: times / config.iterations for one, times in run_passes(config).items()
                if one.role != "distance"}
    return config.batch * sum(times * flops(network_config, one)
                              for one, times in per_pass.items())


def report(config, network_config, batch_per_gpu, world_size, precision="fp32", device="cpu"):
    """The lines that --dry-run prints."""
    lines = [f"{name}: {value:,}" for name, value in passes(config).items()]
    sizes = memory(config, network_config, batch_per_gpu, world_size, precision)
    parts = config.batch // world_size // batch_per_gpu
    lines += [f"processes: {world_size}, each {parts} part(s) of {batch_per_gpu} images an "
              "iteration"]
    lines += [f"memory, {name}: {size / 2**20:,.0f} MiB" for name, size in sizes.items()]
    total = math.fsum(sizes.values())
    lines += [f"memory, all tensors of one process: {total / 2**20:,.0f} MiB"]
    if device == "cpu" and (whole := process_memory(total)):
        lines += ["memory, one whole process, with Python, libraries and the heap's holes: "
                  f"{whole / 2**20:,.0f} MiB"]
    return lines
