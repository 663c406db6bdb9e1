"""Curves of several runs in one picture: scores, losses, brightness, against what they cost.

    python -m experiments.compare runs/digits-pmdd/stage1 runs/digits-dmd/stage1
    python -m experiments.compare runs/*/stage1 --against hours --out compare.png

Each run is a stage's folder with its config.json and metrics.jsonl. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from base.errors import Parser, UserError, run
from base.files import write_atomically
from images.pictures import CURVES, matplotlib_pyplot
from presets.config import Config
from train import iteration_of
from training.passes import Passes
from training.run_folder import read_metrics

AXES = ("iterations", "images", "passes", "seconds", "hours")


def read_run(folder):
    """(config, lines of its metrics)"""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())["config"]
        config = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no folder of a run ({error}); wanted: one with its "
                        "config.json, as runs/digits-pmdd/stage1") from None
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines:
        raise UserError(f"{folder} has no metrics yet")
    return config, lines


def positions(config, lines, against):
    """Where each line stands on the axis."""
    iterations = [line["iteration"] + 1 for line in lines]
    if against == "iterations":
        return iterations
    if against == "images":
        return [n * config.batch for n in iterations]
    if against == "passes":
        passes = Passes(iteration_of(config), config)
        return [passes.until(n) for n in iterations]
    seconds, spent, last = [], 0.0, 0
    for n, line in zip(iterations, lines):
        if "images_per_second" in line:
            spent += (n - last) * config.batch / line["images_per_second"]
            last = n
        seconds.append(spent)
    return seconds if against == "seconds" else [spent / 3600 for spent in seconds]


def draw(folders, against, path):
    runs = []
    for folder in folders:
        config, lines = read_run(folder)
        runs.append((str(folder), positions(config, lines, against), lines))
    names = sorted({n for _, _, lines in runs for line in lines for n in line if "@" in n})
    names += [name for name in CURVES if any(name in line for _, _, ls in runs for line in ls)]
    plt, rows = matplotlib_pyplot(), -(-len(names) // 3)
    figure, axes = plt.subplots(rows, 3, squeeze=False, figsize=(13, 3 * rows),
                                layout="constrained")
    colours = plt.cm.turbo(np.linspace(0.05, 0.95, len(runs)))
    for axis in axes.flat[len(names):]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names):
        for k, (_, places, lines) in enumerate(runs):
            points = [(x, line[name]) for x, line in zip(places, lines) if name in line]
            if points:
                axis.plot(*zip(*points), color=colours[k], linewidth=1, marker="." * ("@" in name))
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(against, fontsize=8)
        axis.tick_params(labelsize=7)
    for (label, _, _), colour in zip(runs, colours):        # also of a run that lacks the first
        axes.flat[0].plot([], [], color=colour, label=label)
    axes.flat[0].legend(fontsize=7)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))
    plt.close(figure)


def main(argv=None):
    parser = Parser(prog="python -m experiments.compare", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="FOLDER")
    parser.add_argument("--against", choices=AXES, default="iterations",
                        help="the axis: passes are forward passes, a backward one counted as one "
                             "more through frozen weights and two into trained ones, and those "
                             "for DMD's pairs come first; seconds and hours are of the loop, "
                             "without these (default: iterations)")
    parser.add_argument("--out", default="compare-runs.png", help="default: compare-runs.png")
    args = parser.parse_args(argv)
    if Path(args.out).suffix != ".png" or not Path(args.out).resolve().parent.is_dir():
        raise UserError(f"--out {args.out}: must be the name of a .png in a folder that is there")
    draw(args.runs, args.against, args.out)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
