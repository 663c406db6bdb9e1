"""How fast training, sampling and scoring are, against what they cannot do without.

    python -m experiments.bench                             digits, PMDD stages 1, 2, 3
    python -m experiments.bench --dataset cifar10 --stage 3 --loss dm --batch 8 --json scores.json
    python -m experiments.bench --dataset imagenet64 --precision bf16 --peak-tflops 312
    torchrun --nproc_per_node=2 -m experiments.bench --what train

The loop is train.py's own `iteration`, its draws and its log, on random weights. Its limit is the
network passes that `iteration` makes, alone, back to back, timed in turn with the loop's
iterations, so that other load on the machine meets both. Loop efficiency = limit / loop.
"""

import argparse
import math
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.distributed as dist

import train
from base import distributed
from base.devices import keep_freed_memory, set_precision
from base.errors import Parser, RunFailed, UserError, run
from base.files import write_json
from experiments.bench_files import make_job
from experiments.bench_sampling import random_inputs, sampling, scoring, seconds_of, spread
from metrics.lpips import LPIPS
from models import unguided
from training import cost, options as train_options, plan
from training.draws import draw, steps_trained
from training.log import Log
from training.passes import smallest
from training.roles import Before, load_roles

PARTS = ("train", "memory", "sampling", "scoring")


# ---- The loop, and the passes that it cannot do without ----

class Loop:
    """train.py's loop without evaluations and checkpoints, an iteration at a time."""

    def __init__(self, job, iterations):
        self.job, config, options = job, job.config, job.options
        self.roles = load_roles(config, options, job.device)
        self.optimizers = train.make_optimizers(config, self.roles, job.device)
        self.roles.wrap()
        if config.regression_weight:                    # LPIPS with random weights, but on digits
            self.roles.distance = (
                train.perceptual_distance("digits", None, job.device) if config.dataset == "digits"
                else LPIPS().to(job.device, memory_format=torch.channels_last))
        stop = SimpleNamespace(received=None)
        self.sources = train.open_sources(config, options, self.roles, job.device, stop)
        self.autocast = train.autocast_of(options, job.device)
        self.iterate = train.iteration_of(config)
        self.log = Log(config, options, job.device, Before(), stop)
        self.log.bar.total = iterations
        self.log.bar.set_description("loop and limit")

    def run(self, step):
        config, options = self.job.config, self.job.options
        train.set_rate(config, step, self.optimizers)
        parts = draw(config, step, self.sources, options)
        losses, images = self.iterate(config, self.roles, self.optimizers, parts,
                                      step % config.ttur == 0, self.autocast)
        self.log.take(step, losses, images)


class Limit:
    """The passes of each iteration on the loop's own networks; their inputs are made once."""

    def __init__(self, loop):
        self.loop, self.job, self.calls = loop, loop.job, {}
        self.rehearsal, self.passes = smallest(loop.iterate, loop.job.config), {}

    def run(self, step):
        """Seconds by part of the iteration."""
        config, options = self.job.config, self.job.options
        kind = steps_trained(config, step), step % config.ttur == 0
        if kind not in self.passes:
            self.passes[kind] = self.rehearsal.run(step, self.rehearsal.optimizers())
        parts = config.batch // options.world_size // options.batch_per_gpu
        seconds, adapted = Counter(), self.loop.roles.adapted
        for frozen in (True, False):                    # switched outside the time that counts
            if adapted is not None:
                adapted.requires_grad_(not frozen)
            for one in self.passes[kind]:
                if (one.gradient == "input") is frozen:
                    seconds[part_of(one)] += seconds_of(self.call(one, parts), self.job.device)
        return seconds

    def call(self, one, parts):
        """A function that makes the pass for each part."""
        if one not in self.calls:
            roles, size = self.loop.roles, one.batches * self.job.options.batch_per_gpu
            network = (roles.distance if one.role == "distance" else
                       unguided(getattr(roles, one.role)))
            x, sigma, y = random_inputs(roles.student, size, self.job.device)
            self.calls[one] = partial(self.make, parts, network, one, x,
                                      (-x,) if one.role == "distance" else (sigma, y))
        return self.calls[one]

    def make(self, parts, network, one, x, inputs):
        for _ in range(parts):
            self.make_once(network, one, x, inputs)

    def make_once(self, network, one, x, inputs):
        how = {"output": "logits"} if one.output == "logits" else {}
        x = x.detach().requires_grad_(one.gradient == "input")
        with self.loop.autocast(), torch.set_grad_enabled(one.gradient != "none"):
            out = network(x, *inputs, **how)
        if one.gradient != "none":
            into = x if one.gradient == "input" else [p for p in network.parameters()
                                                      if p.requires_grad]
            torch.autograd.grad(out, into, torch.ones_like(out), allow_unused=True)


