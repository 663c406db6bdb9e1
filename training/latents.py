"""Latents of real images with captions, for text to image: encoded once, kept."""

from pathlib import Path

import numpy as np
import torch

from base.errors import UserError
from base.files import lines_digest
from images.captioned import open_captioned
from training.kept import Rows, made_once

PART = 256                      # images that an interruption can cost


class Latents(Rows):
    """float16 [C,H,W], each of the caption of its number."""

    def __init__(self, rows, conditions):
        super().__init__(rows.parts, rows.size)
        self.conditions = conditions

    def row(self, number):
        return super().row(number)[0], number


def latents_of(source, opened, network, folder, device, stop):
    """A draw of the VAE's posterior for each image, as in DMD2."""
    pipeline = opened.pipeline
    if source != "emoji" and not Path(source).exists():
        raise UserError(f"--data {source}: no such folder or zip; the GAN wants pictures with "
                        "captions, in dataset.json or in a .txt beside each")
    images = open_captioned(source, pipeline.size)
    if images.shape[1] != pipeline.size:
        raise UserError(f"--data {source}: pictures of {images.shape[1]} pixels a side, those of "
                        f"{opened.base} have {pipeline.size}")

    def make(part):
        rows = np.zeros(len(part), [("latent", np.float16, network.shape)])
        for row, number in zip(rows, part):
            generator = torch.Generator(device).manual_seed(number)
            pixels = torch.from_numpy(images.read(number))[None].to(device)
            row["latent"] = pipeline.encode(pixels, generator)[0].cpu().half().numpy()
        return rows

    about = dict(source=str(source), count=len(images), order=images.order, size=pipeline.size,
                 pipeline=opened.base, captions=lines_digest(images.captions))
    rows = made_once(folder / "latents", about, len(images), PART, make, "latents", stop)
    return Latents(rows, pipeline.conditions(images.captions, network))
