"""How fast training, sampling and scoring are, against what they cannot do without.

    python -m experiments.bench                         digits, PMDD stages 1, 2, 3
    python -m experiments.bench --dataset cifar10 --stage 3 --loss dm --json figures.json
    python -m experiments.bench --dataset imagenet64 --precision bf16 --compile --peak-tflops 312
    torchrun --nproc_per_node=2 -m experiments.bench --what train

The loop is train.py's own, on random weights. Its limit is the passes limit: the network passes
that the algorithm needs (cost.py lists them), alone, back to back, timed in turn with the loop's
iterations, so that other load on the machine meets both. Loop efficiency = limit / loop.
"""

import argparse
import dataclasses
import io
import json
import math
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from weights import checkpoint
from base import distributed
from training import options as train_options
from training import cost
import train
from edm_networks import EDMPrecond
from base.errors import Parser, RunFailed, UserError, run
from fid import feature_network, frechet_distance
from metrics.inception import Inception
from metrics.lpips import LPIPS
from models import SeededNoise, level, sample_every_step, sample_heun
from weights.opening import prepare, sample_block, seed_blocks, set_precision
from presets import NETWORKS, PMDD_SIGMAS, UNCONDITIONAL, Preset
from training.run_folder import Log, write_json
from metrics.scoring import HEUN_STEPS

PARTS = ("train", "memory", "sampling", "scoring")
SPLIT = ("roll-out", "student update", "adapted update", "EMA", "the rest")
SCORED = 64                     # images that the rates of an evaluation are measured on
LONG_ENOUGH = 2.0               # seconds of calls behind one ratio of two times: a single is noise


# ---- What is measured on: random weights and images in the formats of real ones ----

@dataclass
class Job:
    preset: Preset
    config: train_options.Config
    options: train_options.Options
    device: torch.device
    network: dict               # the architecture

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16,
                              enabled=self.options.precision == "bf16")


def make_job(folder, width, preset, config, options, device):
    """The row as a run that begins with files of random weights, and never evaluates."""
    network = NETWORKS[config.dataset] | ({"model_channels": width} if width else {})
    if config.teacher == UNCONDITIONAL:
        network = network | {"label_dim": 0}
    (folder / "run").mkdir(exist_ok=True)
    teacher, start, images = folder / "teacher.pt", folder / "start.pt", folder / "images"
    begins = config.start_from or (config.method == "pmdd" and config.stage > 1)
    if distributed.rank() == 0:
        weights = [random_weights(network, seed) for seed in (0, 1, 2)]
        about = {"dataset": config.dataset, "network": EDMPrecond(**network).config, "fid": {},
                 "iteration": 0, "method": config.method, "stage": config.stage}
        checkpoint.save(teacher, about | {"sigmas": [], "ema": weights[0]})
        if begins:
            checkpoint.save(start, about | {"sigmas": list(config.sigmas[:-1]), "ema": weights[1],
                                            "adapted": weights[2]})
        if config.dataset != "digits" and (config.gan_weight or config.stage == 0):
            write_images(images, config.dataset, network)
    distributed.barrier()
    config = dataclasses.replace(
        config, teacher=str(teacher), start_from=str(start) if begins else "", evaluate_every=0,
        regression_pairs=min(config.regression_pairs, 2 * config.batch), regression_steps=1)
    if images.exists() and options.data == config.dataset:
        options = dataclasses.replace(options, data=str(images))
    return Job(preset, config, dataclasses.replace(options, folder=folder / "run"), device, network)


def random_weights(network, seed):
    """Weights as a new teacher's, moved a little so that no two networks agree."""
    torch.manual_seed(seed)
    weights = EDMPrecond(**network).state_dict()
    return {k: v + 1e-3 * torch.randn_like(v) for k, v in weights.items()}


