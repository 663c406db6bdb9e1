"""What brings a student to its teacher sooner: PMDD's rows, changed one thing at a time.

    python -m experiments.recipes                   make the runs that results/recipes has not
    python -m experiments.recipes --only digits-row digits-noises-2 --seeds 0
    python -m experiments.recipes --pictures        results/recipes/*.png of them (needs matplotlib)

All changes of stage 1 have the same network passes, counted by training.passes; the whole recipes
have their own. Each run is a command of train.py and one of evaluate.py, on one thread.
"""

import shlex
from functools import cache
from pathlib import Path
from typing import NamedTuple

from base.errors import run
from base.files import ROOT
from experiments.compare import positions, read_run
from experiments.recorded_runs import Plan, Run, markdown, parse, run_all, spread
from images.pictures import matplotlib_pyplot
from train import iteration
from training.options import parse as stages_of
from training.passes import Passes
from weights.opening import steps_text


class Study(NamedTuple):
    """What is distilled, how far, and how it is scored."""
    metric: str
    share: str                  # the second figure
    iterations: int             # of the row's stage 1: their passes are what every change has
    images: int                 # of a figure
    target: str                 # records of the student whose quality is to be reached


STUDIES = {"digits": Study("digits-FID", "right_class", 1_000, 20_000, "results/embedded")}

# Of stage 1: name -> (flags, the change that comes first, its share of the passes).
CHANGES = {
    "row": ("", "", 1),
    "noises-2": ("--adapted-noises 2", "", 1),
    "noises-4": ("--adapted-noises 4", "", 1),
    "noises-2-ttur-1": ("--ttur 1 --adapted-noises 2", "", 1),  # a roll-out less
    "ttur-1": ("--ttur 1", "", 1),
    "ttur-5": ("--ttur 5", "", 1),
    "ttur-falls-first": ("--ttur 5 --final-rate 0.5", "", 0.5),
    "ttur-falls": ("--ttur 1 --learning-rate 2e-4", "ttur-falls-first", 0.5),
    "ttur-rises-first": ("--ttur 1 --final-rate 0.5", "", 0.5),
    "ttur-rises": ("--ttur 5 --learning-rate 2e-4", "ttur-rises-first", 0.5),
    "adapted-rate-half": ("--adapted-rate 0.5", "", 1),
    "adapted-rate-twice": ("--adapted-rate 2", "", 1),
    # The student's rate is as good as none.
    "adapted-alone-first": ("--learning-rate 4e-12 --adapted-rate 1e8 --ema-halflife 0", "", 0.05),
    "adapted-alone": ("", "adapted-alone-first", 0.95),
    "rate-to-zero": ("--final-rate 0", "", 1),
    "rate-constant": ("--final-rate 1", "", 1),
    "rate-twice": ("--learning-rate 8e-4", "", 1),
    "dm": ("--loss dm", "", 1),
    "dm-low-noise": ("--loss dm --noise-range 0.02 0.7", "", 1),
    "sid-low-noise": ("--noise-range 0 0.6", "", 1),
    "sid-high-noise": ("--noise-range 0.2 0.9", "", 1),
    "batch-half": ("--batch 64", "", 1),
    "batch-twice": ("--batch 256", "", 1),
    "batch-grows-first": ("--batch 64 --final-rate 0.5", "", 0.5),
    "batch-grows": ("--batch 256 --learning-rate 2e-4", "batch-grows-first", 0.5)}
# Whole: the published methods as their rows are, and fast.
WHOLE = {"pmdd": (3, ""), "fast": (3, "--variant fast"), "dmd": (1, "--method dmd"),
         "dmd2": (1, "--method dmd2"), "sid": (1, "--method sid")}


def runs_of(dataset):
    found = {f"{dataset}-{name}": Run(f"--dataset {dataset} --stage 1 {flags}".strip(),
                                      f"{dataset}-{after}" * bool(after))
             for name, (flags, after, _) in CHANGES.items()}
    for name, (stages, flags) in WHOLE.items():
        for k in range(1, stages + 1):
            found[f"{dataset}-{name}-{k}"] = Run(f"--dataset {dataset} --stage {k} {flags}".strip(),
                                                 f"{dataset}-{name}-{k - 1}" * (k > 1))
    return found


