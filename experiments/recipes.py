"""What brings a student to its teacher sooner: PMDD's rows, changed one thing at a time.

    python -m experiments.recipes                   make the runs that results/recipes has not
    python -m experiments.recipes --only digits-row digits-noises-2 --seeds 0
    python -m experiments.recipes --pictures        pictures of them (needs matplotlib)

All changes have the same network passes, counted by training.passes; the whole recipes
have their own. Each run is a command of train.py and one of evaluate.py, on one thread.
"""

import shlex
from functools import cache
from pathlib import Path
from typing import NamedTuple

from base.errors import run
from base.files import ROOT
from experiments.compare import positions, read_run
from experiments.recorded_runs import Plan, Run, form_of, markdown, parse, run_all, spread
from images.pictures import matplotlib_pyplot
from metrics.evaluations import read_records
from presets.rows import PRESETS, find
from train import iteration
from training.options import parse as stages_of
from training.passes import Passes


class Study(NamedTuple):
    """What is distilled, how far, and how it is scored."""
    metric: str
    share: str                  # the second figure
    iterations: int             # of the row's stage 1: their passes are what every change has
    images: int                 # of a figure of a change
    all_images: int             # of a figure of a whole recipe: as many as the embedded student's
    fewer: int                  # updates of the adapted network for one of the student: TTUR
    more: int
    only: dict                  # changes that only this one has
    embedded: str               # the record of the embedded student
    near: str                   # flags of a later stage that looks at no noise far above its own
    far: str                    # and of one that does


STUDIES = {
    "digits": Study("digits-FID", "right_class", 500, 20_000, 50_000, 1, 5, {
        "dm": ("--loss dm", "", 1), "dm-low-noise": ("--loss dm --noise-range 0.02 0.7", "", 1),
        "dm-ttur-more": ("--loss dm --ttur 5", "", 1),
        "dm-near": ("--stage 2 --loss dm --noise-range 0.02 0.7", "dm", 1),
        "dm-far": ("--stage 2 --loss dm", "dm", 1),
        "sid-low-noise": ("--noise-range 0 0.6", "", 1),
        "sid-high-noise": ("--noise-range 0.2 0.9", "", 1)},
        "results/embedded/evaluation.json", near="--noise-range 0 0.6", far=""),
    "emoji": Study("emoji-FID", "right_picture", 240, 2_000, 2_000, 2, 10, {
        "dm-low-noise": ("--noise-range 0.02 0.8", "", 1),
        "dm-low-noise-ttur-fewer": ("--noise-range 0.02 0.8 --ttur 2", "", 1),
        "dm-high-noise": ("--noise-range 0.2 0.98", "", 1)},
        "results/emoji/embedded/training.json", near="", far="--noise-range 0.02 0.98")}


def changes_of(dataset):
    """Of stage 1, and of stage 2 after it: name -> (flags, the run that comes first, its share of
    the passes)."""
    study, row = STUDIES[dataset], find(dataset, "pmdd", 1).config
    rate, batch = row.learning_rate, row.batch
    near, far = (f"--stage 2 {flags}".strip() for flags in (study.near, study.far))
    # In two halves: the second goes on at the rate that the first has reached.
    halves = {"ttur-falls": (f"--ttur {study.more}", f"--ttur {study.fewer}"),
              "ttur-rises": (f"--ttur {study.fewer}", f"--ttur {study.more}"),
              "batch-grows": (f"--batch {batch // 2}", f"--batch {2 * batch}")}
    return {
        "row": ("", "", 1),
        "noises-2": ("--adapted-noises 2", "", 1), "noises-4": ("--adapted-noises 4", "", 1),
        # As many updates of the adapted network, and a roll-out less.
        "noises-2-ttur-fewer": (f"--adapted-noises 2 --ttur {study.fewer}", "", 1),
        "ttur-fewer": (f"--ttur {study.fewer}", "", 1),
        "ttur-more": (f"--ttur {study.more}", "", 1),
        "adapted-rate-half": ("--adapted-rate 0.5", "", 1),
        "adapted-rate-twice": ("--adapted-rate 2", "", 1),
        # The student's rate is as good as none.
        "adapted-alone-first": ("--learning-rate 4e-12 --adapted-rate 1e8 --ema-halflife 0", "",
                                0.05),
        "adapted-alone": ("", "adapted-alone-first", 0.95),
        "rate-to-zero": ("--final-rate 0", "", 1), "rate-constant": ("--final-rate 1", "", 1),
        "rate-twice": (f"--learning-rate {2 * rate:g}", "", 1),
        "batch-half": (f"--batch {batch // 2}", "", 1),
        "batch-twice": (f"--batch {2 * batch}", "", 1),
        **study.only,
        **{f"{name}-first": (f"{first} --final-rate 0.5", "", 0.5)
           for name, (first, _) in halves.items()},
        **{name: (f"{second} --learning-rate {rate / 2:g}", f"{name}-first", 0.5)
           for name, (_, second) in halves.items()},
        "near": (near, "row", 1), "far": (far, "row", 1),
        # Both stages of `near` in as many passes, divided otherwise.
        "early-first": ("", "", 0.5), "late-first": ("", "", 1.5),
        "early": (near, "early-first", 1.5), "late": (near, "late-first", 0.5)}


