"""Pictures with captions: a folder or zip whose dataset.json, or .txt files beside them, tell."""

from pathlib import Path

import numpy as np
from PIL import Image

from base.errors import UserError
from images.real import decode, is_image, listed, open_files


class Captioned:
    """RGB pictures, cropped to their middle square and brought to one size."""

    def __init__(self, path, names, captions, read_bytes, size):
        self.path, self.names, self.captions = path, names, captions
        self.read_bytes, self.size = read_bytes, size

    def __len__(self):
        return len(self.names)

    def read(self, number):
        """uint8 [3,size,size]"""
        pixels = decode(self.path, self.names[number], self.read_bytes)
        picture = Image.fromarray(np.repeat(pixels, 4 - len(pixels), 0)[:3].transpose(1, 2, 0))
        return np.asarray(square(picture, self.size)).transpose(2, 0, 1).copy()


def square(picture, size):
    """The middle square, by Lanczos to size x size: as DMD2 brings COCO's pictures to 256."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize(
        (size, size), Image.Resampling.LANCZOS)


def open_captioned(source, size):
    path = Path(source)
    if not path.exists():
        raise UserError(f"no pictures at {path}: give --data a folder or zip of them with captions")
    found, read_bytes = open_files(path)
    names = sorted(filter(is_image, found))
    if not names:
        raise UserError(f"no pictures in {path}")
    told = captions_of(path, set(found), read_bytes)
    missing = [name for name in names if name not in told]
    if missing:
        raise UserError(f"{path}: {len(missing)} of {len(names)} pictures have no caption, "
                        f"{missing[0]} is the first; wanted: dataset.json with {{\"labels\": "
                        "[[name, caption], ...]}, or a .txt beside each")
    return Captioned(path, names, [told[name] for name in names], read_bytes, size)


def captions_of(path, found, read_bytes):
    """Name of a picture -> its caption."""
    if "dataset.json" in found:
        told, _ = listed(path, filter(is_image, found), read_bytes)
        return {name: str(caption) for name, caption in (told or {}).items()}
    try:
        return {name: read_bytes(text).decode().strip() for name in found if is_image(name)
                if (text := str(Path(name).with_suffix(".txt"))) in found}
    except Exception as error:              # the files'
        raise UserError(f"{path}: its captions cannot be read: {error}") from error
