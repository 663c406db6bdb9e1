"""How fast the average should forget: one training run, many averages of it, scored side by side.

    python -m experiments.measure_average --stage 1 --iterations 2000 --folder runs/average

Takes the flags of train.py, for one stage of a new folder. No average acts on the training, so all
of them see the same weights. Writes results/average/<data set>-<method>-<stage>.json, with the
variant where it has one, and best.pt for the stage after.
"""

import copy
import math
import shlex
import sys

import torch

from base.errors import UserError, run
from base.files import ROOT, versions, write_json
from base.progress import progress
from metrics.judge import Scorer, lacks_reference, perceptual_distance
from models import update_ema
from presets.datasets import DATASETS
from train import iteration, make_optimizers, open_sources, set_rate
from training.draws import draw
from training.log import StopSignal, best_of
from training.options import parse, parser
from training.roles import load_roles, payload
from weights.checkpoint import save

BLOCKS = 2                      # of --evaluate-images each: what differs between them is chance
ROWS_OWN, NONE = "the row's", "no limit"
# name -> (share of the images seen, or 0; whether the row's half-life is a limit). Without one the
# average's width is always the same share of the run: EDM2's power functions (arXiv:2312.02696).
AVERAGES = {"0": (0, ROWS_OWN), "0.02": (0.02, ROWS_OWN), "0.05": (0.05, ROWS_OWN),
            "0.1": (0.1, ROWS_OWN), "0.2": (0.2, ROWS_OWN), "0.05 alone": (0.05, NONE),
            "0.1 alone": (0.1, NONE)}
WEIGHTS = "weights"


def scores(network, scorer, config):
    """The data set's FID at the stage's own number of steps, of each block of images."""
    own, metric = str(config.stage), scorer.judge.network.metric
    return [scorer.score(network, config.sigmas, block * scorer.images)[own][metric]
            for block in range(BLOCKS)]


def measure(config, options):
    device = torch.device("cpu")
    roles, stop = load_roles(config, options, device), StopSignal()
    stop.restore()                                      # it saves nothing on the way
    optimizers, scorer = make_optimizers(config, roles, device), Scorer(config, options, device)
    roles.wrap()
    if config.regression_weight:
        roles.distance = perceptual_distance(config.dataset, options.cache, device,
                                             roles.opened.pipeline)
    options.folder.mkdir(parents=True, exist_ok=True)
    sources = open_sources(config, options, roles, device, stop)
    averages = {name: copy.deepcopy(roles.ema) for name in AVERAGES}
    curve = []
    for step in progress(range(config.iterations), desc="measuring averages", unit="it"):
        set_rate(config, step, optimizers)
        parts = draw(config, step, sources, options)
        moved = step % config.ttur == 0
        iteration(config, roles, optimizers, parts, moved)
        for name, (rampup, limit) in AVERAGES.items() if moved else ():
            halflife = config.ema_halflife if limit == ROWS_OWN else math.inf
            update_ema(averages[name], roles.student, config.batch, halflife, rampup,
                       parts[0].seen)
        if (step + 1) % config.evaluate_every == 0:
            curve.append({"iterations": step + 1} | {
                name: scores(network, scorer, config)
                for name, network in ({WEIGHTS: roles.student} | averages).items()})
            print({name: value[0] for name, value in curve[-1].items() if name != "iterations"})
    save(options.folder / "best.pt", best_of(payload(
        config, roles, optimizers, config.iterations, 0.0, math.inf, {}), math.inf))
    return curve


def main():
    stages = parse(sys.argv[1:])
    if len(stages) > 1 or not stages[0].config.stage:
        raise UserError("it measures one stage of a student: give --stage 1, 2 or 3")
    _, config, options = stages[0]
    if any(options.folder.glob("*.pt")):
        raise UserError(f"{options.folder} holds a run; give another --folder")
    if not config.evaluate_every:
        raise UserError("allowed: --evaluate-every above 0")
    if options.dry_run or options.device not in (None, "cpu") or options.precision != "fp32":
        raise UserError("it trains, on the CPU in fp32: leave out --dry-run, --device, --precision")
    if config.dataset not in DATASETS or lacks_reference(config, options):
        raise UserError(f"allowed: a row of {', '.join(DATASETS)} with a reference (--reference)")
    curve = measure(config, options)
    command = f"python -m experiments.measure_average {shlex.join(sys.argv[1:])}"
    row = config.dataset, config.method, config.stage, parser().parse_args().variant
    path = ROOT / "results" / "average" / f"{'-'.join(map(str, filter(None, row)))}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"command": command, "row": row, "versions": versions(),
                      "iterations": config.iterations, "images": config.evaluate_images,
                      "curve": curve})


if __name__ == "__main__":
    run(main)