def part_of(one):
    if one.role in ("previous", "student") and one.gradient == "none":
        return "roll-out"
    return "adapted update" if one.role == "adapted" and one.gradient == "weights" else (
        "student update")


def training(job, repeats, cycle, warm_up, peak_tflops):
    """Cycles of the loop's iterations, each followed by the limit of the same ones."""
    config, warm_up = job.config, warm_up or cycle
    loop = Loop(job, warm_up + repeats * cycle)
    limit, found = Limit(loop), []
    for step in range(warm_up):
        loop.run(step)
        limit.run(step)
    for begin in range(warm_up, warm_up + repeats * cycle, cycle):
        seconds, parts = 0.0, Counter()
        for step in range(begin, begin + cycle):
            if job.device.type == "cpu":                # a GPU would have to be waited for
                seconds += seconds_of(lambda: loop.run(step), job.device)  # noqa: B023
                parts += limit.run(step)
        if job.device.type == "cuda":
            seconds = seconds_of(lambda: [loop.run(k) for k in range(begin, begin + cycle)],  # noqa: B023
                                 job.device)
            for step in range(begin, begin + cycle):
                parts += limit.run(step)
        found.append((seconds, parts))
    loop.log.bar.close()
    iteration = spread([seconds / cycle for seconds, _ in found])
    rate = config.batch / iteration["median"]
    counted = cost.count(loop.iterate, config, job.network)
    pace = config.batch * counted.flops / config.iterations / 1e12 / iteration["median"]
    shares = {name: median(parts[name] / seconds for seconds, parts in found)
              for name in ("roll-out", "student update", "adapted update")}
    return {"iterations_of_a_repeat": cycle, "repeats": repeats,
            "seconds_of_an_iteration": iteration, "images_a_second": rate,
            "share_of_time": shares | {"the rest": 1 - sum(shares.values())},
            "passes_limit_seconds": median(parts.total() / cycle for _, parts in found),
            "loop_efficiency": spread([parts.total() / seconds for seconds, parts in found]),
            "teraflops_a_second": pace,
            "flop_utilisation": pace / job.options.world_size / peak_tflops if peak_tflops else
            None, "hours_for_the_preset's_images": job.preset.images / rate / 3600}


# ---- Memory, in a process of its own ----

def memory_of(job, answer):
    """Puts (bytes that plan.py foresees, most bytes taken in the loop) of tensors and of the whole.

    On a GPU torch's allocator counts the tensors.
    """
    cuda = job.device.type == "cuda"
    set_precision(job.options.precision)
    foreseen = math.fsum(plan.memory(
        train.iteration_of(job.config), job.config, job.network, job.options.batch_per_gpu,
        precision=job.options.precision, recompute=job.options.recompute, on_gpu=cuda).values())
    process = None if cuda else plan.process_memory(foreseen)
    if not cuda:
        keep_freed_memory()
    with ExitStack() as stack:
        live = None if cuda else stack.enter_context(plan.LiveBytes())
        loop = Loop(job, 2)
        for step in (0, job.config.ttur):               # the student's turn, which needs most
            loop.run(step)
    loop.log.bar.close()
    peaks = {"tensors": (foreseen, torch.cuda.max_memory_allocated() if cuda else live.peak)}
    if process:
        peaks["process"] = process, plan.process_bytes("VmHWM")
    answer.put(peaks)


def memory(job):
    spawned = multiprocessing.get_context("spawn")      # nothing of ours is in it
    answer = spawned.SimpleQueue()
    process = spawned.Process(target=memory_of, args=(job, answer), daemon=True)
    process.start()
    process.join()
    if process.exitcode:
        raise RunFailed(f"the process that measures memory ended with {process.exitcode}; if it "
                        "lacked memory, give a smaller --batch-per-gpu")
    return {name: {"plan_mib": foreseen / 2 ** 20, "mib": peak / 2 ** 20,
                   "against_plan": peak / foreseen}
            for name, (foreseen, peak) in answer.get().items()}


# ---- Command line ----

