"""What a run will cost: one iteration of it, run on tensors without data, and counted."""

import itertools
import math
import os
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from base.files import ROOT
from metrics.judge import HEUN_STEPS, lacks_reference
from training.draws import steps_trained
from training.plan import How, by_gpus, disk, process_memory, rehearsed
from training.rehearsal import Rehearsal, Remembered, shapes_alone
from training.roles import check_teacher, load_teacher
from weights.pipeline import teacher_configuration

GPUS = (2, 3, 4, 8, 64)                 # for which a plan of text to image says what one takes
TERAFLOPS = 40                          # a second of one GPU, at which hours are said; measured
                                        # ones are experiments.bench's


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
    rehearsal = Rehearsal(iterate, replace(config, batch=1), network)
    passes, flops = Counter(), 0
    for step, times in kinds(config):
        with Remembered(), FlopCounterMode(display=False) as counter:
            for one in rehearsal.run(step, rehearsal.optimizers()):
                passes[one] += times
        flops += times * counter.get_total_flops()
    return Counted(passes, flops)


def forward_flops(network):
    """Of one image."""
    with torch.device("meta"), Remembered(), FlopCounterMode(display=False) as counter:
        built = shapes_alone(network)
        y = built.conditions.embed(torch.zeros(1, dtype=torch.long))
        built(torch.empty(1, *built.shape), torch.ones(1), y)
    return counter.get_total_flops()


def pair_passes(config):
    """Of the teacher, before the first iteration of DMD."""
    one = (2 * config.regression_steps - 1) * (1 if config.guidance == 1 else 2)
    return bool(config.regression_weight) * config.regression_pairs * one


def totals(config, counted, scores=True):
    """Images through a forward and through a backward pass, over the whole run."""
    scored = 0
    if config.evaluate_every and scores:
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
        "images forward through the teacher for pairs": pair_passes(config)}


# ---- What --dry-run prints ----

def network_of(config, options):
    """The teacher's own where it is here, and a UserError as of the run; else the data set's."""
    here = [path for path in (config.teacher, ROOT / config.teacher) if os.path.exists(path)]
    text = "unet" in options.network
    if not ((config.stage or text) and here):           # stage 0 of text goes on from a pipeline
        return options.network
    if text and os.path.exists(os.path.join(here[0], "model_index.json")):
        return teacher_configuration(here[0])
    network = load_teacher(config, options, torch.device("cpu")).network
    check_teacher(config, network)
    return network.config


def report(iterate, stage):
    config, options = stage.config, stage.options
    network = network_of(config, options)
    parts = config.batch // options.world_size // options.batch_per_gpu
    on_cpu = options.device == "cpu" or not (options.device or torch.cuda.is_available())
    how = How(options.batch_per_gpu, options.world_size, options.precision, options.shard,
              options.recompute, options.ema_on_host, not on_cpu)
    plan = rehearsed(iterate, config, network, how)
    sizes, whole = plan(how), plan(how._replace(shard=False, ema_on_host=False))
    total = math.fsum(sizes.values())
    counted = count(iterate, config, network)
    lines = [f"  {name}: {value}" for name, value in vars(config).items()]
    lines += [f"{name}: {value:,}" for name, value in totals(
        config, counted, not lacks_reference(config, options)).items()]
    flops = counted.flops * config.batch
    hours = flops / (TERAFLOPS * 1e12 * options.world_size) / 3600
    lines += [f"parameters of the {'adapters' if config.lora else 'network'}: "
              f"{whole['moving average'] // 4:,}",
              f"FLOPs of all iterations: {flops:.3g}; at {TERAFLOPS} TFLOP/s a GPU, without "
              f"evaluations: {hours:.3g} hours"]
    lines += [f"disk space, {name}: {size / 2**20:,.0f} MiB"
              for name, size in disk(config, whole, shapes_alone(network).shape).items()]
    lines += [f"processes: {options.world_size}, each {parts} part(s) of {options.batch_per_gpu} "
              "images an iteration"]
    lines += [f"memory, {name}: {size / 2**20:,.0f} MiB" for name, size in sizes.items()]
    lines += [f"memory, all tensors of one process: {total / 2**20:,.0f} MiB"]
    if on_cpu and (process := process_memory(total)):
        lines += ["memory, one whole process, with Python, libraries and the heap's holes: "
                  f"{process / 2**20:,.0f} MiB"]
    if "unet" in network:
        on_gpus = how._replace(on_gpu=options.device != "cpu")
        lines += [f"memory, all tensors of one of {n} processes, with one pass of so many images: "
                  f"{size / 2**20:,.0f} MiB"
                  for _, n, size in by_gpus(iterate, config, network, [on_gpus], GPUS)]
        if not config.stage:
            lines += ["The text encoder, which learns with the U-Net, comes on top of all these."]
    return "\n".join(lines)
