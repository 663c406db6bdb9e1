"""The papers' tables on the embedded digits: the runs behind them, and the tables made of these.

    python -m experiments.tables                make the runs that results/tables has not
    python -m experiments.tables --only dmd2 --seeds 0
    python -m experiments.tables --pictures     results/*.png of them (needs matplotlib)
    python -m experiments.tables --again --only pmdd-1 --seeds 0      make once more and compare

Each run is one command of train.py and one of evaluate.py, on one thread; its small files are kept
under results/tables/<run>/seed<k>/, its checkpoints under runs/tables.
"""

from pathlib import Path

from base.errors import run
from base.files import ROOT
from experiments.recorded_runs import SEEDS, Plan, Run, execute, parse, run_all

ITERATIONS = 1500                       # of a stage; n steps trained together have n times as many
IMAGES = 20_000                         # of each figure
COMMON = ("--final-rate 1 --ema-halflife 4000 --ema-rampup 0.1 --evaluate-every 250 "
          "--evaluate-images 2000")


def stage(k, flags, after, beta="1", seeds=SEEDS):
    unforget = f"--unforget-weight {beta} " if k > 1 else ""
    return Run(f"--stage {k} --ttur 5 {unforget}{flags}".strip(), after, seeds)


RUNS = {
    # One step: each is one row of the papers' ablations.
    "dmd": Run("--method dmd"),
    "dmd-no-regression": Run("--method dmd --regression-weight 0"),
    "dmd-no-dm": Run("--method dmd --loss none"),
    "dmd2-no-gan": Run("--method dmd2 --gan-weight 0"),
    "dmd2": Run("--method dmd2"),
    "gan-alone": Run("--method dmd2 --loss none"),
    "sid": Run("--method sid"),
    "pmdd-1": stage(1, "", ""),
    # More steps. DMD2 without GAN at one step is PMDD's stage 1 with dm, to the last flag.
    "pmdd-2": stage(2, "", "pmdd-1"),
    "pmdd-dm-2": stage(2, "--loss dm", "dmd2-no-gan"),
    "dmd2-2": Run("--method dmd2 --stage 2 --gan-weight 0", stages=2),
    "pmdd-3": stage(3, "", "pmdd-2"),
    "pmdd-dm-3": stage(3, "--loss dm", "pmdd-dm-2"),
    "dmd2-3": Run("--method dmd2 --stage 3 --gan-weight 0", stages=3),
    # Two steps, PMDD Table 4.
    "two-none": stage(2, "--loss dm --no-external-sampling", "dmd2-no-gan", beta="0"),
    "two-unforget": stage(2, "--loss dm --no-external-sampling", "dmd2-no-gan"),
    # TTUR, DMD2 appendix C.
    "dm-ttur-10": Run("--method dmd2 --gan-weight 0 --ttur 10"),
    # Sample weightings, DMD Table 2 right: one seed.
    "dmd-sigma": Run("--method dmd --dm-weighting sigma", seeds=SEEDS[:1]),
    "dmd-sigma3": Run("--method dmd --dm-weighting sigma3", seeds=SEEDS[:1]),
    # The unforget weight, PMDD Table 6 and Figure 2: one seed.
    **{f"beta-{beta}-{sampling}": stage(2, f"--{sampling}", "pmdd-1", beta, SEEDS[:1])
       for beta in ("0", "0.3", "1", "3", "10")
       for sampling in ("external-sampling", "no-external-sampling")
       if (beta, sampling) != ("1", "external-sampling")}}             # that one is pmdd-2
HEUN = "evaluate.py --dataset digits --heun 1 2 3 18 --repeats 3"


def commands(plan, name, seed):
    """What makes a run and its figures."""
    row, folder = plan.runs[name], plan.work / name / f"seed{seed}"
    start = f" --start-from {plan.best(row.after, seed)}" if row.after else ""
    return [f"python train.py {row.flags}{start} --iterations {row.stages * ITERATIONS} {COMMON} "
            f"--seed {seed} --folder {folder}",
            f"python evaluate.py --checkpoint {plan.best(name, seed)} --n {IMAGES} "
            f"--out {plan.record(name, seed)}"]


PLAN = Plan(RUNS, commands, "digits-FID", "right_class", Path("results/tables"),
            Path("runs/tables"))


def make_teacher_rows():
    if not (ROOT / PLAN.kept / "teacher.json").exists():
        execute(f"python {HEUN} --n {IMAGES} --out {PLAN.kept / 'teacher.json'}")


def main():
    args = parse("python -m experiments.tables", __doc__, PLAN)
    if args.pictures:
        from experiments.plots import draw_all
        draw_all()
        return 0
    run_all(args, PLAN)
    if not args.again:
        make_teacher_rows()
    return 0


if __name__ == "__main__":
    run(main)
