"""Real images.

Only DMD2's GAN, stage 0, references, and precision and recall read any: distillation without a
GAN needs none.
"""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from base.distributed import say
from base.download import fetch
from base.errors import UserError
from base.files import ASSETS
from base.progress import progress
from images import emoji
from models import from_uint8

DIGITS = ASSETS / "digits.npz"
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
CIFAR10_SHAPE, CIFAR10_RECORD = (3, 32, 32), 1 + 3 * 32 * 32
LARGEST_FILE, LARGEST_IMAGE = 1 << 28, 1 << 24      # bytes, pixels: what is above is a bomb


class ByNumber:
    """`count` rows of arrays, the last of them what the row is of."""

    conditions = None                       # the network's own

    def __len__(self):
        return self.count

    def take(self, numbers):
        """A tensor of each array of row(number)."""
        return tuple(torch.from_numpy(np.stack(rows)) for rows in zip(*map(self.row, numbers)))


class Images(ByNumber):
    """uint8 images [C,H,W] with classes; `read(index)` gives one image of a folder or zip."""

    to_x = staticmethod(from_uint8)
    order = ""                              # a hash of the files' names in order, where that counts

    def __init__(self, name, shape, labels, read, classes, class_names=()):
        self.class_names = tuple(class_names)
        self.name, self.shape, self.labels, self.read = name, shape, labels, read
        self.count, self.classes = len(labels), classes         # 0 classes: none, zeros as labels

    def row(self, number):
        return self.read(int(number)), self.labels[number]

    def batches(self, size):
        for start in range(0, len(self), size):
            yield self.take(range(start, min(start + size, len(self))))


def open_images(source, cache=None):
    """ "digits", "emoji", "cifar10" (the published archive), or a path: archive, folder, zip."""
    if source in ("digits", "emoji"):
        return digits() if source == "digits" else emoji_pictures()
    path = fetch("cifar10", cache) if source == "cifar10" else Path(source)
    if not path.exists():
        raise UserError(f"no images at {path}: give digits, emoji, cifar10, a folder, a zip, or "
                        "CIFAR-10's binary archive, as --data or --images")
    pictures = path.is_dir() or zipfile.is_zipfile(path)
    return folder_or_zip(path) if pictures else cifar10(path)


def load_digits():
    """uint8 images [1797,1,8,8] in 0..255 and int64 labels [1797]."""
    with np.load(DIGITS, allow_pickle=False) as file:
        grey = np.round(file["images"] * (255 / 16)).astype(np.uint8)  # published in 0..16
        return torch.from_numpy(grey)[:, None], torch.from_numpy(file["labels"].astype(np.int64))


def digits():
    """1,797 handwritten digits, 8x8, 0..16 as published, here 0..255."""
    try:
        pixels, labels = load_digits()
    except Exception as error:              # numpy, zipfile and zlib raise many types
        raise UserError(f"{DIGITS} is damaged ({error}); it is part of the repository: git "
                        "checkout brings it back") from error
    return Images("digits", (1, 8, 8), labels.numpy(), pixels.numpy().__getitem__, 10)


def emoji_pictures():
    """40,000 of one emoji and of two, painted when read; with captions."""
    rng = torch.Generator().manual_seed(emoji.PICTURES_SEED)
    scenes = emoji.draw_scenes(emoji.PICTURES, rng)

    def read(index):
        return emoji.paint(scenes.take(slice(index, index + 1)))[0].numpy()

    images = Images("emoji", (3, emoji.SIDE, emoji.SIDE), np.zeros(emoji.PICTURES, np.int64), read,
                    0)
    images.captions = emoji.captions(scenes)
    return images


def cifar10(path):
    """The training set in the published binary archive: records of one label and 3072 pixels."""
    parts = []
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:                      # one pass; nothing is written to disk
                name = Path(member.name).name
                if member.isfile() and name.startswith("data_batch") and name.endswith(".bin"):
                    if member.size > LARGEST_FILE:
                        raise ValueError(f"{name} would have {member.size} bytes")
                    parts.append((member.name, archive.extractfile(member).read()))
    except Exception as error:              # tarfile, gzip and zlib raise many types
        reason = "" if isinstance(error, tarfile.ReadError) else f": {' '.join(str(error).split())}"
        raise UserError(f"{path} is neither a whole zip nor CIFAR-10's binary archive"
                        + reason) from error
    if not parts:
        raise UserError(f"{path} holds no data_batch_*.bin; wanted: cifar-10-binary.tar.gz")
    for name, part in parts:
        if not part or len(part) % CIFAR10_RECORD:
            raise UserError(f"{path}: {name} has {len(part)} bytes, not a multiple of "
                            f"{CIFAR10_RECORD}")
    records = np.frombuffer(b"".join(part for _, part in sorted(parts)), np.uint8)
    records = records.reshape(-1, CIFAR10_RECORD)
    if records[:, 0].max() > 9:
        raise UserError(f"{path}: class {records[:, 0].max()} is out of range; allowed: 0 to 9")
    pixels = records[:, 1:].reshape(-1, *CIFAR10_SHAPE)
    return Images("cifar10", CIFAR10_SHAPE, records[:, 0].astype(np.int64), pixels.__getitem__, 10)


