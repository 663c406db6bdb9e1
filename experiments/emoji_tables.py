"""The papers' tables of text to image on the embedded emoji: the runs behind them, and the tables.

    python -m experiments.emoji_tables             make the runs that results/emoji/tables has not
    python -m experiments.emoji_tables --only teacher pmdd-1 --seeds 0
    python -m experiments.emoji_tables --pictures  results/emoji/*.png of them (needs matplotlib)
    python -m experiments.emoji_tables --again --only pmdd-1 --seeds 0    once more, and compare

Each run is a command of train.py and some of evaluate.py, on one thread; its small files are kept
under results/emoji/tables/<run>/seed<k>/, its checkpoints under runs/emoji-tables.
"""

from pathlib import Path

from base.errors import run
from base.files import ROOT
from experiments.recorded_runs import SEEDS, Plan, Run, form_of, markdown, parse, run_all, spread
from images.captioned import KINDS
from images.pictures import matplotlib_pyplot
from presets.rows import find
from weights.opening import steps_text

# What it all costs: 0.5 to 0.7, 0.8 to 1.0, 1.0 to 1.4 s an iteration of stages 1, 2, 3 on one
# thread, the less the fewer run beside it.
ITERATIONS = {1: 400, 2: 200, 3: 150}       # of a stage; steps trained together have their sum
LONG = 240                                  # of stage 2 where the unforget weight is compared
LONGER = 960                                # of two weights, at a rate that does not fall
PAIRS = 1_000                               # of DMD's regression
IMAGES, EACH = 2_000, 1_000                 # of each figure; of each kind of captions
SCORED = 1_000                              # images, twice in a run, four times in the long ones
HEUN, COARSE = "1 2 3 5 9 25", 9            # steps of the teacher: 2n - 1 evaluations
EVALUATIONS = 2 * COARSE - 1                # where there is one figure of it

GUIDANCE = find("emoji", "pmdd", 1).config.guidance
PAPER = "--guidance {} --noise-range 0.02 0.98"     # as PMDD has them: the rows of emoji differ
GUIDANCES = (1, 1.75, 3, 5, 8)
WEIGHTS = ("0", "0.01", "0.1", "0.3", "1", "3", "10")
SAMPLINGS = ("external-sampling", "no-external-sampling")
TO_THE_END = {f"beta-{beta}-longer": beta for beta in ("0", "0.3")}
HELD_OUT = tuple(kind for kind in KINDS if kind != "training")
ALL_KINDS = ("teacher", "pmdd-3")           # runs that are asked for every kind of captions


def guided(weight):
    """The one-step student of this guidance."""
    return "pmdd-1" if weight == GUIDANCE else f"guidance-{weight}"


RUNS = {
    "teacher": Run("", seeds=SEEDS[:1]),    # evaluated alone
    # DMD2 without GAN at one step is PMDD's stage 1, to the last flag.
    "pmdd-1": Run(f"--stage 1 --guidance {GUIDANCE}"),
    **{f"pmdd-{k}": Run(f"--stage {k} {PAPER.format(GUIDANCE)}", f"pmdd-{k - 1}") for k in (2, 3)},
    "unguided-2": Run(f"--stage 2 {PAPER.format(1)}", "pmdd-1"),
    "unguided-3": Run(f"--stage 3 {PAPER.format(1)}", "unguided-2"),
    **{f"dmd2-{k}": Run(f"--method dmd2 --stage {k}", stages=k) for k in (2, 3)},
    "dmd2-gan": Run("--method dmd2 --variant gan"),
    "dmd": Run(f"--method dmd --regression-pairs {PAIRS}"),
    "sid": Run("--method sid"),
    # One seed: the unforget weight, PMDD Table 6 and Figure 3; guidance.
    **{f"beta-{beta}-{sampling}": Run(f"--stage 2 {PAPER.format(GUIDANCE)} "
                                      f"--unforget-weight {beta} --{sampling}", "pmdd-1", SEEDS[:1])
       for beta in WEIGHTS for sampling in SAMPLINGS},
    **{name: Run(f"--stage 2 {PAPER.format(GUIDANCE)} --unforget-weight {beta} "
                 "--external-sampling --final-rate 1", "pmdd-1", SEEDS[:1])
       for name, beta in TO_THE_END.items()},
    **{guided(weight): Run(f"--stage 1 --guidance {weight}",
                           seeds=SEEDS if weight == 1 else SEEDS[:1])       # 1: of Table 2 too
       for weight in GUIDANCES if weight != GUIDANCE}}


# ---- Running ----

def iterations(name):
    """Of a run, and from one evaluation to the next."""
    if name in TO_THE_END:
        return LONGER, LONGER // 8
    if name.startswith("beta"):
        return LONG, LONG // 4
    stages = range(1, RUNS[name].stages + 1) if RUNS[name].stages > 1 else [RUNS[name].stage]
    total = sum(ITERATIONS[k] for k in stages)
    return total, total // 2


