"""Pictures of any size as squares of one, and their captions: a folder, a zip, or COCO."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from base.errors import UserError
from base.files import file_digest, lines_digest, shown
from images import emoji
from images.prompts import read_prompts, whole
from images.real import Images, decode, emoji_pictures, is_image, listed, open_files, slashed

COCO_CAPTIONS, COCO_PICTURES = "annotations/captions_val2014.json", "val2014"
COCO_IMAGES = 30_000            # of the papers' figures
COCO_SEED = 0                   # of the choice among them: everywhere the same list
LARGEST_SIDE = 4096
PATCH = 299                     # pixels a side of DMD2's patch FID: Inception's own
# Kinds of captions of emoji, as --prompts has them.
KINDS = {kind.replace(" ", "-"): kind for kind in ("training", *emoji.KINDS)}
EMOJI_CAPTIONS = 10_000         # of an evaluation, where no number is asked for


def check_side(side):
    if side is not None and not 1 <= side <= LARGEST_SIDE:
        raise UserError(f"--side {side}: must be 1 to {LARGEST_SIDE}")


def square(pixels, size):
    """The middle square, by Lanczos to one size: as DMD2 brings COCO's pictures to 256.

    uint8 [1 or 3,H,W] -> [3,size,size]
    """
    picture = in_colour(pixels)
    resized = middle(picture, min(picture.size)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(resized).transpose(2, 0, 1).copy()


def patch(pixels, size):
    """The middle square of this size with its pixels as they are, for DMD2's patch FID; a smaller
    picture whole, brought to that size. uint8 [1 or 3,H,W] -> [3,size,size]"""
    picture = in_colour(pixels)
    fits = min(picture.size) >= size
    cut = middle(picture, size) if fits else picture.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(cut).transpose(2, 0, 1).copy()


def in_colour(pixels):
    return Image.fromarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0))


def middle(picture, side):
    left, top = (round((length - side) / 2) for length in picture.size)     # to even, as there
    return picture.crop((left, top, left + side, top + side))


def squares(images, size, cut=square):
    """uint8 [B,1 or 3,H,W] -> [B,3,size,size] on the CPU"""
    return torch.from_numpy(np.stack([cut(x, size) for x in images.cpu().numpy()]))


class Pictures(Images):
    """Like other images, but that the files may have any sizes; with captions where asked for."""

    def __init__(self, source, size, captioned=False, cut=square, names=None):
        path = Path(source)
        if not path.exists():
            raise UserError(f"no pictures at {path}; wanted: a folder or zip of them")
        found, read_bytes = open_files(path)
        names = names or sorted(filter(is_image, found))
        if not names:
            raise UserError(f"no pictures in {path}")
        if missing := sorted(set(names) - set(found)):
            raise UserError(f"{path}: {len(missing)} of {len(names)} pictures are not there, "
                            f"{missing[0]} is the first")
        super().__init__(str(path), (3, size, size), np.zeros(len(names), np.int64),
                         lambda number: cut(decode(path, names[number], read_bytes), size), 0)
        self.captions = captions_of(path, names, set(found), read_bytes) if captioned else None
        self.order = lines_digest(names)


def open_captioned(source, size):
    """Pictures and their captions; "emoji" at their own size."""
    return emoji_pictures() if source == "emoji" else Pictures(source, size, captioned=True)


def captions_of(path, names, found, read_bytes):
    """The caption of each picture, which dataset.json tells, or a .txt file beside it."""
    if "dataset.json" in found:
        every = listed(path, names, read_bytes)[0] or {}
        told = {name: every[slashed(name)] for name in names
                if type(every.get(slashed(name))) is str}       # a number is a class
    else:
        try:
            told = {name: read_bytes(text).decode("utf-8-sig").strip() for name in names
                    if (text := str(Path(name).with_suffix(".txt"))) in found}
        except Exception as error:          # the files'
            raise UserError(f"{path}: its captions cannot be read: {error}") from error
    missing = [name for name in names if name not in told]
    if missing:
        raise UserError(f"{path}: {len(missing)} of {len(names)} pictures have no caption, "
                        f"{missing[0]} is the first; wanted: dataset.json with {{\"labels\": "
                        "[[name, caption], ...]}, or a .txt beside each")
    return [whole(told[name]) for name in names]


def coco_captions(folder):
    """(file name, one of its captions) of each picture of val2014; the caption, and the order of
    the pictures, by COCO_SEED."""
    path, told, draw = Path(folder) / COCO_CAPTIONS, {}, np.random.RandomState(COCO_SEED)
    if not path.is_file():
        raise UserError(f"no {path}: --coco wants a folder with COCO 2014's {COCO_CAPTIONS}, of "
                        "annotations_trainval2014.zip, and for a reference its pictures, "
                        f"{COCO_PICTURES}/*.jpg, of val2014.zip; both are published at "
                        "cocodataset.org")
    try:
        for one in sorted(json.loads(path.read_text("utf-8"))["annotations"],
                          key=lambda one: one["id"]):
            told.setdefault(int(one["image_id"]), []).append(whole(one["caption"].strip()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} holds no captions as COCO's does: {error!r}") from None
    return [(f"COCO_val2014_{image:012d}.jpg", told[image][draw.randint(len(told[image]))])
            for image in draw.permutation(sorted(told))]


def coco_pictures(folder, n, size, cut):
    """The pictures that the first n captions are of; n None: all."""
    names = [name for name, _ in coco_captions(folder)]
    if n is not None and not 2 <= n <= len(names):
        raise UserError(f"--n {n}: must be 2 to {len(names):,}")
    return Pictures(Path(folder) / COCO_PICTURES, size, cut=cut, names=names[:n])


class Asked(NamedTuple):
    """What a text-to-image network is asked for in an evaluation, and how a record says so."""
    prompts: list               # one for each image, in order; empty: no prompts
    protocol: dict


def kind_of_captions(dataset, prompts):
    """Of emoji what --prompts names, or without it what they are trained on; else None."""
    return KINDS.get(prompts or "training") if dataset == "emoji" else None


def prompts_for(dataset, prompts, n):
    """All of a file of prompts, or n captions of emoji; [] where none are given or known."""
    if kind := kind_of_captions(dataset, prompts):
        return emoji.captions(emoji.first_scenes(n, emoji.CAPTIONS_SEED, kind))
    return read_prompts(prompts) if prompts else []


def read_captions(prompts, coco, n, dataset=None):
    """The first n of a file of prompts, or of COCO's captions, n None: the papers' number; or n
    captions of emoji."""
    kind = None if coco else kind_of_captions(dataset, prompts)
    if kind:
        texts = prompts_for(dataset, prompts, n or EMOJI_CAPTIONS)
        return Asked(texts, {"prompts": {"file": f"emoji, {kind}", "sha256": lines_digest(texts),
                                         "choice": f"drawn by seed {emoji.CAPTIONS_SEED}"}})
    if not (prompts or coco):
        return Asked([], {})
    path = prompts or Path(coco) / COCO_CAPTIONS
    texts = read_prompts(path) if prompts else [text for _, text in coco_captions(coco)]
    n = n or min(len(texts), COCO_IMAGES)
    if not 2 <= n <= len(texts):
        fewer = "; a smaller --n takes the first of them" if len(texts) > 1 else ""
        raise UserError(f"{path} has {len(texts)} captions, {max(n, 2)} images need as many{fewer}")
    about = {"file": shown(path), "sha256": file_digest(path)}
    if not prompts:
        about["choice"] = f"one caption of each picture, drawn by seed {COCO_SEED} as their order"
    return Asked(texts[:n], {"prompts": about})