def write_images(path, dataset, network, count=256):
    """CIFAR-10's archive, or a zip in EDM's layout."""
    size, rng = network["img_resolution"], np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    labels = rng.integers(0, network["label_dim"] or 10, count)
    if dataset == "cifar10":
        records = np.concatenate([labels[:, None].astype(np.uint8), pixels.reshape(count, -1)], 1)
        member = tarfile.TarInfo("data_batch_1.bin")
        member.size = records.size
        with tarfile.open(path, "w:gz") as archive:
            archive.addfile(member, io.BytesIO(records.tobytes()))
        return
    with zipfile.ZipFile(path, "w") as archive:
        names = [f"{number:05d}.png" for number in range(count)]
        archive.writestr("dataset.json", json.dumps({"labels": list(zip(names, labels.tolist()))}))
        for name, image in zip(names, pixels):
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, "PNG")
            archive.writestr(name, encoded.getvalue())


def random_distance(config, options, device):
    """DMD's perceptual distance; on images LPIPS with random weights."""
    return DISTANCE(config, options, device) if config.dataset == "digits" else LPIPS().to(
        device, memory_format=torch.channels_last)


DISTANCE = train.perceptual_distance


# ---- The real loop, watched ----

class Watch:
    """Beside the loop: the time of its iterations and of their parts, and between them the limit's.

    An iteration's rest is what belongs to no other part: random draws, the rate, the log.
    """

    def __init__(self, job, *, repeats, cycle, warm_up=0, limit=True):
        self.job, self.repeats, self.cycle, self.limited = job, repeats, cycle, limit
        self.warm_up, self.cuda = warm_up or cycle, job.device.type == "cuda"
        # Waiting for a GPU costs time, so there the parts are timed in cycles of their own.
        self.splitting = not self.cuda
        self.iterations = self.warm_up + repeats * cycle * (2 if self.cuda else 1)
        self.step, self.n, self.seen, self.cycles = 0, max(len(job.config.sigmas), 1), [], []
        self.spent, self.calls, self.roles, self.distance = Counter(), {}, None, None

    def run(self):
        """A list of cycles, each a dict of seconds. The loop computes what it always does."""
        job, stop = self.job, SimpleNamespace(received=None)
        config = dataclasses.replace(job.config, iterations=self.iterations)
        self.real_update, self.real_roll_out = train.update, train.roll_out
        looked_at = {
            "Log": partial(WatchedLog, self), "update": self.update,
            "roll_out": self.around(self.roll_out, "roll-out", self.after_roll_out),
            "denoising_loss": self.around(train.denoising_loss, "adapted update"),
            "edm_loss": self.around(train.edm_loss, "student update"),
            "update_ema": self.around(train.update_ema, "EMA", lambda: "the rest"),
            "load_roles": self.keep(train.load_roles, "roles"),
            "new_teacher": self.keep(train.new_teacher, "roles"),
            "perceptual_distance": self.keep(random_distance, "distance")}
        with ExitStack() as stack:
            for name, replacement in looked_at.items():
                stack.enter_context(mock.patch.object(train, name, replacement))
            if config.stage == 0:
                train.train_teacher(config, job.options, job.device, stop, job.network)
            else:
                train.distill(config, job.options, job.device, stop)
        return self.cycles

    def keep(self, function, name):
        def kept(*args):
            setattr(self, name, function(*args))
            return getattr(self, name)
        return kept

    def around(self, function, part, after=None):
        """The function that the loop calls, entering a part before it, and another after it."""
        def timed(*args, **kwargs):
            self.enter(part)
            result = function(*args, **kwargs)
            if after:
                self.enter(after())
            return result
        return timed

    def roll_out(self, source, z, y, sigmas, noises):
        self.n = len(sigmas)
        return self.real_roll_out(source, z, y, sigmas, noises)

    def after_roll_out(self):
        """Where it is not the student's turn, its images belong to the roll-out."""
        return "roll-out" if self.step % self.job.config.ttur else "student update"

    def update(self, *args):
        begun = self.clock()
        result = self.real_update(*args)
        self.spent["clipping and AdamW"] += self.clock() - begun
        return result

    def clock(self):
        if self.cuda and self.splitting:
            torch.cuda.synchronize()
        return time.perf_counter()

    def enter(self, part):
        now = self.clock()
        self.spent[self.part] += now - self.since
        self.part, self.since = part, now

    def begin(self):
        if self.cuda:
            torch.cuda.synchronize()
        self.began = self.since = time.perf_counter()
        self.part = "the rest"

    def iteration_done(self):
        self.seen.append((self.n, self.step % self.job.config.ttur == 0))
        self.step += 1
        measured = self.step - self.warm_up
        ends_cycle = measured >= 0 and measured % self.cycle == 0
        if self.cuda and not ends_cycle:
            return                                      # no waiting in the middle of a cycle
        if self.cuda:
            torch.cuda.synchronize()
        self.enter("the rest")
        self.spent["loop"] += self.since - self.began
        if self.limited and len(self.cycles) < self.repeats:
            self.spent["limit"] += self.limit(self.seen)
        self.seen = []
        if ends_cycle:
            self.cycles += [dict(self.spent)] if measured else []
            self.spent.clear()
            self.splitting = not self.cuda or len(self.cycles) >= self.repeats
        self.begin()

    def limit(self, seen):
        """Seconds of the passes of these iterations, back to back."""
        options, seconds = self.job.options, 0.0
        passes = [one for n, turn in seen for one in cost.iteration_passes(self.job.config, n, turn)
                  for _ in range(parts_of(self.job.config, options))]
        for frozen in (True, False):                    # switched outside the time that counts
            if self.roles.adapted is not None:
                self.roles.adapted.requires_grad_(not frozen)
            calls = [self.call(one) for one in passes if (one.gradient == "input") is frozen]
            self.begin()
            for call in calls:
                call()
            if self.cuda:
                torch.cuda.synchronize()
            seconds += time.perf_counter() - self.began
        return seconds

    def call(self, one):
        """A function that makes the pass; its inputs are made once."""
        if one not in self.calls:
            inputs = random_inputs(self.roles.student, one.batches * self.job.options.batch_per_gpu,
                                   self.job.device)
            self.calls[one] = partial(self.make, one, *inputs)
        return self.calls[one]

    def make(self, one, x, sigma, y):
        network = self.distance if one.role == "distance" else getattr(self.roles, one.role)
        inputs = (-x,) if one.role == "distance" else (sigma, y)
        how = {"output": "logits"} if one.output == "logits" else {}
        x = x.detach().requires_grad_(one.gradient == "input")
        with self.job.autocast(), torch.set_grad_enabled(one.gradient != "none"):
            out = network(x, *inputs, **how)
        if one.gradient != "none":
            into = x if one.gradient == "input" else [p for p in network.parameters()
                                                      if p.requires_grad]
            torch.autograd.grad(out, into, torch.ones_like(out), allow_unused=True)