def commands(plan, name, seed):
    """What makes a run and its figures."""
    row = plan.runs[name]
    what = (f"--dataset emoji --guidance {GUIDANCE:g} --heun" if name == "teacher" else
            f"--checkpoint {plan.best(name, seed)}")
    kinds = [f"python evaluate.py {what}{f' {COARSE}' * (name == 'teacher')} --prompts {kind} "
             f"--n {EACH} --out {plan.record(name, seed, f'{kind}.json')}"
             for kind in HELD_OUT if name in ALL_KINDS]
    if name == "teacher":
        trade = [f"python evaluate.py --dataset emoji --heun {COARSE} --guidance {weight} "
                 f"--n {IMAGES} --out {plan.record(name, seed, f'guidance-{weight}.json')}"
                 for weight in GUIDANCES if weight != GUIDANCE]
        return [*kinds, *trade, f"python evaluate.py {what} {HEUN} --n {IMAGES} "
                                f"--out {plan.record(name, seed)}"]
    start = f" --start-from {plan.best(row.after, seed)}" if row.after else ""
    total, every = iterations(name)
    train = (f"python train.py --dataset emoji {row.flags}{start} --iterations {total} "
             f"--evaluate-every {every} --evaluate-images {SCORED} --seed {seed} "
             f"--folder {plan.work / name / f'seed{seed}'}")
    return [train, *kinds, f"python evaluate.py {what} --n {IMAGES} "
                           f"--out {plan.record(name, seed)}"]


PLAN = Plan(RUNS, commands, "emoji-FID", "right_picture", Path("results/emoji/tables"),
            Path("runs/emoji-tables"))
row, cell = PLAN.row, PLAN.cell


# ---- Tables ----

def emoji_methods():
    """PMDD Table 2."""
    rows = [row(f"PMDD, guidance {GUIDANCE:g}, {steps_text(k)}", f"pmdd-{k}", k, paper)
            for k, paper in ((1, "10.41; 0.302"), (2, "8.63; 0.30"), (3, "8.50; 0.302"))]
    rows += [row(f"PMDD, guidance {GUIDANCE:g}, then 1, {steps_text(k)}", f"unguided-{k}", k, paper)
             for k, paper in ((2, "-"), (3, "8.26; 0.298 (guidance 1)"))]
    rows += [row("PMDD, guidance 1, 1 step", guided(1), 1, "-")]
    rows += [row(f"DMD2 without GAN, {text}", name, k, paper) for k, name, text, paper in (
        (1, "pmdd-1", "1 step: PMDD's stage 1", "9.35; 0.304"),
        (2, "dmd2-2", "2 steps together", "10.44; 0.301"),
        (3, "dmd2-3", "3 steps together", "9.18; 0.303"))]
    rows += [row("DMD2 with GAN, 1 step", "dmd2-gan", 1, "8.35; 0.30"),
             row("DMD with regression, 1 step", "dmd", 1, "11.49; -"),
             row("sid, 1 step", "sid", 1, "no gain")]
    return markdown(["", "emoji-FID", "right picture", "paper, COCO: FID; CLIP score"],
                    rows + teacher_rows())


def teacher_rows():
    return [[f"teacher, guidance {GUIDANCE:g}, {evaluations} evaluation{'s' * (evaluations > 1)}",
             *(spread(figures[what]["values"], form_of(what)) for what in (PLAN.metric,
                                                                          PLAN.share)), "-"]
            for seed in PLAN.done("teacher") for evaluations, figures in PLAN.scores("teacher",
                                                                                   seed)]


def emoji_budgets():
    """PMDD Table 3."""
    rows = [[text, *(PLAN.both(name, k) for k in (3, 2, 1))]
            for text, name in (("DMD2 without GAN", "dmd2-3"), ("PMDD", "pmdd-3"))]
    return markdown(["three-step student sampled at", "3 steps", "2 steps", "1 step"], rows + [
        ["paper, COCO: DMD2 without GAN", "9.18", "10.36", "23.32"],
        ["paper, COCO: PMDD", "8.50", "10.07", "12.65"]])


def emoji_unforget_weights():
    """PMDD Table 6: of the best checkpoint, and the share of right pictures as training ends."""
    paper = {"0.3": "8.57 / 11.81 / 8.63 / 11.67", "1": "8.66 / 11.52 / 8.79 / 11.42",
             "3": "8.61 / 10.50 / 8.89 / 10.98", "10": "9.00 / 9.99 / 9.44 / 10.07"}
    rows = [[weight, *(PLAN.both(f"beta-{weight}-{sampling}", k) for sampling in SAMPLINGS
                       for k in (2, 1)),
             "; ".join(at_the_end(f"beta-{weight}-{sampling}") for sampling in SAMPLINGS),
             paper.get(weight, "-")] for weight in WEIGHTS]
    return of_one_seed(["beta", "external: 2 steps", "external: 1 step", "own: 2 steps",
                        "own: 1 step", "2, 1 steps at the end: external; own",
                        "paper, COCO: these four"], rows)


def of_one_seed(heading, rows):
    """As the page says beside it."""
    return markdown(heading, rows).replace(" (one seed)", "")