def split(name):
    """(study, name within it)"""
    dataset, _, rest = name.partition("-")
    return STUDIES[dataset], rest


@cache
def passes_of(flags, iterations):
    (_, config, options), = stages_of(shlex.split(flags))
    return Passes(iteration, config, options.network).until(iterations)


def iterations(name):
    """Of a change of stage 1: as many as have its share of the row's passes."""
    study, change = split(name)
    row, sample = f"--dataset {name.split('-')[0]} --stage 1", 100
    each = passes_of(PLAN.runs[name].flags, sample) / sample
    return round(CHANGES[change][2] * passes_of(row, study.iterations) / each / 10) * 10


def commands(plan, name, seed):
    """What makes a run and its figures."""
    (study, change), row = split(name), plan.runs[name]
    length, start = "", f" --start-from {plan.best(row.after, seed)}" if row.after else ""
    if change in CHANGES:
        count = iterations(name)
        length = f" --iterations {count} --evaluate-every {max(count // 4, 1)}"
    return [f"python train.py {row.flags}{start}{length} --seed {seed} "
            f"--folder {plan.work / name / f'seed{seed}'}",
            f"python evaluate.py --checkpoint {plan.best(name, seed)} --n {study.images} "
            f"--out {plan.record(name, seed)}"]


PLAN = Plan({name: one for dataset in STUDIES for name, one in runs_of(dataset).items()}, commands,
            "digits-FID", "right_class", Path("results/recipes"), Path("runs/recipes"))


# ---- Tables and the picture ----

def changes(dataset="digits"):
    """One change at a time, at equal passes."""
    followed = {after for _, after, _ in CHANGES.values()}
    return markdown(["stage 1", "flags", "digits-FID", "right class"],
                    [PLAN.row(name, f"{dataset}-{name}", 1)[:1] + [f"`{flags or '-'}`"]
                     + PLAN.row(name, f"{dataset}-{name}", 1)[1:]
                     for name, (flags, _, _) in CHANGES.items() if name not in followed])


def spent(name, seed):
    """(passes, quality at the run's own number of steps) of each evaluation, its stages before it
    included."""
    folder, before = ROOT / PLAN.record(name, seed).parent, 0
    if PLAN.runs[name].after:
        before = spent(PLAN.runs[name].after, seed)[-1][0]
    config, lines = read_run(folder)
    key = f"{split(name)[0].metric}@{config.stage}"
    return [(before + at, line[key]) for at, line in
            zip(positions(config, lines, "passes", folder), lines) if key in line]


def whole(dataset="digits"):
    """The whole recipes: passes and what they came to."""
    rows = []
    for name, (stages, _) in WHOLE.items():
        for k in range(1, stages + 1):
            full = f"{dataset}-{name}-{k}"
            done = PLAN.done(full)
            passes = spread([spent(full, seed)[-1][0] / 1e6 for seed in done[:1]],
                            "{:.1f}").removesuffix(" (one seed)") if done else "not run"
            rows.append([f"{name}, {steps_text(k)}", passes, *PLAN.row("", full, k)[1:]])
    return markdown(["recipe", "million passes", "digits-FID", "right class"], rows)


def draw(dataset="digits"):
    """Quality of each recipe's own number of steps against the passes so far."""
    plt = matplotlib_pyplot()
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for number, (name, (stages, _)) in enumerate(WHOLE.items()):
        full = [f"{dataset}-{name}-{k}" for k in range(1, stages + 1)]
        for seed in PLAN.done(full[0]):
            points = [point for one in full if seed in PLAN.done(one) for point in spent(one, seed)]
            axis.plot(*zip(*points), color=f"C{number}", linewidth=1, marker=".",
                      label=name if seed == PLAN.done(full[0])[0] else None)
    axis.set(xlabel="network passes", ylabel=STUDIES[dataset].metric, yscale="log")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(ROOT / PLAN.kept / f"{dataset}.png", dpi=100)
    plt.close(figure)


def main():
    args = parse("recipes.py", __doc__, PLAN)
    if args.pictures:
        for dataset in STUDIES:
            draw(dataset)
    else:
        run_all(args, PLAN)
    return 0


if __name__ == "__main__":
    run(main)