class WatchedLog(Log):
    """The run's own log, but for checkpoints."""

    def __init__(self, watch, *args):
        super().__init__(*args)
        self.watch = watch
        self.bar.set_description("loop and limit" if watch.limited else "memory")
        watch.begin()

    def take(self, step, figures, images):
        self.watch.iteration_done()
        super().take(step, figures, images)

    def save(self, *args):
        pass

    def finish(self):
        self.bar.close()
        return 0


def parts_of(config, options):
    return config.batch // options.world_size // options.batch_per_gpu


def random_inputs(network, images, device):
    x = torch.randn(images, *network.image_shape, device=device)
    y = torch.eye(network.label_dim, device=device)[
        torch.arange(images) % network.label_dim] if network.label_dim else None
    return x, torch.rand(images, 1, 1, 1, device=device) + 0.5, y


def spread(values):
    return {"median": median(values), "least": min(values), "most": max(values)}


def training(job, repeats, cycle, warm_up, peak_tflops):
    cycles = Watch(job, repeats=repeats, cycle=cycle, warm_up=warm_up).run()
    alone, split = cycles[:repeats], cycles[-repeats:]
    seconds = spread([c["loop"] / cycle for c in alone])
    rate = job.config.batch / seconds["median"]
    pace = cost.iteration_flops(job.config, job.network) / 1e12 / seconds["median"]
    return {"iterations_of_a_repeat": cycle, "repeats": repeats, "seconds_of_an_iteration": seconds,
            "images_a_second": rate,
            "share_of_time": {name: median(c.get(name, 0) / c["loop"] for c in split)
                              for name in (*SPLIT, "clipping and AdamW")},
            "passes_limit_seconds": median(c["limit"] / cycle for c in alone),
            "loop_efficiency": spread([c["limit"] / c["loop"] for c in alone]),
            "teraflops_a_second": pace,
            "flop_utilisation": pace / job.options.world_size / peak_tflops if peak_tflops else
            None, "hours_for_the_preset's_images": job.preset.images / rate / 3600}


