"""A run is its own record: the folder, its configuration, metrics, sample grids, checkpoints."""

import contextlib
import dataclasses
import fcntl
import json
import math
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from base import distributed
from weights.checkpoint import save, save_latest, write_atomically
from base.errors import RunFailed, UserError
from models import sample_heun, sample_seeds, sample_student, to_uint8
from images.pictures import draw_curves, grid, save_png
from training.roles import payload

LOG_EVERY = 5                   # student updates between two lines of metrics.jsonl


def open_run(folder, config, options):
    """Make or reopen a run's folder; refuse one that another preset made or that is in use.

    Returns its lock, to be kept while it runs, and the folders that were made.
    """
    if distributed.rank() > 0:
        distributed.barrier()
        return None, []
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another "
                        "--folder") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)    # the kernel frees it when we die
    except OSError:
        raise UserError(f"another process is training in {folder}; wait for it or choose another "
                        "--folder") from None
    for leftover in folder.glob(".*.tmp"):                  # of a run killed while it saved
        leftover.unlink(missing_ok=True)
    path, (now, how) = folder / "config.json", as_json(config, options)
    started = any(folder.glob("*.pt")) or (folder / "metrics.jsonl").exists()
    if path.exists() and started and not options.force:
        try:
            written = json.loads(path.read_text())
            before, before_how = written.get("config"), written.get("options")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, AttributeError):
            before = before_how = None
        if not (isinstance(before, dict) and isinstance(before_how, dict)):
            raise UserError(f"{path} holds no configuration of a run; --force writes a new one")
        wanted = now | {k: how[k] for k in ("data", "reference", "inception")}
        changed = [f"{k} (was {was.get(k)!r}, now {wanted[k]!r})" for k in wanted
                   for was in [before if k in now else before_how] if was.get(k) != wanted[k]]
        if changed:
            raise UserError(f"{folder} was started with another preset: {', '.join(changed)}; "
                            "--force goes on all the same, another --folder starts afresh")
    distributed.barrier()
    return lock, made


def write_config(folder, config, options):
    now, how = as_json(config, options)
    write_json(folder / "config.json", {"config": now, "options": how, "versions": versions()})


def as_json(config, options):
    return (json.loads(json.dumps(dataclasses.asdict(config))),
            {k: v if v is None else str(v) for k, v in vars(options).items()})


def drop_unused(folder, made):
    """The folders that open_run made, where the run was refused before it began."""
    with contextlib.suppress(OSError):
        if made and [path.name for path in folder.iterdir()] == ["lock"]:
            (folder / "lock").unlink()
            for path in made:
                path.rmdir()


def versions():
    """What produced the numbers; git commit and whether the tree differs from it."""
    def git(*words):
        try:
            return subprocess.run(["git", *words], cwd=Path(__file__).parents[1], text=True,
                                  capture_output=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"torch": torch.__version__, "numpy": np.__version__, "device": device,
            "commit": git("rev-parse", "HEAD"),
            "modified": bool(git("status", "--porcelain", "--untracked-files=no"))}


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def write_json(path, value):
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text))


class Metrics:
    """metrics.jsonl, a line of figures at a time; lines after a resumed checkpoint are dropped."""

    def __init__(self, folder, start):
        self.path = folder / "metrics.jsonl"
        lines = [line for line in read_metrics(self.path) if line["iteration"] < start]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(self.path, lambda temporary: Path(temporary).write_text(text))

    def write(self, **figures):
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(figures) + "\n")
        except OSError as error:
            raise RunFailed(f"cannot write {self.path}: {error.strerror}; the last checkpoint is "
                            "intact") from error


