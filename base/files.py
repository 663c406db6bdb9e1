"""Files: written whole or not at all, their hashes, JSON, and what a reader of a record needs."""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import torch

from base.errors import RunFailed, UserError, out_of_memory

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "assets"


def shown(path):
    """The path as a reader of a record can use it: relative where it can be."""
    path = Path(path).resolve()
    for base in (Path.cwd(), ROOT):
        if path.is_relative_to(base):
            return str(path.relative_to(base))
    return str(path)


def file_digest(path, algorithm="sha256", length=None):
    """Of a file's first `length` bytes, of all without it."""
    digest, left = hashlib.new(algorithm), os.path.getsize(path) if length is None else length
    with open(path, "rb") as file:
        while left and (chunk := file.read(min(left, 1 << 24))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def lines_digest(lines):
    """sha256 of texts, a line each; a file's name may hold bytes that are no text."""
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def load_tensors(path, **how):
    """What torch.save wrote; no code in it runs. It compresses nothing: a zip that unpacks to more
    than its own size is a bomb."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > os.path.getsize(path):
            raise UserError(f"{path}: unpacks to {size:,} bytes, more than the file has; "
                            "torch.save writes no such file")
    return torch.load(path, map_location="cpu", weights_only=True, **how)


def sync_folder(folder):
    """Flush a rename to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path, write):
    """write(temporary path), flush, rename: `path` is either the old file or the whole new one."""
    path = Path(path)
    try:
        with hidden_beside(path) as temporary:
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or (str(error).splitlines() or [repr(error)])[0]
        left = ("what was there before is intact" if path.parent.exists() else
                f"{path.parent} is gone")
        raise RunFailed(f"cannot write {path}: {reason}; {left}") from error


def save_tensors(content, path):
    """torch.save, which of a full disk says no more than that its zip writer failed."""
    try:
        torch.save(content, path)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise OSError(str(error)) from error


@contextlib.contextmanager
def hidden_beside(path, folder=False):
    """A hidden file or folder beside `path` to write into, locked meanwhile, so that one without a
    lock is of a process that was killed: these go. Nothing stays under its name."""
    remove_leftovers(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir() if folder else temporary.touch()
    lock = locked(temporary)
    try:
        yield temporary
    finally:
        remove(temporary)                       # unless its rename has come before
        if lock:
            os.close(lock)


def remove_leftovers(hidden):
    """Of these files and folders those that no process holds any more."""
    for leftover in hidden:
        if lock := locked(leftover):
            remove(leftover)
            os.close(lock)


def locked(path):
    """A lock on a file or folder; None where another process has it or none can be had."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it when we die
            return handle
        except OSError:
            os.close(handle)


def remove(path):
    with contextlib.suppress(OSError):          # it is gone, or the disk is beyond writing
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_arrays(path, **arrays):
    def write(temporary):
        with open(temporary, "wb") as file:     # np.savez would add .npz to a name
            np.savez(file, **arrays)

    write_atomically(path, write)


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def write_json(path, value):
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text))


def versions():
    """What produced the numbers; git commit and whether the tree differs from it."""
    def git(*words):
        try:
            return subprocess.run(["git", *words], cwd=ROOT, text=True,
                                  capture_output=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"torch": torch.__version__, "numpy": np.__version__, "device": device,
            "commit": git("rev-parse", "HEAD"),
            "modified": bool(git("status", "--porcelain", "--untracked-files=no"))}