# ---- Memory, in a process of its own ----

def memory_of(job, answer):
    """Puts (bytes that cost.py foresees, most bytes taken in the loop) of tensors and of the whole.

    On a GPU torch's allocator counts the tensors.
    """
    cuda = job.device.type == "cuda"
    set_precision(job.options.precision)
    foreseen = math.fsum(cost.memory(job.config, job.network, job.options.batch_per_gpu,
                                     precision=job.options.precision).values())
    whole = None if cuda else cost.process_memory(foreseen)
    if not cuda:
        distributed.keep_freed_memory()
    config = dataclasses.replace(job.config, ttur=1)    # so that each iteration updates both
    with ExitStack() as stack:
        live = None if cuda else stack.enter_context(cost.LiveBytes())
        Watch(dataclasses.replace(job, config=config), repeats=1, cycle=1, warm_up=1,
              limit=False).run()
    peaks = {"tensors": (foreseen, torch.cuda.max_memory_allocated() if cuda else live.peak)}
    if whole:
        peaks["process"] = whole, cost.process_bytes("VmHWM")
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


# ---- Sampling and scoring ----

def seconds_of(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def seconds_of_both(ours, theirs, device):
    """Of one call of each; called in turn, so that other load on the machine meets both."""
    calls, spent = 0, [0.0, 0.0]
    while calls == 0 or sum(spent) < LONG_ENOUGH:
        for which, function in enumerate((ours, theirs)):
            spent[which] += seconds_of(function, device)
        calls += 1
    return [seconds / calls for seconds in spent]


@torch.no_grad()
def sampling(job, repeats):
    """models.py's samplers on one batch, in turn with single forwards of that batch."""
    options, device, B = job.options, job.device, job.options.batch_per_gpu
    network = prepare(EDMPrecond(**job.network).eval(), device, options.precision, options.compile)
    noise = SeededNoise(range(B), network.image_shape, device)
    z, _, y = random_inputs(network, B, device)
    x, figures = PMDD_SIGMAS[0] * z, {"batch": B}

    def forwards(steps):
        for sigma in PMDD_SIGMAS[:steps]:
            network(x, level(sigma, x), y)

    with job.autocast():
        forwards(2)                                     # warm-up
        for steps in tqdm(range(1, len(PMDD_SIGMAS) + 1), desc="sampling"):
            sample = partial(sample_every_step, network, z, y, noise, sigmas=PMDD_SIGMAS[:steps])
            pairs = [seconds_of_both(sample, partial(forwards, steps), device)
                     for _ in range(repeats)]
            figures[f"{steps} step" + "s" * (steps > 1)] = {
                "images_a_second": B / median(ours for ours, _ in pairs),
                "time_against_forwards": spread([ours / theirs for ours, theirs in pairs])}
        heun = seconds_of(partial(sample_heun, network, z, y, steps=HEUN_STEPS), device)
    return figures | {f"teacher, Heun, {HEUN_STEPS} steps": {"images_a_second": B / heun}}


@torch.no_grad()
def scoring(job, repeats, rate):
    """The pieces of an evaluation, and from them what one at the preset's interval costs."""
    config, device = job.preset.config, job.device
    network = prepare(EDMPrecond(**job.network).eval(), device)
    judge = feature_network("digits", device=device) if config.dataset == "digits" else (
        Inception().fold().to(device))
    images = torch.randint(0, 256, (SCORED, *network.image_shape), dtype=torch.uint8)
    judge(images[:8])                                                       # warm-up
    features = SCORED / median(seconds_of(lambda: judge(images), device) for _ in range(repeats))
    samples = np.random.default_rng(0).standard_normal((2, 2 * judge.dimensions, judge.dimensions))
    ours, theirs = ((x.mean(0), np.cov(x.T)) for x in samples)
    frechet = median(seconds_of(lambda: frechet_distance(*ours, *theirs), device)
                     for _ in range(repeats))
    figures = {"features": judge.name, "features_a_second": features, "frechet_seconds": frechet,
               "frechet_dimensions": judge.dimensions}
    if not rate:
        return figures
    outputs, blocks = max(len(config.sigmas), 1), seed_blocks(range(SCORED), network, device)

    def sampler(*inputs):
        return (sample_every_step(*inputs, sigmas=config.sigmas) if config.sigmas else
                [sample_heun(*inputs, steps=HEUN_STEPS)])

    def task(seeds):
        return sample_block(network, seeds, sampler, "random", device)

    made = SCORED / seconds_of(lambda: list(distributed.in_parallel(task, blocks, device)), device)
    seconds = config.evaluate_images * (1 / made + outputs / features) + outputs * frechet
    between = config.evaluate_every * config.batch / rate
    return figures | {"images_of_an_evaluation": config.evaluate_images,
                      "seconds_of_an_evaluation": seconds,
                      "seconds_of_training_between": between,
                      "share_of_training": seconds / between}


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
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    return parser


def check(args, rows):
    for name, least in (("iterations", 0), ("warm_up", 0), ("width", 0), ("repeats", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; allowed: whole "
                            f"numbers, at least {least}")
    if not 0 <= args.peak_tflops < float("inf"):
        raise UserError(f"--peak-tflops is {args.peak_tflops}; allowed: above 0")
    for _, config, _ in rows:
        if config.stage and args.iterations % config.ttur:
            raise UserError(f"--iterations is {args.iterations}; allowed: multiples of --ttur "
                            f"{config.ttur}, so that a repeat has whole rounds of updates")
    if args.json:
        folder = Path(args.json).resolve().parent
        if not folder.is_dir() or Path(args.json).is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"--json {args.json}: no file can be written there")
    if rows[0][2].dry_run:
        raise UserError("--dry-run is train.py's: python train.py --dry-run")
    if rows[0][2].world_size > 1 and set(args.what or ["train"]) != {"train"}:
        raise UserError(f"--what {' '.join(args.what)}: under torchrun train alone is measured")


def measure(args, preset, config, options, device):
    """One row's figures."""
    set_precision(options.precision)
    what = args.what or PARTS[:1 if options.world_size > 1 else None]
    cycle = args.iterations or (config.ttur if config.stage else 1)
    with ExitStack() as stack:
        folder = [stack.enter_context(tempfile.TemporaryDirectory())]
        if dist.is_initialized():                       # rank 0's, for all
            dist.broadcast_object_list(folder)
        try:
            job = make_job(Path(folder[0]), args.width, preset, config, options, device)
        except ValueError as error:                     # a width that no network can have
            raise UserError(f"--width {args.width}: {error}") from None
        measured = {"dataset": config.dataset, "method": config.method, "stage": config.stage,
                    "loss": config.loss, "ttur": config.ttur, "batch": config.batch,
                    "batch_per_gpu": options.batch_per_gpu, "processes": options.world_size,
                    "precision": options.precision, "compile": options.compile,
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


def lines(figures, indent="  "):
    """Nested figures in plain words."""
    for name, value in figures.items():
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
    rows = train_options.parse(rest)
    check(args, rows)
    device = distributed.start(rows[0][2].device)
    torch.backends.cudnn.benchmark = True
    report = {"command": " ".join(["python -m experiments.bench",
                                  *(sys.argv[1:] if argv is None else argv)]),
              "torch": torch.__version__, "threads": torch.get_num_threads(),
              "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
              "cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2), "runs": []}
    for preset, config, options in rows:
        report["runs"].append(measure(args, preset, config, options, device))
        if distributed.rank() == 0:
            print("\n".join(lines(report["runs"][-1], "")), flush=True)
            if args.json:
                write_json(args.json, report)
    distributed.finish()
    return 0


if __name__ == "__main__":
    run(main)
