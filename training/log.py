"""What a run tells while it trains: progress bar, metrics, sample grids, checkpoints when due."""

import math
import signal
import threading
import time
from functools import partial

import torch
import torch.nn.functional as F

from base import distributed
from base.errors import INTERRUPTING, RunFailed
from base.progress import progress
from images.pictures import draw_curves, grid, save_png
from metrics.judge import HEUN_STEPS
from models import Guided, level, sample_every_step, sample_heun, sample_seeds, sample_student
from training.roles import payload, whole_network
from training.run_folder import Metrics, judged_by, read_metrics, what_is_left, write_config
from weights.checkpoint import load, save, save_latest
from weights.opening import TEXT_GUIDANCE, steps_text

LOG_EVERY = 5                   # student updates between two lines of metrics.jsonl; of stage 0 20
COLUMNS = 8                     # of a grid of samples
SHOWN_PROMPTS, SHOWN_SIZE = 4, 256      # of text to image: rows, and pixels of a picture


def save_samples(roles, sigmas, path, device):
    """The same noise every time: a row for each of ten classes, or ten rows without classes."""
    if roles.base:
        return save_prompted(roles, sigmas, path, device)
    network = whole_network(roles.ema, device)
    sampler, asked = partial(sample_heun, steps=HEUN_STEPS), None
    if sigmas:
        sampler = partial(sample_student, sigmas=sigmas)
    count = network.conditions.count
    if count:
        asked = torch.linspace(0, count - 1, min(10, count)).long().repeat_interleave(COLUMNS)
    seeds = range(len(asked) if count else 10 * COLUMNS)
    images, _ = sample_seeds(network, seeds, sampler, asked, device)
    save_grid(grid(network.pixels(images).cpu(), COLUMNS), path)


def save_grid(picture, path):
    if distributed.rank() == 0:
        path.parent.mkdir(exist_ok=True)
        save_png(picture, path)


def after_divergence(folder):
    why = ("; go on from it with --force and a lower --learning-rate" if any(folder.glob("*.pt"))
           else ": the teacher or the images may not be finite, or --learning-rate is too high")
    return what_is_left(folder) + why


@torch.no_grad()
def save_prompted(roles, sigmas, path, device):
    """A row for each of the first prompts: the student at 1..n steps of the same noise, then what
    dm compares: its image, noised to the middle of the levels, as both denoisers see it. A teacher
    in training without guidance and with it."""
    def sampler(student, z, y, noise):
        if not sigmas:
            return [sample_heun(D, z, y, steps=HEUN_STEPS)
                    for D in (student, Guided(student, TEXT_GUIDANCE))]
        images = sample_every_step(student, z, y, noise, sigmas=sigmas)
        middle = level(student.levels.at(0.5), z)
        x_t = images[-1] + middle * noise()
        return images + [D(x_t, middle, y) for D in (roles.teacher, roles.adapted)]

    network = whole_network(roles.ema, device)
    prompts = roles.opened.pipeline.prompts[:SHOWN_PROMPTS]
    images, _ = sample_seeds(network, range(len(prompts)), sampler, range(len(prompts)), device)
    pixels = torch.stack([network.pixels(x) for x in images], 1).flatten(0, 1)
    small = F.adaptive_avg_pool2d(pixels.float(), min(pixels.shape[-1], SHOWN_SIZE)).byte().cpu()
    save_grid(grid(small, len(images), scale=max(1, 128 // small.shape[-1]), row_labels=prompts,
                   column_labels=[*(steps_text(k + 1) for k in range(len(sigmas))),
                                  "x0_teacher", "x0_adapted"] if sigmas else
                   ["guidance 1", f"guidance {TEXT_GUIDANCE:g}"]), path)


def best_of(latest, fid):
    """What best.pt holds of a checkpoint: all but what only a resumed run needs."""
    return {name: value for name, value in latest.items()
            if name not in ("student", "optimizers", "seconds")} | {"best_fid": fid}


class StopSignal:
    """A signal asks the loop to finish its iteration, save and leave with exit code 3.

    SIGTERM, SIGUSR1 (a batch system's, before its time limit), Ctrl-C, and a terminal that is
    closed (unless nohup has it ignored). In a thread of somebody's program nothing is caught, nor
    a signal whose handler is not Python's: it could not be given back.
    """

    def __init__(self):
        self.received, self.before = None, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *INTERRUPTING):
                before = signal.getsignal(number)
                if before is not None and (number, before) != (signal.SIGHUP, signal.SIG_IGN):
                    self.before[number] = signal.signal(number, self.receive)

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        if self.received and number == signal.SIGINT:       # a second Ctrl-C: at once
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


class Clock:
    """Images per second since the last reading, and the seconds that are left at that pace; in all
    the seconds of training, evaluations left out."""

    def __init__(self, batch, before=0.0):
        self.batch, self.seconds, self.all, self.since = batch, 0.0, before, time.monotonic()

    def pause(self):
        passed = time.monotonic() - self.since
        self.seconds, self.all = self.seconds + passed, self.all + passed

    def go_on(self):
        self.since = time.monotonic()

    def read(self, iterations, left):
        self.pause()
        pace = self.batch * iterations / max(self.seconds, 1e-9)
        self.seconds = 0.0
        self.go_on()
        return {"images_per_second": float(f"{pace:.4g}"),
                "seconds_left": round(left * self.batch / pace)}


