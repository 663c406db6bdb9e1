"""Rows that a run makes once and keeps, by parts: noise-image pairs, latents of real images."""

import contextlib
import hashlib
import io
import resource

import numpy as np
import torch

from base import distributed
from base.errors import RunFailed, UserError
from base.files import file_digest, read_json, write_atomically, write_json
from base.progress import progress
from images.real import ByNumber


class Rows(ByNumber):
    """The parts' .npy files, mapped: what is not looked at costs no memory."""

    to_x = staticmethod(torch.Tensor.float)

    def __init__(self, parts, size):
        self.parts, self.size, self.count = parts, size, sum(map(len, parts))

    def row(self, number):
        return self.parts[number // self.size][number % self.size]


def made_once(folder, about, count, size, make, text, stop):
    """Rows of make(range of numbers) -> structured array; the ranks share the parts, which survive
    a stop. A folder that was made as `about` does not say is refused."""
    if distributed.rank() == 0:
        begin(folder, about | {"part": size})
    distributed.barrier()
    parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
    mine = [part for part in parts[distributed.rank()::distributed.world_size()]
            if not files_of(folder, part)]
    for part in progress(mine, desc=text, unit="part"):
        write_part(folder, part, make(part))
        if stop.received:
            print(f"{stop.received}: the {text} made so far are kept; the same command goes on",
                  flush=True)
            raise SystemExit(3)
    distributed.barrier()
    hold_many_files()
    return Rows([open_part(folder, part) for part in parts], size)


def hold_many_files():
    """A part that is mapped keeps its file open; most systems begin with a limit of 1,024."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):      # a hard limit that is none
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def begin(folder, about):
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise RunFailed(f"cannot make {folder}: {error.strerror}") from error
    path = folder / "about.json"
    if not path.exists():
        write_json(path, about)
    elif about | (made_as := read_json(path)) != about:        # one may be older than a field
        raise UserError(f"{folder} was made with {made_as}, this run wants {about}; move it away "
                        "to make it anew")


def files_of(folder, part):
    return list(folder.glob(f"{part[0]}-{part[-1]}-*.npy"))


def write_part(folder, part, rows):
    """One file, whose name ends with the hash of its content."""
    content = io.BytesIO()
    np.save(content, rows)
    digest = hashlib.sha256(content.getvalue()).hexdigest()[:16]
    write_atomically(folder / f"{part[0]}-{part[-1]}-{digest}.npy",
                     lambda temporary: temporary.write_bytes(content.getvalue()))


def open_part(folder, part):
    if not (found := files_of(folder, part)):
        raise RunFailed(f"{folder} lacks {part[0]} to {part[-1]}, which another process made: all "
                        "need one folder that each of them sees")
    path, *_ = found
    try:
        if distributed.rank() == 0 and file_digest(path)[:16] != path.stem.rpartition("-")[2]:
            raise ValueError("its hash is not that of its name")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise RunFailed(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); move it away, it will be made "
                        "again") from None