def folder_or_zip(path):
    """Images in EDM's layout: any folders, and dataset.json {"labels": [[name, class], ...]}."""
    found, read_bytes = open_files(path)
    names, has_labels = sorted(filter(is_image, found)), "dataset.json" in found
    if not names:
        raise UserError(f"no images in {path}; wanted: {', '.join(IMAGE_FILES)}")
    deeper = [name for name in found if Path(name).name == "dataset.json"]
    if deeper and not has_labels:
        raise UserError(f"{path}: {deeper[0]}, which tells the classes, has to stand at the top, "
                        "beside the folders")
    labels, class_names = read_labels(path, names, read_bytes) if has_labels else (None, ())
    classes = 0 if labels is None else int(labels.max()) + 1
    first = decode(path, names[0], read_bytes)

    def read(index):
        image = decode(path, names[index], read_bytes)
        if len(first) == 1 and (image == image[:1]).all():      # greys of a palette, or as RGBA
            image = image[:1]
        if image.shape != first.shape:
            raise UserError(f"{path}: {names[index]} is {shape_text(image)}, but {names[0]} is "
                            f"{shape_text(first)}; all images must have one size, and be grey or "
                            "in colour")
        return image

    labels = np.zeros(len(names), np.int64) if labels is None else labels
    return Images(str(path), first.shape, labels, read, classes, class_names[:classes])


def is_image(name):
    return (Path(name).suffix.lower() in IMAGE_FILES
            and not Path(name).name.startswith("._"))   # which macOS puts beside each in a zip


def open_files(path):
    """Names of the files in a folder or zip, and a reader of their bytes; a zip is kept open."""
    if path.is_dir():
        found = [str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()]
        return found, lambda name: (path / name).read_bytes()
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:              # beyond BadZipFile: struct's, unsupported versions
        raise UserError(f"{path} is a damaged zip: {error}") from error

    def read_bytes(name):
        size = archive.getinfo(name).file_size          # zipfile reads no more than it states
        if size > LARGEST_FILE:
            raise ValueError(f"it would have {size} bytes")
        return archive.read(name)

    return [name for name in archive.namelist() if not name.endswith("/")], read_bytes


def shape_text(image):
    return f"{image.shape[2]}x{image.shape[1]} with {image.shape[0]} channel(s)"


def decode(path, name, read_bytes):
    """One image file as uint8 [C,H,W], grey or RGB."""
    try:
        with Image.open(io.BytesIO(read_bytes(name))) as image:
            if image.width * image.height > LARGEST_IMAGE:
                raise ValueError(f"{image.width}x{image.height} is above {LARGEST_IMAGE} pixels")
            if image.mode.startswith("I"):              # 16-bit grey, which Pillow would clip
                pixels = np.round(np.array(image) / 257).clip(0, 255).astype(np.uint8)
            else:
                grey = image.mode in ("1", "L", "LA")
                pixels = np.array(image.convert("L" if grey else "RGB"))
    except Exception as error:              # Pillow, zipfile and zlib raise many types
        reason = str(error).partition(" <_io.BytesIO")[0]           # no addresses of ours
        raise UserError(f"{path}: cannot read {name} as an image: {reason}") from error
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def read_labels(path, names, read_bytes):
    """Classes [N] from dataset.json, in the order of names, None where it says null or captions;
    and what it calls them, where it has "classes": [name, ...] too."""
    told, class_names = listed(path, names, read_bytes)
    if told and not class_names and all(type(label) is str and not label.isdigit()
                                        for label in told.values()):
        say(f"{path}: dataset.json has captions, which are no classes: taken as having none")
        told = None
    if told is None:
        return None, ()
    for name in names:
        label = told.get(slashed(name))
        if type(label) is not int or not 0 <= label < 1 << 31:
            raise UserError(f"{path}: dataset.json gives {name} the class {label!r}; allowed: "
                            "whole numbers from 0")
    return np.array([told[slashed(name)] for name in names], np.int64), class_names


def listed(path, names, read_bytes):
    """What dataset.json tells of each of these images, by name, None where it says null; and its
    names of the classes."""
    try:
        content = json.loads(read_bytes("dataset.json"))
        pairs, class_names = content["labels"], list(map(str, content.get("classes") or ()))
        if pairs is None:
            return None, ()
        pairs = [(slashed(str(name)), label) for name, label in pairs]
    except Exception as error:              # the file's, and whatever JSON may hold
        raise UserError(f"{path}: dataset.json is not {{\"labels\": [[name, class], ...]}}: "
                        f"{error}") from error
    there, told = set(map(slashed, names)), {}
    for name, label in pairs:
        if name not in there or name in told:
            raise UserError(f"{path}: dataset.json names {name[:200]}, "
                            + ("twice" if name in told else "which is no image there"))
        told[name] = label
    return told, class_names


def slashed(name):
    return name.replace("\\", "/")


def check_every_image(images):
    """Each can be read and has the size of the first; known before days of training."""
    for index in progress(range(len(images)), desc="checking the images", unit="image", delay=1):
        images.read(index)


def check_fits(images, network):
    """The images must be what the network makes."""
    if images.shape != network.shape:
        raise UserError(f"{images.name} has images of shape {list(images.shape)}, the teacher "
                        f"makes {list(network.shape)}")
    known = network.conditions.count
    if known and images.classes > known:
        raise UserError(f"{images.name} has class {images.classes - 1}, out of range: the teacher "
                        f"knows 0 to {known - 1}")
    if known and not images.classes:
        raise UserError(f"{images.name} has no classes (dataset.json), the teacher needs them")
