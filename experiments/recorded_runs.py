"""Runs that are made once, recorded, and made again to be compared.

Each is a few commands on one thread, as a person would type them; its small files are kept under
results/, its checkpoints under runs/.
"""

import argparse
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import numpy as np

from base.errors import Parser, RunFailed, UserError
from base.files import ROOT, read_json, write_json
from metrics.evaluations import read_records
from training.run_folder import CLOCKED, read_metrics

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Run:
    flags: str                          # of train.py, beyond those that all runs have
    after: str = ""                     # the run whose best.pt it starts from
    seeds: tuple = SEEDS
    stages: int = 1                     # whose iterations it has

    @property
    def stage(self):
        words = self.flags.split()
        return int(words[words.index("--stage") + 1]) if "--stage" in words else 1


@dataclass(frozen=True)
class Plan:
    """The runs behind a page of tables."""
    runs: dict                          # by name
    commands: Callable                  # plan, name, seed -> list; the last writes evaluation.json
    metric: str                         # the first of the figures
    share: str                          # and the second
    kept: Path
    work: Path

    @property
    def again(self):
        """Where everything is made a second time."""
        folder = self.work.with_name(f"{self.work.name}-again")
        return replace(self, kept=folder / "kept", work=folder / "work")

    def best(self, name, seed):
        return self.work / name / f"seed{seed}" / f"stage{self.runs[name].stage}" / "best.pt"

    def record(self, name, seed, file="evaluation.json"):
        return self.kept / name / f"seed{seed}" / file

    def text(self, name, seed):
        return "\n".join(self.commands(self, name, seed)) + "\n"

    def made(self, name, seed):
        """Whether its figures are there, from the same commands."""
        return ((ROOT / self.record(name, seed)).exists() and
                (ROOT / self.record(name, seed, "commands.txt")).read_text() ==
                self.text(name, seed))

    def done(self, name):
        """The seeds that have been run."""
        return [k for k in self.runs[name].seeds if (ROOT / self.record(name, k)).exists()]

    def scores(self, name, seed, file="evaluation.json"):
        return [(entry["evaluations"], entry["figures"])
                for entry in read_records(ROOT / self.record(name, seed, file))]

    def log(self, name, seed):
        """Every line of the run's log, but for its speed."""
        return [{k: v for k, v in line.items() if k not in CLOCKED}
                for line in read_metrics(ROOT / self.record(name, seed, "metrics.jsonl"))]

    def over_training(self, name, seed, key):
        """(iterations, values) of what the log tells under this name."""
        lines = [line for line in self.log(name, seed) if key in line]
        return [line["iteration"] for line in lines], [line[key] for line in lines]

    def score(self, name, seed, steps=None, what=None, file="evaluation.json"):
        """Of a run at its own number of steps, or at another number of evaluations."""
        for evaluations, scores in self.scores(name, seed, file):
            if evaluations == (steps or self.runs[name].stage):
                return scores[what or self.metric]["mean"]
        raise UserError(f"{self.kept / name} has no scores at {steps} steps")

    def cell(self, name, steps=None, what=None, file="evaluation.json"):
        """Mean over the seeds that have been run (least to most)."""
        done = self.done(name)
        values = [self.score(name, k, steps, what, file) for k in done]
        return spread(values, form_of(what or self.metric)) if done else "not run"

    def row(self, text, name, steps, *paper):
        return [text, self.cell(name, steps), self.cell(name, steps, self.share), *paper]

    def both(self, name, steps):
        return f"{self.cell(name, steps)}; {self.cell(name, steps, self.share)}"

    def compared(self):
        """What was made a second time, as a table."""
        path = ROOT / self.kept / "again.json"
        words = {True: "equal to the last digit", False: "differs"}
        return markdown(["run", "seed", "figures at every number of steps",
                         "every line of its log"],
                        [[f"`{one['run']}`", str(one["seed"]), words[one["figures"]],
                          words[one["metrics"]]]
                         for one in (read_json(path) if path.exists() else [])])


# ---- Text ----

def form_of(what):
    return "{:.3f}" if "FID" in what else "{:.1%}"


def spread(values, form):
    if len(values) == 1:
        return f"{form.format(values[0])} (one seed)"
    mean, least, most = (form.format(f(values)) for f in (np.mean, min, max))
    return f"{mean} ({least} to {most})"


def markdown(heading, rows):
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- Running ----

