"""Latents of real images with captions, for text to image: encoded once, kept."""

from pathlib import Path

import numpy as np
import torch

from base.errors import UserError
from images.captioned import open_captioned
from training.kept import made_once

PART = 256                      # images that an interruption can cost


class Latents:
    """Like images.real.Images, but for what its rows and their conditions are."""

    to_x = staticmethod(torch.Tensor.float)

    def __init__(self, rows, conditions):
        self.rows, self.conditions = rows, conditions

    def __len__(self):
        return len(self.rows)

    def take(self, indices):
        """Latents [B,C,H,W] float16, and the captions' numbers."""
        return self.rows.take(indices)[0], torch.tensor(indices)


def latents_of(source, pipeline, network, folder, device, stop):
    """A draw of the VAE's posterior for each image, as in DMD2."""
    if source != "emoji" and not Path(source).exists():
        raise UserError(f"--data {source}: no such folder or zip; wanted: pictures with captions, "
                        "in dataset.json or in a .txt beside each")
    images = open_captioned(source, pipeline.size)

    def make(part):
        rows = np.zeros(len(part), [("latent", np.float16, network.shape)])
        for row, number in zip(rows, part):
            generator = torch.Generator(device).manual_seed(number)
            pixels = torch.from_numpy(images.read(number))[None].to(device)
            row["latent"] = pipeline.encode(pixels, generator)[0].cpu().half().numpy()
        return rows

    about = dict(source=str(source), count=len(images), size=pipeline.size)
    rows = made_once(folder / "latents", about, len(images), PART, make, "latents", stop)
    return Latents(rows, pipeline.conditions(images.captions, network))