def read_metrics(path):
    """Every whole line; a half-written last one is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            figures = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(figures, dict) and isinstance(figures.get("iteration"), int):
            lines.append(figures)
    return lines


def save_samples(network, sigmas, path, device, columns=8):
    """The same noise every time: a row for each of ten classes, or of ten seeds without classes."""
    classes = None
    sampler = partial(sample_student, sigmas=sigmas) if sigmas else partial(sample_heun, steps=18)
    if network.label_dim:
        rows = torch.linspace(0, network.label_dim - 1, min(10, network.label_dim)).long()
        classes = rows.repeat_interleave(columns)
    seeds = range(len(classes) if classes is not None else 10 * columns)
    images, _ = sample_seeds(network, seeds, sampler, classes=classes, device=device)
    path.parent.mkdir(exist_ok=True)
    save_png(grid(to_uint8(images).cpu(), columns), path)


class StopSignal:
    """A signal asks the loop to finish its iteration, save and leave with exit code 3.

    SIGTERM, Ctrl-C, and a terminal that is closed (unless nohup has it ignored).
    """

    def __init__(self):
        self.received = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.received and number == signal.SIGINT:       # a second Ctrl-C: at once
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


class Clock:
    """Images per second since the last reading, and the seconds that are left at that pace."""

    def __init__(self, batch):
        self.batch, self.seconds, self.since = batch, 0.0, time.monotonic()

    def pause(self):
        self.seconds += time.monotonic() - self.since

    def go_on(self):
        self.since = time.monotonic()

    def read(self, iterations, left):
        self.pause()
        pace = self.batch * iterations / max(self.seconds, 1e-9)
        self.seconds = 0.0
        self.go_on()
        return {"images_per_second": round(pace, 2),
                "seconds_left": round(left * self.batch / pace)}


class Log:
    """Progress bar, metrics.jsonl, sample grids, checkpoints: when they are due, and doing it."""

    def __init__(self, config, options, device, start, best_fid, stop):
        self.config, self.folder, self.best_fid = config, options.folder, best_fid
        self.device, self.stop, self.untold = device, stop, []
        self.every = LOG_EVERY * (config.ttur if config.stage else 4)
        self.first = distributed.rank() == 0
        if self.first:                                  # nothing refuses this run any more
            write_config(self.folder, config, options)
            self.metrics = Metrics(self.folder, start)
        self.clock, self.last = Clock(config.batch), start
        self.bar = tqdm(total=config.iterations, initial=start, desc=f"stage {config.stage}",
                        unit="it", disable=not self.first, dynamic_ncols=True)

    def due(self, step):
        return step % self.every == 0 or step + 1 == self.config.iterations

    def score_due(self, step):
        every = self.config.evaluate_every
        return bool(every) and ((step + 1) % every == 0 or step + 1 == self.config.iterations)

    def save_due(self, step):
        return (self.score_due(step) or (step + 1) % self.config.save_every == 0
                or step + 1 == self.config.iterations)

    def stopping(self, step):
        """Whether to save and leave; several processes agree on it only when they log."""
        if distributed.world_size() > 1 and not (self.due(step) or self.save_due(step)):
            return False
        return distributed.any_rank(bool(self.stop.received), self.device)

    def take(self, step, figures, images):
        """Keep an iteration's figures on their device; read and write them when that is due."""
        self.untold.append((step, figures))
        if self.first:
            self.bar.update(step + 1 - self.bar.n)
        if self.due(step):
            self.write(step, self.read(), images)

    def read(self):
        """The last figures, mean over the processes; stops the run if any since was not finite."""
        names = [(step, name) for step, figures in self.untold for name in figures]
        values = torch.stack([v.float() for _, figures in self.untold for v in figures.values()])
        values = distributed.mean_over_ranks(values)            # the first wait for the device
        for (step, name), value in zip(names, values):
            if not math.isfinite(value):
                self.bar.close()
                raise RunFailed(f"iteration {step}: {name} is {value}; this update was not made "
                                "and nothing saved, the last checkpoint is good; go on from it "
                                "with --force and a lower --learning-rate")
        last = self.untold[-1][0]
        self.untold = []
        return {name: value for (step, name), value in zip(names, values) if step == last}

    def write(self, step, figures, images):
        """Brightness and spread of the images are what DMD2's appendix C watches."""
        if not self.first:
            return
        figures = figures | {"image_mean": images.mean().item(),
                             "image_spread": images.std().item()}
        pace = self.clock.read(step + 1 - self.last, self.config.iterations - step - 1)
        self.last = step + 1
        self.metrics.write(iteration=step, **figures, **pace)
        self.bar.set_postfix(loss=f"{figures.get('distill', figures['denoising']):.3g}",
                             brightness=f"{figures['image_mean']:.3f}", best=f"{self.best_fid:.4g}")

    def save(self, roles, optimizers, done, scorer=None):
        if self.untold:
            self.read()                                 # nothing that is not finite is saved
        self.clock.pause()
        scores = scorer.score(roles.ema, self.config.sigmas) if scorer else {}
        own = str(self.config.stage) if self.config.stage else "heun"
        fid = next((v for k, v in scores.get(own, {}).items() if "FID" in k), math.inf)
        better = fid < self.best_fid or not self.config.evaluate_every
        self.best_fid = min(fid, self.best_fid)
        if self.first:
            whole = payload(self.config, roles, optimizers, done, self.best_fid, scores)
            if better:                                  # before latest.pt, which knows of it
                save(self.folder / "best.pt", payload(self.config, roles, None, done, fid,
                                                                 scores))
            if scores:
                flat = {f"{name}@{k}": v for k, figures in scores.items()
                        for name, v in figures.items()}
                self.metrics.write(iteration=done - 1, **flat)
                self.bar.write(f"iteration {done}: "
                               + ", ".join(f"{k} {v:.4g}" for k, v in flat.items()))
                save_samples(roles.ema, self.config.sigmas,
                             self.folder / "samples" / f"{done:06d}.png", self.device)
            save_latest(self.folder, whole)             # last: what it knows of is on the disk
        distributed.barrier()
        self.clock.go_on()

    def stopped(self, done):
        self.bar.close()
        if self.first:
            print(f"{self.stop.received or 'another rank'}: saved after {done} iterations; the "
                  "same command goes on", flush=True)
        return 3

    def finish(self):
        self.bar.close()
        if self.first:
            draw_curves(read_metrics(self.metrics.path), self.folder / "curves.png")
        return 0