def make(plan, name, seed, others, needed=None):
    """Run, unless its figures are there from the same commands; keep the small files."""
    if needed:
        needed.result()
    commands = plan.commands(plan, name, seed)
    if plan.made(name, seed):
        if missed(plan, name, seed, others):
            execute(commands[0])
        return
    kept = ROOT / plan.kept / name / f"seed{seed}"
    kept.mkdir(parents=True, exist_ok=True)
    for old in kept.glob("*.json"):
        if old.name != "constant-average.json":             # of before, which nothing makes again
            old.unlink()
    began = time.monotonic()
    for command in commands:
        execute(command)
        (kept / "commands.txt").write_text(plan.text(name, seed))
    trained = (ROOT / plan.best(name, seed)).parent
    if trained.is_dir():                                    # a teacher is not trained here
        for file in ("config.json", "metrics.jsonl"):
            shutil.copy(trained / file, kept / file)
    evaluations, scores = plan.scores(name, seed)[-1]
    print(f"{name}, seed {seed}: {(time.monotonic() - began) / 60:.1f} minutes, "
          f"{plan.metric} {scores[plan.metric]['mean']:.3f} at {evaluations} "
          f"evaluation{'s' * (evaluations > 1)}",
          flush=True)


def missed(plan, name, seed, others):
    """Whether its checkpoint is gone, and a run that is yet to be made starts from it."""
    return not (ROOT / plan.best(name, seed)).exists() and any(
        not plan.made(other, seed) or missed(plan, other, seed, others) for other in others
        if plan.runs[other].after == name and seed in plan.runs[other].seeds)


def execute(command):
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RunFailed(f"{command}: exit code {done.returncode}: {done.stderr[-500:]}")


def make_all(plan, names, seeds, jobs):
    with ThreadPoolExecutor(jobs) as pool:
        started = {}
        for seed in seeds:                                  # whole tables of one seed first
            for name in names:
                if seed in plan.runs[name].seeds:
                    needed = started.get((plan.runs[name].after, seed))
                    started[name, seed] = pool.submit(make, plan, name, seed, names, needed)
        try:
            failed = [str(one.exception()) for one in started.values() if one.exception()]
        except KeyboardInterrupt:                           # those that run end, no other begins
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        raise RunFailed(failed[0])


def make_again(plan, names, seeds, jobs):
    """A second time, in a folder of its own, from the same checkpoint where the run before is not
    made again; what is equal to the record is recorded too."""
    second, wanted = plan.again, [(name, seed) for name in names for seed in seeds
                                  if seed in plan.runs[name].seeds]
    if unmade := [f"{name} of seed {seed}" for name, seed in wanted if seed not in plan.done(name)]:
        raise UserError(f"--again: there is no record of {', '.join(unmade)} to compare with")
    shutil.rmtree(ROOT / second.kept.parent, ignore_errors=True)
    for name, seed in wanted:
        before = plan.runs[name].after
        if before and before not in names and (ROOT / plan.best(before, seed)).exists():
            (ROOT / second.best(before, seed)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / plan.best(before, seed), ROOT / second.best(before, seed))
    make_all(second, names, seeds, jobs)
    found = [{"run": name, "seed": seed,
              "figures": plan.scores(name, seed) == second.scores(name, seed),
              "metrics": plan.log(name, seed) == second.log(name, seed)}
             for name, seed in wanted]
    path = ROOT / plan.kept / "again.json"
    made = [(one["run"], one["seed"]) for one in found]
    kept = [one for one in (read_json(path) if path.exists() else [])
            if (one["run"], one["seed"]) not in made]
    write_json(path, sorted(kept + found, key=lambda one: (list(plan.runs).index(one["run"]),
                                                           one["seed"])))


# ---- Command ----

def parse(prog, description, *plans):
    runs = {name: one for plan in plans for name, one in plan.runs.items()}
    parser = Parser(prog=prog, description=description,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="RUN", default=list(runs),
                        help=f"these runs alone: {', '.join(runs)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="K",
                        help="of training (default: 0 1 2)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(),
                        help="runs at the same time, a thread each (default: one a core)")
    parser.add_argument("--again", action="store_true",
                        help="make the runs a second time and compare them with the recorded ones")
    parser.add_argument("--pictures", action="store_true",
                        help="draw the pictures of them and run nothing")
    args = parser.parse_args()
    unknown = sorted(set(args.only) - set(runs))
    if unknown:
        raise UserError(f"--only {' '.join(unknown)}: there is {', '.join(runs)}")
    if not any(seed in runs[name].seeds for name in args.only for seed in args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: none of these runs has one of "
                        f"them; there is {' '.join(map(str, SEEDS))}")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be at least 1")
    return args


def run_all(args, plan):
    names = [name for name in plan.runs if name in args.only]   # each after what it starts from
    for name, seed in itertools.product(names, args.seeds):
        before = plan.runs[name].after
        if (before and before not in names and seed in plan.runs[name].seeds
                and not plan.made(before, seed)):
            raise UserError(f"{name} starts from {before} of seed {seed}, which is not made: add "
                            f"{before} to --only")
    if names:
        (make_again if args.again else make_all)(plan, names, args.seeds, args.jobs)
