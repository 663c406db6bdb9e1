"""Checkpoints: plain tensors and numbers, written so that a crash never leaves a bad file behind.

A file is what torch.save writes plus a zip comment that holds the sha256 of all bytes before it, so
torch.load(path, weights_only=True) reads it and every damaged byte is found. `latest.pt` is the
newest, `previous.pt` the one before, `best.pt` the best by FID.
"""

import contextlib
import hashlib
import os
import sys
from pathlib import Path

import torch

from edm_networks import EDMPrecond
from errors import RunFailed, UserError, run

FORMAT = 1
DIGEST = 64                      # hexadecimal digits of a sha256


class DamagedCheckpoint(UserError):
    """The file is not what was written."""


def file_digest(path, length=None):
    """sha256 of a file's first `length` bytes, of all without it."""
    digest, left = hashlib.sha256(), os.path.getsize(path) if length is None else length
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


def save(path, payload):
    def write(temporary):
        torch.save({"format": FORMAT, **payload}, temporary)
        with open(temporary, "rb+") as file:        # the last two bytes are the comment's length
            file.seek(-2, os.SEEK_END)
            file.write(DIGEST.to_bytes(2, "little"))
        digest = file_digest(temporary)
        with open(temporary, "ab") as file:
            file.write(digest.encode())

    write_atomically(path, write)


def load(path, device="cpu"):
    """The payload of `path`, or DamagedCheckpoint."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        length = path.stat().st_size - DIGEST
        with open(path, "rb") as file:
            file.seek(max(length, 0))
            written = file.read()
        if length <= 0 or file_digest(path, length) != written.decode("ascii", "replace"):
            raise DamagedCheckpoint(f"{path} is damaged or not one of our checkpoints "
                                    "(its checksum does not match); use another copy")
        payload = torch.load(path, map_location=device, weights_only=True)
        ours = type(payload) is dict and bool(payload["format"] == FORMAT)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (DamagedCheckpoint, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception:       # a checksum that matches proves no author; torch raises many types
        ours = False
    if not ours:
        raise DamagedCheckpoint(f"{path} is not a checkpoint of format {FORMAT}")
    return payload


def save_latest(folder, payload):
    """Keep the last two: latest.pt becomes previous.pt."""
    fresh = Path(folder) / "newest.pt"
    if fresh.exists():                          # a crash came between its save and its renames
        promote(fresh)
    save(fresh, payload)
    promote(fresh)


def promote(fresh):
    """newest.pt becomes latest.pt, and that previous.pt."""
    latest, previous = fresh.with_name("latest.pt"), fresh.with_name("previous.pt")
    try:
        if latest.exists():
            os.replace(latest, previous)
        os.replace(fresh, latest)
        sync_folder(fresh.parent)
    except OSError as error:
        raise RunFailed(f"cannot rename {fresh}: {error.strerror}; it is whole, and a resumed run "
                        "starts from it") from error


def load_latest(folder, device="cpu", say=print):
    """The newest undamaged checkpoint of a run, None if there is none at all."""
    # A crash between the renames of save_latest leaves newest.pt beside previous.pt.
    names = ("newest.pt", "latest.pt", "previous.pt")
    candidates = [Path(folder) / name for name in names if (Path(folder) / name).exists()]
    for path in candidates:
        try:
            return load(path, device)
        except DamagedCheckpoint as error:
            say(f"warning: {error}")
    if candidates:
        raise UserError(f"no undamaged checkpoint in {folder}; move the folder away to start "
                        "afresh")
    return None


def network_from(payload, weights="ema"):
    """The network of a payload, with one of its sets of weights, in evaluation mode."""
    network = EDMPrecond(**payload["network"])
    network.load_state_dict(payload[weights], strict=True)
    return network.eval()


def main(argv):
    """python checkpoint.py runs/.../best.pt assets/digits-student.pt: only what sampling needs."""
    if len(argv) != 2:
        raise UserError("usage: python checkpoint.py BEST.pt OUT.pt")
    payload = load(argv[0])
    save(argv[1], {k: payload[k] for k in ("dataset", "method", "stage", "sigmas", "network",
                                           "iteration", "fid", "ema")})


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
