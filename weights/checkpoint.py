"""Checkpoints: plain tensors and numbers, written so that a crash never leaves a bad file behind.

A file is what torch.save writes plus a zip comment that holds the sha256 of all bytes before it, so
torch.load(path, weights_only=True) reads it and every damaged byte is found. `latest.pt` is the
newest, `previous.pt` the one before, `best.pt` the best by FID.
"""

import hashlib
import math
import os
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from base.errors import RunFailed, UserError, out_of_memory
from base.files import file_digest, load_tensors, save_tensors, sync_folder, write_atomically
from edm_networks import EDMPrecond
from models import falling
from text_to_image import TextDenoiser, library

FORMAT = 1
DIGEST = 64                      # hexadecimal digits of a sha256

# What a checkpoint holds; whoever has the checksum's rule can write one that holds something else.
NUMBER = (int, float)
KINDS = {"dataset": str, "method": str, "stage": int, "sigmas": list, "network": dict, "fid": dict,
         "iteration": int, "best_fid": NUMBER, "ema": dict, "student": dict, "adapted": dict,
         "head": dict, "optimizers": list, "made_from": dict, "pipeline": str,
         "teacher": str, "class_names": list, "lora": int}
WEIGHTS = ("ema", "student", "adapted", "head")
SAMPLED = ("dataset", "sigmas", "network", "ema")           # what sampling needs of it
RESUMED = ("network", "student", "ema", "optimizers", "iteration", "fid")       # and a resumed run


class DamagedCheckpoint(UserError):
    """The file is not what was written."""


def weights_digest(state):
    """Of the names and values of a state dict, whatever file they stand in."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save(path, payload):
    def write(temporary):
        save_tensors({"format": FORMAT, **payload}, temporary)
        with open(temporary, "rb+") as file:        # the last two bytes are the comment's length
            file.seek(-2, os.SEEK_END)
            file.write(DIGEST.to_bytes(2, "little"))
        digest = file_digest(temporary)
        with open(temporary, "ab") as file:
            file.write(digest.encode())

    write_atomically(path, write)


def undamaged(path):
    """Whether a file ends with the checksum of all that is before it."""
    length = os.path.getsize(path) - DIGEST
    with open(path, "rb") as file:
        file.seek(max(length, 0))
        written = file.read()
    return length > 0 and file_digest(path, length=length) == written.decode("ascii", "replace")


def load(path, needs=()):
    """The payload of `path`, which holds at least what it `needs`; or DamagedCheckpoint."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        if not undamaged(path):
            raise DamagedCheckpoint(f"{path} is damaged or not one of our checkpoints "
                                    "(its checksum does not match); use another copy")
        payload = load_tensors(path)
        ours = type(payload) is dict and bool(payload["format"] == FORMAT)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:      # a checksum that matches proves no author; torch raises many
        if isinstance(error, DamagedCheckpoint) or out_of_memory(error):
            raise
        ours = False
    if not ours:
        raise DamagedCheckpoint(f"{path} is not a checkpoint of format {FORMAT}")
    for name, kind in KINDS.items():
        if name in payload and not isinstance(payload[name], kind) or (
                name in needs and name not in payload):
            raise DamagedCheckpoint(f"{path} holds no {name} as our checkpoints do")
    if needs and not dense(payload):
        raise DamagedCheckpoint(f"{path} holds weights that are no dense floating-point numbers")
    sigmas = payload.get("sigmas", ())
    if not (all(type(sigma) in NUMBER for sigma in sigmas) and falling(sigmas)):
        raise DamagedCheckpoint(f"{path} holds sigmas that are no numbers which fall and stay "
                                "above 0")
    return payload


def dense(payload):
    """Whether weights and Adam's moments are what arithmetic takes."""
    states = [payload[name] for name in WEIGHTS if name in payload]
    try:
        for optimizer in payload.get("optimizers", ()):
            states += optimizer["state"].values()
        return all(is_dense(tensor) for state in states for tensor in state.values())
    except (AttributeError, LookupError, TypeError):
        return False


