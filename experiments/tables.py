"""The papers' tables on the embedded digits: the runs behind them, and the tables made of these.

    python -m experiments.tables                make the runs that results/tables has not
    python -m experiments.tables --only dmd2 --seeds 0
    python -m experiments.tables --pictures     results/*.png of them (needs matplotlib)
    python -m experiments.tables --again --only pmdd-1 --seeds 0      make once more and compare

Each run is one command of train.py and one of evaluate.py, on one thread; its small files are kept
under results/tables/<run>/seed<k>/, its checkpoints under runs/tables.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from base.errors import Parser, RunFailed, UserError, run
from base.files import ROOT, read_json, write_json
from metrics.evaluations import read_records
from training.run_folder import read_metrics

KEPT, WORK = Path("results/tables"), Path("runs/tables")
AGAIN = Path("runs/tables-again")       # what is made a second time, to be compared
SEEDS = (0, 1, 2)
ITERATIONS = 1500                       # of a stage; n steps trained together have n times as many
IMAGES = 20_000                         # of each figure
COMMON = "--final-rate 1 --ema-halflife 4000 --evaluate-every 250 --evaluate-images 2000"


@dataclass(frozen=True)
class Run:
    flags: str                          # of train.py, beyond COMMON
    after: str = ""                     # the run whose best.pt it starts from
    seeds: tuple = SEEDS
    stages: int = 1                     # whose iterations it has

    @property
    def stage(self):
        words = self.flags.split()
        return int(words[words.index("--stage") + 1]) if "--stage" in words else 1


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


# ---- Running ----

def commands(name, seed, kept=KEPT, work=WORK):
    """What makes a run and its figures, as a person would type it."""
    row, folder = RUNS[name], work / name / f"seed{seed}"
    start = f" --start-from {best(row.after, seed, work)}" if row.after else ""
    figures = kept / name / f"seed{seed}" / "evaluation.json"
    return [f"python train.py {row.flags}{start} --iterations {row.stages * ITERATIONS} {COMMON} "
            f"--seed {seed} --folder {folder}",
            f"python evaluate.py --checkpoint {best(name, seed, work)} --n {IMAGES} "
            f"--out {figures}"]


def best(name, seed, work=WORK):
    return work / name / f"seed{seed}" / f"stage{RUNS[name].stage}" / "best.pt"


def make(name, seed, needed, places):
    """Run, unless its figures are there from the same commands; keep the small files."""
    if needed:
        needed.result()
    kept, work = places
    text = "\n".join(commands(name, seed, *places)) + "\n"
    kept = ROOT / kept / name / f"seed{seed}"
    if (kept / "evaluation.json").exists() and (kept / "commands.txt").read_text() == text:
        return
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "evaluation.json").unlink(missing_ok=True)
    began = time.monotonic()
    for command in text.splitlines():
        done = subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=ROOT, text=True,
                              capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise RunFailed(f"{command}: exit code {done.returncode}: {done.stderr[-500:]}")
        (kept / "commands.txt").write_text(text)
    for file in ("config.json", "metrics.jsonl"):
        shutil.copy(ROOT / best(name, seed, work).with_name(file), kept / file)
    print(f"{name}, seed {seed}: {(time.monotonic() - began) / 60:.1f} minutes, "
          f"digits-FID {score(name, seed, kept=places[0]):.3f}", flush=True)


def make_all(names, seeds, jobs, *places):
    with ThreadPoolExecutor(jobs) as pool:
        started = {}
        for seed in seeds:                                  # whole tables of one seed first
            for name in names:
                if seed in RUNS[name].seeds:
                    needed = started.get((RUNS[name].after, seed))
                    started[name, seed] = pool.submit(make, name, seed, needed, places)
        try:
            failed = [str(one.exception()) for one in started.values() if one.exception()]
        except KeyboardInterrupt:                           # those that run end, no other begins
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        raise RunFailed(failed[0])


def make_teacher_rows():
    if not (ROOT / KEPT / "teacher.json").exists():
        subprocess.run([sys.executable, *HEUN.split(), "--n", str(IMAGES), "--out",
                        str(KEPT / "teacher.json")], cwd=ROOT, check=True)


def make_again(names, seeds, jobs):
    """A second time, in a folder of its own; what is equal to the record is recorded too."""
    shutil.rmtree(ROOT / AGAIN, ignore_errors=True)
    make_all(names, seeds, jobs, AGAIN / "kept", AGAIN / "work")
    found = [{"run": name, "seed": seed,
              **{what: read(name, seed, KEPT) == read(name, seed, AGAIN / "kept")
                 for what, read in (("figures", all_scores), ("metrics", all_metrics))}}
             for name in names for seed in seeds if seed in RUNS[name].seeds]
    path = ROOT / KEPT / "again.json"
    made = [(one["run"], one["seed"]) for one in found]
    kept = [one for one in (read_json(path) if path.exists() else [])
            if (one["run"], one["seed"]) not in made]
    write_json(path, sorted(kept + found, key=lambda one: (list(RUNS).index(one["run"]),
                                                           one["seed"])))


def all_scores(name, seed, kept):
    path = ROOT / kept / name / f"seed{seed}" / "evaluation.json"
    return [(entry["evaluations"], entry["figures"]) for entry in read_records(path)]


def all_metrics(name, seed, kept):
    """Every line of the run's log, but for its speed."""
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "seconds_left")}
            for line in read_metrics(ROOT / kept / name / f"seed{seed}" / "metrics.jsonl")]


def score(name, seed, steps=None, what="digits-FID", kept=KEPT):
    """Of a run at its own number of steps, or at fewer."""
    for evaluations, scores in all_scores(name, seed, kept):
        if evaluations == (steps or RUNS[name].stage):
            return scores[what]["mean"]
    raise UserError(f"{KEPT / name} has no scores at {steps} steps")


# ---- Command ----

def main():
    parser = Parser(prog="tables.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="RUN", default=list(RUNS),
                        help=f"these runs alone: {', '.join(RUNS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="K",
                        help="of training (default: 0 1 2)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(),
                        help="runs at the same time, a thread each (default: one a core)")
    parser.add_argument("--again", action="store_true",
                        help="make the runs a second time and compare them with the recorded ones")
    parser.add_argument("--pictures", action="store_true",
                        help="draw results/*.png and run nothing")
    args = parser.parse_args()
    unknown = sorted(set(args.only) - set(RUNS))
    if unknown:
        raise UserError(f"--only {' '.join(unknown)}: there is {', '.join(RUNS)}")
    if not any(seed in RUNS[name].seeds for name in args.only for seed in args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: none of these runs has one of "
                        f"them; there is {' '.join(map(str, SEEDS))}")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be at least 1")
    if args.pictures:
        from experiments.plots import draw_all
        draw_all()
    elif args.again:
        make_again(args.only, args.seeds, args.jobs)
    else:
        make_all(args.only, args.seeds, args.jobs, KEPT, WORK)
        make_teacher_rows()
    return 0


if __name__ == "__main__":
    run(main)
