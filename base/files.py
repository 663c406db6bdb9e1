"""Files: written whole or not at all, their hashes, JSON, and what a reader of a record needs."""

import contextlib
import hashlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import torch

from base.errors import RunFailed, UserError

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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:    # the latter is torch's zip writer on a full disk
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [repr(error)])[0]
        raise RunFailed(f"cannot write {path}: {reason}; what was there before is "
                        "intact") from error
    finally:
        with contextlib.suppress(OSError):      # gone by its rename, or the disk is beyond writing
            temporary.unlink()


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