CHANGES = {dataset: changes_of(dataset) for dataset in STUDIES}
# Whole: the published methods as their rows are, and fast; beside them what was made elsewhere, by
# PMDD's rows.
EMBEDDED = "the embedded student"
WHOLE = {"pmdd": (3, ""), "fast": (3, "--variant fast"), "dmd": (1, "--method dmd"),
         "dmd2": (1, "--method dmd2"), "sid": (1, "--method sid")}


def flags_of(dataset, flags):
    stage = "" if "--stage" in flags else " --stage 1"
    return f"--dataset {dataset}{stage} {flags}".strip()


def runs_of(dataset):
    found = {f"{dataset}-{name}": Run(flags_of(dataset, flags), f"{dataset}-{after}" * bool(after))
             for name, (flags, after, _) in CHANGES[dataset].items()}
    for name, (stages, flags) in WHOLE.items():
        for k in range(1, stages + 1):
            found[f"{dataset}-{name}-{k}"] = Run(f"--dataset {dataset} --stage {k} {flags}".strip(),
                                                 f"{dataset}-{name}-{k - 1}" * (k > 1))
    return found


def split(name):
    """(data set, name within it)"""
    dataset, _, rest = name.partition("-")
    return dataset, rest


@cache
def passes_of(flags, iterations):
    (_, config, _), = stages_of(shlex.split(flags))
    return Passes(iteration, config).until(iterations)


def passes_in_all(config, sample=100):
    """By a sample of its iterations: the published runs have millions."""
    passes = Passes(iteration, config)
    pairs = passes.total
    return pairs + (passes.until(sample) - pairs) / sample * config.iterations


def iterations(name):
    """Of a change: as many as have its share of the passes of the row's stage 1."""
    (dataset, change), sample = split(name), 100
    each = passes_of(PLANS[dataset].runs[name].flags, sample) / sample
    share = CHANGES[dataset][change][2]
    return round(share * passes_of(flags_of(dataset, ""), STUDIES[dataset].iterations) / each)


def commands(plan, name, seed):
    """What makes a run and its figures."""
    (dataset, change), row = split(name), plan.runs[name]
    length, images = "", STUDIES[dataset].all_images
    start = f" --start-from {plan.best(row.after, seed)}" if row.after else ""
    if change in CHANGES[dataset]:
        count = iterations(name)
        images = STUDIES[dataset].images
        length = f" --iterations {count} --evaluate-every {max(count // 2, 1)}"
    return [f"python train.py {row.flags}{start}{length} --seed {seed} "
            f"--folder {plan.work / name / f'seed{seed}'}",
            f"python evaluate.py --checkpoint {plan.best(name, seed)} "
            f"--n {images} --out {plan.record(name, seed)}"]


PLANS = {dataset: Plan(runs_of(dataset), commands, study.metric, study.share,
                       Path("results/recipes") / dataset, Path("runs/recipes") / dataset)
         for dataset, study in STUDIES.items()}


# ---- Tables and the picture ----

def changes(dataset):
    """One change at a time, at equal passes."""
    plan, rows = PLANS[dataset], []
    for name, (flags, _, _) in CHANGES[dataset].items():
        if not name.endswith("-first"):
            full = f"{dataset}-{name}"
            rows.append([name, f"`{flags or '-'}`", *plan.row("", full, plan.runs[full].stage)[1:]])
    return markdown(["change", "flags", plan.metric, plan.share.replace("_", " ")], rows)