def parser():
    parser = Parser(prog="python -m experiments.bench", allow_abbrev=False,
                    epilog=__doc__.partition("\n\n")[2],
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    description="Measure speed and memory on random weights. Every flag of "
                                "train.py holds here too (python train.py --help), and these:")
    parser.add_argument("--what", nargs="+", choices=PARTS,
                        help="default: all; under torchrun train alone")
    parser.add_argument("--iterations", type=int, default=0, metavar="N",
                        help="iterations of one repeat, rounds of --ttur (default: one round)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--warm-up", type=int, default=0, metavar="N",
                        help="iterations before the first repeat (default: as many as a repeat)")
    parser.add_argument("--width", type=int, default=0, metavar="C",
                        help="model_channels of the network (default: the dataset's own)")
    parser.add_argument("--peak-tflops", type=float, default=0.0, metavar="T",
                        help="the device's peak at this precision, for FLOP utilisation")
    parser.add_argument("--json", metavar="FILE", help="write them there too")
    return parser


def check(args, stages):
    for name, least in (("iterations", 0), ("warm_up", 0), ("width", 0), ("repeats", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; allowed: whole "
                            f"numbers, at least {least}")
    if not 0 <= args.peak_tflops < float("inf"):
        raise UserError(f"--peak-tflops is {args.peak_tflops}; allowed: above 0")
    for config in (stage.config for stage in stages):
        if config.stage and args.iterations % config.ttur:
            raise UserError(f"--iterations is {args.iterations}; allowed: multiples of --ttur "
                            f"{config.ttur}, so that a repeat has whole rounds of updates")
    if "unet" in stages[0].options.network:
        raise UserError("it measures networks of EDM's kind, not text to image")
    if args.json:
        folder = Path(args.json).resolve().parent
        if not folder.is_dir() or Path(args.json).is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"--json {args.json}: no file can be written there")
    if stages[0].options.dry_run:
        raise UserError("--dry-run is train.py's: python train.py --dry-run")
    if stages[0].options.world_size > 1 and set(args.what or ["train"]) != {"train"}:
        raise UserError(f"--what {' '.join(args.what)}: under torchrun train alone is measured")


def measure(args, stage, device):
    """Everything that is asked for of one stage."""
    config, options = stage.config, stage.options
    set_precision(options.precision)
    what = args.what or PARTS[:1 if options.world_size > 1 else None]
    cycle = args.iterations or (config.ttur if config.stage else 1)
    with ExitStack() as stack:
        folder = [stack.enter_context(tempfile.TemporaryDirectory())]
        if dist.is_initialized():                       # rank 0's, for all
            dist.broadcast_object_list(folder)
        try:
            job = make_job(Path(folder[0]), args.width, stage, device)
        except ValueError as error:                     # a width that no network can have
            raise UserError(f"--width {args.width}: {error}") from None
        measured = {"dataset": config.dataset, "method": config.method, "stage": config.stage,
                    "loss": config.loss, "ttur": config.ttur, "batch": config.batch,
                    "batch_per_gpu": options.batch_per_gpu, "processes": options.world_size,
                    "precision": options.precision, "compile": options.compile,
                    "recompute": options.recompute,
                    "network": job.network}
        if "train" in what:
            measured["training"] = training(job, args.repeats, cycle, args.warm_up,
                                            args.peak_tflops)
        if "memory" in what:
            measured["memory"] = memory(job)
        if "sampling" in what:
            measured["sampling"] = sampling(job, args.repeats)
        if "scoring" in what:
            measured["scoring"] = scoring(job, args.repeats,
                                          measured.get("training", {}).get("images_a_second"))
        distributed.barrier()
    return measured


def lines(measured, indent="  "):
    """Nested values in plain words."""
    for name, value in measured.items():
        name = name.replace("_", " ")
        if isinstance(value, dict) and "median" in value:
            value = f"{value['median']:.4g} ({value['least']:.4g} to {value['most']:.4g})"
        if isinstance(value, dict):
            yield from [f"{indent}{name}:", *lines(value, indent + "  ")]
        else:
            value = "not measured" if value is None else value
            yield f"{indent}{name}: {value:.4g}" if isinstance(value, float) else (
                f"{indent}{name}: {value}")


def main(argv=None):
    args, rest = parser().parse_known_args(argv)
    stages = train_options.parse(rest)
    check(args, stages)
    device = distributed.start(stages[0].options.device)
    torch.backends.cudnn.benchmark = True
    report = {"command": " ".join(["python -m experiments.bench",
                                   *(sys.argv[1:] if argv is None else argv)]),
              "torch": torch.__version__, "threads": torch.get_num_threads(),
              "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
              "cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2), "runs": []}
    for stage in stages:
        report["runs"].append(measure(args, stage, device))
        if distributed.rank() == 0:
            print("\n".join(lines(report["runs"][-1], "")), flush=True)
            if args.json:
                write_json(args.json, report)
    distributed.finish()
    return 0


if __name__ == "__main__":
    run(main)