def at_the_end(name):
    if not PLAN.done(name):
        return "not run"
    ends = [PLAN.over_training(name, 0, f"right_picture@{k}")[1][-1] for k in (2, 1)]
    return ", ".join(f"{value:.1%}" for value in ends)


def emoji_unforget_longer():
    """What becomes of a weight of 0 in the end."""
    _, each = iterations(next(iter(TO_THE_END)))
    rows = [[weight, steps_text(k), *over_time(name, k)]
            for name, weight in TO_THE_END.items() for k in (2, 1)]
    return markdown(["beta", "sampled at", *map(str, range(each, LONGER + 1, each))], rows)


def over_time(name, steps):
    if not PLAN.done(name):
        total, each = iterations(name)
        return ["not run"] * (total // each)
    pairs = (PLAN.over_training(name, 0, f"{what}@{steps}")[1]
             for what in (PLAN.metric, PLAN.share))
    return [f"{fid:.1f}; {share:.1%}" for fid, share in zip(*pairs)]


def file_of(weight):
    """Where the teacher's figures of this guidance are."""
    return "evaluation.json" if weight == GUIDANCE else f"guidance-{weight}.json"


def emoji_guidance():
    """What the papers draw with the CLIP score."""
    def of_teacher(weight):
        return [cell("teacher", EVALUATIONS, what, file_of(weight))
                for what in (PLAN.metric, PLAN.share)]

    return of_one_seed(
        ["guidance", f"teacher, {EVALUATIONS} evaluations: emoji-FID", "right picture",
         "one step: emoji-FID", "right picture"],
        [[f"{weight:g}", *of_teacher(weight), *row("", guided(weight), 1)[1:]]
         for weight in GUIDANCES])


def emoji_held_out():
    """Right pictures for captions of every kind."""
    rows = [(f"teacher, {EVALUATIONS} evaluations", "teacher", EVALUATIONS)]
    rows += [(f"student, {steps_text(k)}", "pmdd-3", k) for k in (3, 2, 1)]
    return markdown(
        ["right picture", *(kind.replace("-", " ") for kind in HELD_OUT)],
        [[text, *(cell(name, steps, "right_picture", f"{kind}.json") for kind in HELD_OUT)]
         for text, name, steps in rows])


TABLES = {f.__name__: f for f in (emoji_methods, emoji_budgets, emoji_unforget_weights,
                                  emoji_unforget_longer, emoji_guidance, emoji_held_out)}
TABLES["emoji_again"] = PLAN.compared


# ---- Pictures ----

def draw_all():
    """PMDD Figure 3, and guidance's trade-off."""
    plt = matplotlib_pyplot()
    figure, axes = plt.subplots(3, 2, figsize=(9, 9), layout="constrained")
    runs = {sampling: {f"beta-{weight}-{sampling}": weight for weight in WEIGHTS}
            for sampling in SAMPLINGS}
    panels = [(k, text, PLAN.metric, runs[sampling]) for k in (2, 1) for sampling, text in
              zip(SAMPLINGS, ("external sampling", "own sampling"))]
    panels += [(k, "external sampling, longer", PLAN.share, TO_THE_END) for k in (2, 1)]
    for axis, (k, text, what, weights) in zip(axes.flat, panels):
        for name, weight in weights.items():
            if PLAN.done(name):
                axis.plot(*PLAN.over_training(name, 0, f"{what}@{k}"), marker=".",
                          color=f"C{WEIGHTS.index(weight)}", label=f"beta {weight}")
        axis.set(title=f"{steps_text(k)}, {text}", ylabel=what.replace("_", " "),
                 xlabel="iterations")
    save(figure, axes.flat, "unforget.png")

    figure, axis = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
    for text, points in trade_offs().items():
        axis.plot(*zip(*points.values()), label=text, marker="o")
        for weight, point in points.items():
            axis.annotate(f"{weight:g}", point, (5, 5), textcoords="offset points", fontsize=8)
    axis.margins(0.12)
    axis.set(xlabel="right picture", ylabel="emoji-FID")
    save(figure, [axis], "guidance.png")


def trade_offs():
    """Guidance -> (right picture, emoji-FID), of the teacher and of the one-step student."""
    found = {}
    for weight in GUIDANCES:
        for text, name, steps, file in (("teacher", "teacher", EVALUATIONS, file_of(weight)),
                                        ("student, 1 step", guided(weight), 1, "evaluation.json")):
            if PLAN.done(name):
                found.setdefault(text, {})[weight] = [PLAN.score(name, 0, steps, what, file)
                                                      for what in (PLAN.share, PLAN.metric)]
    return found


def save(figure, axes, name):
    for axis in axes:
        if axis.lines:
            axis.legend(fontsize=8)
    path = ROOT / "results" / "emoji" / name
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


def main():
    args = parse("python -m experiments.emoji_tables", __doc__, PLAN)
    if args.pictures:
        draw_all()
    else:
        run_all(args, PLAN)
    return 0


if __name__ == "__main__":
    run(main)
