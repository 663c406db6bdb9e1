"""Sets of images as files that other programs read; each appears whole or not at all.

`blocks` yields (numbers, [uint8 images [B,C,H,W]], classes or captions [B], or None); it is never
held as a whole.
"""

import io
import itertools
import json
import os
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from base.errors import RunFailed, UserError
from base.files import hidden_beside, sync_folder, write_atomically
from images.real import Images


def png(image):
    """The bytes of a PNG of uint8 [C,H,W]."""
    content = io.BytesIO()
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(pixels)).save(content, format="PNG")
    return content.getvalue()


def dataset_json(names, classes, **more):
    """EDM's: the class of each file, or its caption; null where there are none."""
    labels = [[name, label if isinstance(label, str) else int(label)]
              for name, label in zip(names, classes)]
    return json.dumps({"labels": labels or None, **more})


def write_zip(path, blocks):
    """EDM's layout: 00000/img00000000.png numbered in the order given, and dataset.json."""
    def write(temporary):
        names, labels = [], []
        with zipfile.ZipFile(temporary, "w") as archive:
            for _, (images,), classes in blocks:
                for image in images:
                    number = f"{len(names):08d}"
                    names.append(f"{number[:5]}/img{number}.png")
                    archive.writestr(zipfile.ZipInfo(names[-1]), png(image))
                labels.extend([] if classes is None else classes)
            archive.writestr(zipfile.ZipInfo("dataset.json"), dataset_json(names, labels))

    write_atomically(path, write)


def write_npz(path, blocks, count):
    """The ADM evaluator's: arr_0 uint8 [N,H,W,C], and with classes arr_1 int64 [N]; streamed."""
    def write(temporary):
        labels, rest = [], iter(blocks)
        begin = next(rest)
        _, C, H, W = begin[1][0].shape
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, {
                    "descr": "|u1", "fortran_order": False, "shape": (count, H, W, C)})
                for _, (images,), classes in itertools.chain([begin], rest):
                    file.write(np.ascontiguousarray(images.transpose(0, 2, 3, 1)).tobytes())
                    labels.extend([] if classes is None else classes)
            if labels:
                with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                    np.lib.format.write_array(file, np.array(labels, np.int64))

    write_atomically(path, write)


def write_folder(path, blocks):
    """A PNG named after each number, and dataset.json."""
    path, names, labels = path.resolve(), [], []        # of a link what it points to
    try:
        with hidden_beside(path, folder=True) as temporary:
            for numbers, (images,), classes in blocks:
                for number, image in zip(numbers, images):
                    names.append(f"{number:06d}.png")
                    (temporary / names[-1]).write_bytes(png(image))
                labels.extend([] if classes is None else classes)
            (temporary / "dataset.json").write_text(dataset_json(names, labels, sampled=names))
            if path.exists():
                replace_samples(path, temporary)
            else:
                temporary.rename(path)
            sync_folder(path.parent)
    except OSError as error:
        raise RunFailed(f"cannot write {path}: {error.strerror or error}") from error


def sampled(folder):
    """Names of what write_folder put into a folder, dataset.json last; nothing of any other."""
    try:
        names = json.loads((folder / "dataset.json").read_text())["sampled"]
        return [*map(str, names), "dataset.json"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []


def replace_samples(folder, fresh):
    """The fresh ones take the folder's name; what else has come into it since check_out stays."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    folder.rename(old)
    fresh.rename(folder)
    samples = sampled(old)
    for path in list(old.iterdir()):
        if path.name in samples:
            path.unlink()
        elif not (folder / path.name).exists():
            path.rename(folder / path.name)
    old.rmdir()


def open_npz(path):
    """Images in the ADM evaluator's layout, nothing unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if "arr_0" not in file.files:
                raise ValueError(f"it holds {', '.join(file.files)}")
            pixels = file["arr_0"]
            classes = file["arr_1"] if "arr_1" in file.files else None
    except Exception as error:              # zip, zlib and numpy raise many types
        raise UserError(f"{path}: not an npz of images arr_0 ({error})") from None
    if (pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3)
            or 0 in pixels.shape):                      # a million millions of them take no room
        raise UserError(f"{path}: arr_0 is {pixels.dtype} {list(pixels.shape)}; wanted: uint8 "
                        "[N,H,W,1 or 3]")
    if classes is not None and (classes.shape != pixels.shape[:1] or classes.dtype.kind not in "iu"
                                or len(classes) and classes.min() < 0):
        raise UserError(f"{path}: arr_1 is no list of {len(pixels)} classes")
    count = 0 if classes is None or not len(classes) else int(classes.max()) + 1
    labels = np.zeros(len(pixels), np.int64) if classes is None else classes.astype(np.int64)
    pixels = pixels.transpose(0, 3, 1, 2)
    return Images(str(path), pixels.shape[1:], labels, pixels.__getitem__, count)


def kind_of(out):
    suffix = Path(out).suffix.lower() if out else ".png"
    if suffix not in ("", ".png", ".zip", ".npz"):
        raise UserError(f"--out {out}: allowed: .png, .zip, .npz, or a folder's name without a dot")
    return suffix[1:] or "folder"


def check_out(path, kind, force):
    if not path.name:
        raise UserError(f"--out {path}: choose a name for a folder of its own")
    if path.is_dir() != (kind == "folder") and path.exists():
        raise UserError(f"--out {path} is {'a folder' if path.is_dir() else 'a file'}; "
                        "choose another name")
    if os.path.ismount(path.resolve()):
        raise UserError(f"--out {path} is the top of a disk; name a folder in it")
    if kind == "folder" and path.exists():
        others = {p.name for p in path.iterdir()} - set(sampled(path))
        if others:
            raise UserError(f"--out {path} holds {min(others)}, which sample.py did not write; "
                            "choose another name")
    if path.exists() and not force and (kind != "folder" or any(path.iterdir())):
        raise UserError(f"--out {path} exists; --force replaces it")
    above = next(folder for folder in path.resolve().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--out {path}: cannot write to {above}")
