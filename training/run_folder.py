"""A run's folder: made, locked, refused where other values began it; its config and metrics."""

import contextlib
import dataclasses
import fcntl
import json

from base import distributed
from base.errors import RunFailed, UserError
from base.files import remove_leftovers, versions, write_atomically, write_json
from presets.config import Config

CLOCKED = ("images_per_second", "seconds_left", "seconds")      # of its figures those of a clock


def open_run(folder, config, options):
    """Make or reopen a run's folder; refuse one that other values began or that is in use.

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
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process is training in {folder}; wait for it or choose another "
                        "--folder") from None
    except OSError as error:
        distributed.say(f"{folder} cannot be locked ({error.strerror}): a second run there would "
                        "not be refused")
    remove_leftovers(list(folder.rglob(".*.tmp")))          # of what was killed while it saved
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
        before = FIELDS | before                        # a field that is younger than the run
        wanted = now | {k: how[k] for k in ("data", "reference", "inception", "prompts")}
        changed = [f"{k} (was {was.get(k)!r}, now {wanted[k]!r})" for k in wanted
                   for was in [before if k in now else before_how] if was.get(k) != wanted[k]]
        if changed:
            raise UserError(f"{folder} was begun with other values: {', '.join(changed)}; "
                            "--force goes on all the same, another --folder starts afresh")
    distributed.barrier()
    return lock, made


def judged_by(config, options):
    """What makes two scores of a run comparable."""
    return [config.evaluate_images, str(options.reference), str(options.inception)]


def write_config(folder, config, options):
    now, how = as_json(config, options)
    on_cpu = {"device": "cpu"} if options.device == "cpu" else {}       # though a GPU is there
    write_json(folder / "config.json",
               {"config": now, "options": how, "versions": versions() | on_cpu})


FIELDS = json.loads(json.dumps(dataclasses.asdict(Config())))


def as_json(config, options):
    return (json.loads(json.dumps(dataclasses.asdict(config))),
            {k: v if v is None else str(v) for k, v in vars(options).items()})


def what_is_left(folder):
    """What a run that fails leaves, to say so."""
    if not folder.exists():
        return f"{folder} is gone, and what was saved in it"
    saved = any(folder.glob("*.pt"))
    return "the last checkpoint is intact" if saved else "there is no checkpoint yet"


def drop_unused(folder, made):
    """The folders that open_run made, where the run ended before it had anything to tell."""
    with contextlib.suppress(OSError):
        files = list(folder.iterdir())
        told = any(path.name not in ("lock", "config.json", "metrics.jsonl") for path in files)
        if made and not told and not read_metrics(folder / "metrics.jsonl"):
            for path in files:
                path.unlink()
            for path in made:
                path.rmdir()


class Metrics:
    """metrics.jsonl, a line at a time; what a resumed checkpoint knows nothing of is dropped."""

    def __init__(self, folder, start, unscored=False):
        self.path = folder / "metrics.jsonl"
        lines = [line for line in read_metrics(self.path) if line["iteration"]
                 < start - (unscored and "passes" in line)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(self.path, lambda temporary: temporary.write_text(text))

    def write(self, **values):
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise RunFailed(f"cannot write {self.path}: {error.strerror}; "
                            f"{what_is_left(self.path.parent)}") from error


def read_metrics(path):
    """Every whole line; a half-written last one is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and isinstance(values.get("iteration"), int):
            lines.append(values)
    return lines