def is_dense(tensor):
    """Floating-point numbers, each in a place of its own."""
    return (isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
            and tensor.layout == torch.strided and not tensor.is_meta
            and tensor.nbytes <= tensor.untyped_storage().nbytes())


def save_latest(folder, payload, again=False):
    """Keep the last two: latest.pt becomes previous.pt, unless this is the same iteration again."""
    if again:
        return save(Path(folder) / "latest.pt", payload)
    fresh = Path(folder) / "newest.pt"
    if fresh.exists() and undamaged(fresh):     # a crash came between its save and its renames
        promote(fresh)
    save(fresh, payload)
    promote(fresh)


def promote(fresh):
    """newest.pt becomes latest.pt, and that previous.pt; a damaged one replaces no good one."""
    latest, previous = fresh.with_name("latest.pt"), fresh.with_name("previous.pt")
    try:
        if latest.exists() and undamaged(latest):
            os.replace(latest, previous)
        os.replace(fresh, latest)
        sync_folder(fresh.parent)
    except OSError as error:
        raise RunFailed(f"cannot rename {fresh}: {error.strerror}; it is whole, and a resumed run "
                        "starts from it") from error


def load_latest(folder, say=print, needs=()):
    """The newest undamaged checkpoint of a run, None if there is none at all."""
    # A crash between the renames of save_latest leaves newest.pt beside previous.pt.
    names = ("newest.pt", "latest.pt", "previous.pt")
    candidates = [Path(folder) / name for name in names if (Path(folder) / name).exists()]
    for path in candidates:
        try:
            return load(path, needs)
        except DamagedCheckpoint as error:
            say(f"warning: {error}")
    if candidates:
        raise UserError(f"no undamaged checkpoint in {folder}; move the folder away to start "
                        "afresh")
    return None


def best_fid(folder, judged_by):
    """What best.pt stands for: infinite where there is none, none that could be used, or one that
    was judged otherwise."""
    path = Path(folder) / "best.pt"
    try:
        best = load(path, needs=("best_fid",)) if path.exists() else {"best_fid": math.inf}
    except DamagedCheckpoint:
        return math.inf
    return best["best_fid"] if best.get("judged_by", judged_by) == judged_by else math.inf


def network_from(payload, weights="ema", source="the checkpoint"):
    """The network of a payload, with one of its sets of weights, in evaluation mode."""
    return build_network(payload["network"], payload[weights], source).eval()


class Undrawn(TorchFunctionMode):
    """Draws no first weights: on the meta device that would only import half of torch, a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if func is torch.nn.init.normal_ else func(*args, **(kwargs or {}))


def untrained(config):
    """The network of a configuration: EDM's, or with "unet" in it one of text to image."""
    return TextDenoiser(**config) if "unet" in config else EDMPrecond(**config)


def build_network(config, state, source):
    """The network around these very tensors: nothing is allocated or initialised twice."""
    if "unet" in config:
        library("diffusers")                            # where it is missing, that is what is wrong
    try:
        check_plain(config)
        with torch.device("meta"), Undrawn():
            network = untrained(config)
        for name, tensor in state.items():
            if not is_dense(tensor):
                raise ValueError(f"{str(name)[:100]} is no dense tensor of floating-point numbers")
        floats = {name: tensor.float() for name, tensor in state.items()}
        network.load_state_dict(floats, strict=True, assign=True)
    except (AttributeError, TypeError, ValueError, RuntimeError, ArithmeticError,
            LookupError) as error:
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: its weights do not fit its configuration: {reason}") from None
    return network


def check_plain(config):
    """Plain and small: nothing in it can make building the network run long."""
    def plain(value):
        return value is None or type(value) in (bool, int, float, str)

    if "unet" in config:                                # diffusers' own loader checks these
        return
    for name, value in config.items():
        items = value if type(value) in (list, tuple) else [value]
        if len(items) > 16 or not all(map(plain, items)):
            raise UserError(f"constructor argument {str(name)[:40]!r} is not a plain value")
    blocks = config.get("num_blocks", 0)
    if type(blocks) is not int or blocks > 64:
        raise UserError("constructor argument num_blocks is not a whole number up to 64")
