"""Diversity as DMD2 has it (App. B): the mean LPIPS between four images of one prompt."""

from itertools import combinations

import torch

from base import distributed
from base.devices import full_precision
from base.distributed import from_rank_zero
from base.files import file_digest, shown
from fid import all_reduce
from images.captioned import squares
from images.prompts import read_prompts
from metrics.lpips import load_lpips
from models import from_uint8

IMAGES, LARGEST = 4, 512        # of each prompt; pixels a side, to which larger ones are brought


class Diversity:
    """Of these prompts, over all processes, which share them."""

    def __init__(self, path, cache, device):
        self.path, self.prompts, self.device = path, read_prompts(path), device
        # Of pictures as they are, as DMD's regression for text.
        self.distance = from_rank_zero(lambda: load_lpips(cache, device, resize=None))

    @torch.no_grad()
    def scores(self, task, lists):
        """Of each list of uint8 images that task(numbers) makes; image k is of prompt k // 4."""
        sums = torch.zeros(lists, dtype=torch.float64, device=self.device)
        for k in range(distributed.rank(), len(self.prompts), distributed.world_size()):
            images, _ = task(range(k * IMAGES, (k + 1) * IMAGES))
            images = [squares(x, min(x.shape[-1], LARGEST)).to(self.device) for x in images]
            sums += torch.stack([self.mean(x) for x in images])
        all_reduce([sums])
        return (sums / len(self.prompts)).tolist()

    def mean(self, images):
        """Between all pairs of [B,C,H,W]."""
        x = from_uint8(images)
        first, second = map(list, zip(*combinations(range(len(x)), 2)))
        with full_precision(x.device.type):
            return self.distance(x[first], x[second]).mean()

    def protocol(self):
        return (f"diversity: mean LPIPS (VGG) between {IMAGES} images of each prompt of "
                f"{shown(self.path)} ({file_digest(self.path)[:8]}), at most {LARGEST} pixels a "
                "side")
