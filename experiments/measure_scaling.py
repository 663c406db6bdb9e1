"""Cost of training against batch, width, steps and processes, and on paper on many GPUs.

    python -m experiments.measure_scaling      writes results/bench-scaling.json and scaling.png

The curves are bench.py's figures of the digits run. What 4 and 64 GPUs would give is computed, not
measured: FLOPs of the passes, and bytes of gradients, over the rates assumed below.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from base.errors import Parser, run
from base.files import ROOT, write_json
from edm_networks import EDMPrecond
from images.pictures import save_png
from metrics.inception import Inception
from presets.datasets import DATASETS
from presets.rows import find
from train import iteration
from training import cost

BATCHES, WIDTHS, STAGES = (8, 16, 32, 64, 128, 256, 512), (8, 16, 32, 64, 96), (1, 2, 3)
PROCESSES = (1, 2)
# Assumed of a GPU and what joins it to the others: an A100's peaks in bf16 (training), TF32 (an
# evaluation's samples) and fp32 (its features), the share that is reached, bytes of an all-reduce.
ASSUMED = {"peak_teraflops": 312, "peak_teraflops_tf32": 156, "peak_teraflops_fp32": 19.5,
           "utilisation": 0.3, "all_reduce_bytes_a_second": 100e9}
GPUS = (4, 64)
BOUNDS = {
    "batch": "small batches are bound by the host's cost of launching each operation, large ones "
             "by arithmetic: images a second stop growing",
    "width": "FLOPs grow with the square of the width; narrow networks are bound by launching and "
             "by memory traffic, wide ones by arithmetic",
    "steps": "each further step adds a pass to every roll-out and, with unforget, a forward and "
             "backward to every student update: a straight line",
    "processes": "one thread a process: bound by the cores they share, and by the gradients that "
                 "they exchange"}


def bench(*flags, processes=1):
    start = [sys.executable] + ["-m", "torch.distributed.run", "--standalone",
                                f"--nproc_per_node={processes}"] * (processes > 1)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*start, "-m", "experiments.bench", "--what", "train",
                        "--iterations", "4", "--repeats", "3", "--json", f"{folder}/out.json",
                        *map(str, flags)], cwd=ROOT,
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
        training = json.loads(Path(f"{folder}/out.json").read_text())["runs"][0]["training"]
    return {"seconds_of_an_iteration": training["seconds_of_an_iteration"]["median"],
            "images_a_second": training["images_a_second"],
            "teraflops_a_second": training["teraflops_a_second"],
            "loop_efficiency": training["loop_efficiency"]["median"]}


def measured():
    points = [("batch", n, ["--stage", 1, "--batch", n], {}) for n in BATCHES]
    points += [("width", n, ["--stage", 1, "--width", n], {}) for n in WIDTHS]
    points += [("steps", n, ["--stage", n], {}) for n in STAGES]
    points += [("processes", n, ["--stage", 1], {"processes": n}) for n in PROCESSES]
    curves = {name: {"bound": text, "points": []} for name, text in BOUNDS.items()}
    for name, value, flags, how in tqdm(points, desc="scaling"):
        curves[name]["points"].append({name: value} | bench(*flags, **how))
    return curves


def inception_flops():
    """Of one image's features."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Inception()._chunk(torch.empty(1, 3, 32, 32, dtype=torch.uint8))
    return counter.get_total_flops()


def computed():
    """Hours of the presets on N GPUs: arithmetic and all-reduce, the slower; and evaluations."""
    rows, features = [], inception_flops()
    for dataset in ("cifar10", "imagenet64"):
        network = DATASETS[dataset].network
        with torch.device("meta"):
            parameters = sum(p.numel() for p in EDMPrecond(**network).parameters())
        for stage in STAGES:
            config = find(dataset, "pmdd", stage).config
            counted = cost.count(iteration, config, network)
            flops = config.batch * counted.flops / config.iterations
            exchanged = 4 * parameters * (1 + 1 / config.ttur)
            scored = cost.totals(config, counted)["images forward through a network to score"]
            forward = cost.forward_flops(network)
            scoring = scored / 1e12 / ASSUMED["utilisation"] * (
                forward / ASSUMED["peak_teraflops_tf32"]
                + features / ASSUMED["peak_teraflops_fp32"])
            for gpus in GPUS:
                arithmetic = flops / (
                    gpus * 1e12 * ASSUMED["peak_teraflops"] * ASSUMED["utilisation"])
                reduce = 2 * (gpus - 1) / gpus * exchanged / ASSUMED["all_reduce_bytes_a_second"]
                rows.append({
                    "dataset": dataset, "stage": stage, "gpus": gpus, "batch": config.batch,
                    "iterations": config.iterations, "teraflops_of_an_iteration": flops / 1e12,
                    "gradient_bytes_of_an_iteration": exchanged,
                    "seconds_of_arithmetic": arithmetic, "seconds_of_all_reduce": reduce,
                    "batch_divides": config.batch % gpus == 0,
                    "hours": config.iterations * max(arithmetic, reduce) / 3600,
                    "hours_of_evaluations": scoring / gpus / 3600})
    return rows


def draw(curves, path, width=250, height=190, margin=42):
    """A log-log plot of each curve, drawn point by point: no library beyond Pillow."""
    picture = Image.new("RGB", (len(curves) * width, height), "white")
    pen = ImageDraw.Draw(picture)
    for column, (name, curve) in enumerate(curves.items()):
        x = [point[name] for point in curve["points"]]
        y = [1e3 * point["seconds_of_an_iteration"] for point in curve["points"]]
        left, right = column * width + margin, (column + 1) * width - 12
        top, bottom = 24, height - 32
        low, high = min(y) / 1.3, max(y) * 1.3
        across = [left + (right - left) * math.log(v / x[0]) / math.log(x[-1] / x[0]) for v in x]
        down = [bottom - (bottom - top) * math.log(v / low) / math.log(high / low) for v in y]
        pen.line([(left, top), (left, bottom), (right, bottom)], fill="grey")
        pen.line(list(zip(across, down)), fill="navy", width=2)
        pen.text((left, 6), "milliseconds of an iteration", fill="black")
        pen.text(((left + right) / 2 - 3 * len(name), height - 13), name, fill="black")
        for value, here, there in zip(x, across, down):
            pen.ellipse((here - 3, there - 3, here + 3, there + 3), fill="navy")
            pen.text((here - 3 * len(str(value)), bottom + 4), str(value), fill="black")
        for value in (y[0], y[-1]):
            there = bottom - (bottom - top) * math.log(value / low) / math.log(high / low)
            pen.text((left - margin + 4, there - 6), f"{value:.0f}", fill="black")
    save_png(picture, path)


def main():
    Parser(prog="experiments.measure_scaling", description=__doc__).parse_args()
    curves = measured()
    report = {"command": "python -m experiments.measure_scaling", "torch": torch.__version__,
              "cores": os.cpu_count(), "threads_a_process": 1, "dataset": "digits",
              "method": "pmdd", "measured": curves, "assumed": ASSUMED, "computed": computed()}
    write_json(ROOT / "results" / "bench-scaling.json", report)
    draw(curves, ROOT / "results" / "scaling.png")


if __name__ == "__main__":
    run(main)