class Log:
    """Progress bar, metrics.jsonl, sample grids, checkpoints: when they are due, and doing it."""

    def __init__(self, config, options, device, before, stop, scorer=None, passes=None):
        self.config, self.folder, self.best_fid = config, options.folder, before.best_fid
        self.options, self.passes, self.own = options, passes, str(config.stage or "heun")
        self.scorer = scorer if scorer and scorer.judge else None
        self.device, self.stop, self.unread = device, stop, []
        self.newest, self.shown = {}, {}        # each loss as last read; what the bar shows
        self.every = LOG_EVERY * (config.ttur if config.stage else 4)
        self.writes = distributed.rank() == 0
        if self.writes:                                 # nothing refuses this run any more
            if before.iterations < config.iterations or options.force:      # else it computes none
                write_config(self.folder, config, options)
            self.metrics = Metrics(self.folder, before.iterations, before.unscored)
        self.clock, self.last = Clock(config.batch, before.seconds), before.iterations
        self.bar = progress(total=config.iterations, initial=before.iterations,
                            desc=f"stage {config.stage}", unit="it")

    def due(self, step):
        return step % self.every == 0 or step + 1 == self.config.iterations

    def score_due(self, step):
        every = self.config.evaluate_every
        return bool(self.scorer) and ((step + 1) % every == 0 or step + 1 == self.config.iterations)

    def save_due(self, step):
        return (self.score_due(step) or (step + 1) % self.config.save_every == 0
                or step + 1 == self.config.iterations)

    def take(self, step, losses, images):
        """Keep an iteration's losses on their device; read and write them when that is due."""
        self.unread.append((step, losses))
        self.bar.update(step + 1 - self.bar.n)
        if self.due(step):
            self.write(step, self.read(), images)

    def read(self):
        """The last losses, mean over the processes; stops the run if any since was not finite."""
        names = [(step, name) for step, losses in self.unread for name in losses]
        values = torch.stack([v.float() for _, losses in self.unread for v in losses.values()])
        values = distributed.mean_over_ranks(values)            # the first wait for the device
        for (step, name), value in zip(names, values):
            if not math.isfinite(value):
                self.bar.close()
                raise RunFailed(f"iteration {step}: {name} is {value}; this update was not made "
                                f"and nothing saved; {after_divergence(self.folder)}")
        self.newest |= {name: value for (_, name), value in zip(names, values)}
        last = self.unread[-1][0]
        self.unread = []
        return {name: value for (step, name), value in zip(names, values) if step == last}

    def write(self, step, losses, images):
        """Brightness and spread of the images are what DMD2's appendix C watches."""
        if not self.writes:
            return
        brightness = images.mean().item()
        pace = self.clock.read(step + 1 - self.last, self.config.iterations - step - 1)
        self.last = step + 1
        self.metrics.write(iteration=step, **losses, image_mean=brightness,
                           image_spread=images.std().item(), **pace)
        loss = "distill" if "distill" in self.newest else "denoising"
        self.shown = {loss: f"{self.newest[loss]:.3g}", "brightness": f"{brightness:.3f}"}
        self.show()

    def show(self):
        best = {} if math.isinf(self.best_fid) else {"best": f"{self.best_fid:.4g}"}
        self.bar.set_postfix(self.shown | best, refresh=False)

    def save(self, roles, optimizers, done, score=False):
        if self.unread:
            self.read()                                 # nothing that is not finite is saved
        if score:                                       # it may take hours: first without
            self.save(roles, optimizers, done)
        self.clock.pause()
        scores = {}
        if score:
            scores = self.scorer.score(whole_network(roles.ema, self.device), self.config.sigmas)
        fid = next((v for k, v in scores.get(self.own, {}).items() if "FID" in k), math.inf)
        better = fid < self.best_fid or not self.scorer
        self.best_fid = min(fid, self.best_fid)
        together = self.writes or self.options.shard    # what is sharded no rank has alone
        if together:
            latest = payload(self.config, roles, optimizers, done, self.clock.all, self.best_fid,
                             scores)
        if self.writes:
            if better:                                  # before latest.pt, which knows of it
                save(self.folder / "best.pt", best_of(latest, fid) | {
                    "judged_by": judged_by(self.config, self.options)})
            if scores:
                flat = {f"{name}@{k}": v for k, score in scores.items()
                        for name, v in score.items()}
                self.metrics.write(iteration=done - 1, images=done * self.config.batch,
                                   passes=self.passes.until(done),
                                   seconds=round(self.clock.all, 1), **flat)
                self.bar.write(f"iteration {done}: "
                               + ", ".join(f"{k} {v:.4g}" for k, v in flat.items()))
                self.show()
        drawn = not score if roles.base else score or not self.scorer
        if together and drawn:
            save_samples(roles, self.config.sigmas, self.folder / "samples" / f"{done:06d}.png",
                         self.device)
        if self.writes:
            save_latest(self.folder, latest, again=score)   # last: what it knows of is on the disk
        distributed.barrier()
        self.clock.go_on()

    def stopped(self, done):
        self.bar.close()
        if self.writes:
            why = self.stop.received or "another process was stopped"
            print(f"{why}: saved after {done} iterations; the same command goes on", flush=True)
        return 3

    def finish(self):
        self.bar.close()
        if self.writes:
            draw_curves(read_metrics(self.metrics.path), self.folder / "curves.png")
            print(self.summary(), flush=True)
        return 0

    def summary(self):
        """What the run came to, and how to look at it."""
        best = self.folder / "best.pt"
        found = load(best)
        told = next((f"done; best {name}@{self.own} {value:.4g}, after {found['iteration']:,} "
                     f"iterations: {best}" for name, value in found["fid"].get(self.own, {}).items()
                     if "FID" in name), f"done; the newest weights: {best}")
        how = f"--steps {self.config.stage}" if self.config.stage else "--teacher"
        how += ' --prompt "..."' if self.options.prompts else ""
        return f"{told}\nlook at it: python sample.py --checkpoint {best} {how}"
