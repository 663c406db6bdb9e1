"""What images are held against, and the figures that come of it; memory does not grow with them."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from base import distributed
from weights.checkpoint import file_digest
from base.errors import UserError
from fid import (FeatureStatistics, InceptionScore, all_reduce, feature_network, frechet_distance,
                 precision_recall, read_reference)
from weights.opening import ASSETS, from_rank_zero, shown
from base.download import fetch

REFERENCES = {"cifar10": "fid-cifar10-32x32", "imagenet64": "fid-imagenet-64x64",
              "ffhq64": "fid-ffhq-64x64", "afhqv2-64": "fid-afhqv2-64x64"}
MANIFOLD = 10_000               # images of each kind that precision and recall hold in memory
NEIGHBOURS = 3


class Judge:
    """Feature network, reference statistics and real features: what all images are held against."""

    def __init__(self, dataset, device, *, reference=None, inception=None, cache=None):
        self.device, self.digits, self.real = device, dataset == "digits", None
        self.metric = "digits-FID" if self.digits else "FID"
        if not (reference or self.digits or dataset in REFERENCES):
            raise UserError("no reference is known for these images: give --dataset or --reference")
        path = reference or (ASSETS / "digits-reference.npz" if self.digits else None)
        self.path = path or from_rank_zero(lambda: fetch(REFERENCES[dataset], cache))
        if not Path(self.path).is_file():
            raise UserError(f"no reference at {self.path}")
        self.network = from_rank_zero(lambda: feature_network(dataset, cache, device, inception))
        self.reference = read_reference(self.path, self.network.dimensions)

    def compare_with(self, images, source):
        """Also precision and recall, against these real images."""
        self.real_source = f"{min(len(images), MANIFOLD)} of {len(images)} in {source}"
        chosen = np.linspace(0, len(images) - 1, min(len(images), MANIFOLD)).round().astype(int)
        blocks = [chosen[k:k + 64] for k in range(0, len(chosen), 64)]

        def task(block):
            return self.network(images.take(block)[0].to(self.device))[0]

        parts = distributed.in_parallel(task, blocks, self.device)
        self.real = torch.cat(list(progress(parts, len(blocks), "real features", "block")))

    def figures(self, task, blocks, lists, n, bar=None):
        """Of each image list that task(block) makes; the ranks share the blocks.

        task(block) -> (lists of images, classes or None); block holds seeds or indices in a row.
        """
        def features(block):
            images, classes = task(block)
            return block, [self.network(x.to(self.device)) for x in images], classes

        tallies = [Tally(self, n) for _ in range(lists)]
        mine = blocks[distributed.rank()::distributed.world_size()]
        for block, outputs, classes in distributed.in_parallel(features, mine, self.device):
            for tally, output in zip(tallies, outputs):
                tally.add(block[0] - blocks[0][0], *output, classes)
            if bar is not None:
                bar.update(len(block) * distributed.world_size())
        return [tally.figures() for tally in tallies]

    def protocol(self):
        about = {"reference": {"file": shown(self.path), "sha256": file_digest(self.path)},
                 "features": {"network": self.network.name, "sha256": self.network.sha256}}
        if self.real is not None:
            about["precision_recall"] = (f"k = {NEIGHBOURS}, first {MANIFOLD} images, real: "
                                         f"{self.real_source}")
        return about


class Tally:
    """Running sums over the images of one figure, and features up to MANIFOLD where asked for."""

    def __init__(self, judge, n):
        self.judge, self.n = judge, n
        self.statistics = FeatureStatistics(judge.network.dimensions, judge.device)
        self.right = torch.zeros(2, dtype=torch.float64, device=judge.device)   # of how many
        self.score = None if judge.digits or n < 10 else InceptionScore(n, device=judge.device)
        self.kept = []

    def add(self, first, features, logits, classes):
        """One block, whose first image is number `first` of the figure."""
        self.statistics.add(features)
        if self.judge.digits and classes is not None:
            hits = logits.argmax(1) == classes.to(logits.device)
            self.right += torch.stack([hits.sum(), torch.tensor(len(hits), device=hits.device)])
        if self.score:
            indices = torch.arange(first, first + len(logits))
            self.score.add(indices, logits - self.judge.network.logit_bias)
        if self.judge.real is not None and first < MANIFOLD:
            self.kept.append(features[:MANIFOLD - first].cpu())

    def figures(self):
        """On every rank, of the images of all ranks; precision and recall on rank 0 only."""
        self.statistics.all_reduce()
        all_reduce([self.right])
        statistics = self.statistics.mean(), self.statistics.covariance()
        figures = {self.judge.metric: frechet_distance(*statistics, *self.judge.reference)}
        if self.right[1]:
            figures["right_class"] = (self.right[0] / self.right[1]).item()
        if self.score:
            self.score.all_reduce()
            figures["inception_score"] = self.score.value()[0]
        if self.judge.real is not None:
            kept = self.kept
            if distributed.world_size() > 1:
                parts = [None] * distributed.world_size() if distributed.rank() == 0 else None
                dist.gather_object(kept, parts)
                kept = sum(parts or [], [])
            if kept:
                fake = torch.cat(kept).to(self.judge.device)
                pair = precision_recall(self.judge.real, fake, NEIGHBOURS)
                figures["precision"], figures["recall"] = pair
        return figures


def progress(items, total, text, unit="image"):
    return tqdm(items, text, total, unit=unit, disable=distributed.rank() > 0)