def stage_folders(dataset, name, seed):
    """The records of a whole recipe's stages, of those that have been run."""
    if name == EMBEDDED:
        return [ROOT / Path(STUDIES[dataset].embedded).with_name(f"stage{k}") for k in (1, 2, 3)]
    plan, full = PLANS[dataset], [f"{dataset}-{name}-{k + 1}" for k in range(WHOLE[name][0])]
    return [(ROOT / plan.record(one, seed)).parent for one in full if seed in plan.done(one)]


def spent(folders, metric):
    """(network passes so far, quality at the run's own number of steps) of each evaluation, of runs
    of which each goes on from the one before."""
    points, before = [], 0
    for folder in folders:
        config, lines = read_run(folder)
        key = f"{metric}@{config.stage}"
        points += [(before + at, line[key]) for at, line in
                   zip(positions(config, lines, "passes"), lines) if key in line]
        before = points[-1][0]
    return points


def whole(dataset):
    """The student of each recipe's stages, at all its steps."""
    plan, study = PLANS[dataset], STUDIES[dataset]
    scores = {entry["evaluations"]: entry["figures"]
              for entry in read_records(ROOT / study.embedded)}
    rows = [[EMBEDDED, million(dataset, EMBEDDED, 0, 3),
             *(spread(scores[k][plan.metric]["values"], form_of(plan.metric)) for k in (1, 2, 3)),
             spread(scores[3][plan.share]["values"], form_of(plan.share))]]
    for name, (stages, _) in WHOLE.items():
        for k in range(1, stages + 1):
            full = f"{dataset}-{name}-{k}"
            done = plan.done(full)
            rows.append([f"{name}, stage {k}",
                         million(dataset, name, done[0], k) if done else "not run",
                         *(plan.cell(full, n) if n <= k else "-" for n in (1, 2, 3)),
                         plan.cell(full, k, plan.share)])
    return markdown(["student", "M passes", f"{plan.metric}: 1 step", "2", "3",
                     f"{plan.share.replace('_', ' ')}, the stage's steps"], rows)


def published_passes():
    """The papers' own runs: what each takes, alone and with those that it goes on from."""
    total, rows = {}, []
    for (dataset, method, stage, variant), row in PRESETS.items():
        if not stage or dataset in STUDIES:
            continue
        folder = Path("runs", "-".join(filter(None, (dataset, method, variant))))
        before = row.config.start_from or str(folder / f"stage{stage - 1}/best.pt")
        alone = passes_in_all(row.config)
        total[str(folder / f"stage{stage}/best.pt")] = whole = alone + total.get(before, 0)
        if row.paper_fid:
            rows.append([dataset, " ".join(filter(None, (method, variant))), str(stage),
                         f"{alone / 1e6:,.0f}", f"{whole / 1e6:,.0f}", f"{row.paper_fid:.2f}",
                         row.gpus, row.hours])
    return markdown(["data set", "method", "steps", "million passes", "with those before",
                     "paper's FID", "GPUs", "hours"], rows)


def million(dataset, name, seed, stages):
    """Network passes of these stages."""
    points = spent(stage_folders(dataset, name, seed)[:stages], PLANS[dataset].metric)
    return f"{points[-1][0] / 1e6:.2f}"


def draw(dataset):
    """Quality of each recipe's own number of steps against the passes so far."""
    plt, plan = matplotlib_pyplot(), PLANS[dataset]
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for number, name in enumerate([EMBEDDED, *WHOLE]):
        seeds = [0] if name == EMBEDDED else plan.done(f"{dataset}-{name}-1")
        for seed in seeds:
            points = spent(stage_folders(dataset, name, seed), plan.metric)
            axis.plot([at / 1e6 for at, _ in points], [value for _, value in points],
                      color=f"C{number}", linewidth=1, marker=".",
                      label=name if seed == seeds[0] else None)
    axis.set(xlabel="million network passes", ylabel=plan.metric, xscale="log", yscale="log")
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(plt.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        one.set_major_formatter("{x:g}")
        one.set_minor_locator(plt.NullLocator())
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    (ROOT / plan.kept).mkdir(parents=True, exist_ok=True)
    figure.savefig(ROOT / plan.kept / "passes.png", dpi=100)
    plt.close(figure)


def main():
    args = parse("python -m experiments.recipes", __doc__, *PLANS.values())
    for dataset, plan in PLANS.items():
        if args.pictures:
            draw(dataset)
        else:
            run_all(args, plan)
    return 0


if __name__ == "__main__":
    run(main)
