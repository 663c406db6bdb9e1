"""FID of a network at every step count while it trains; the ranks share the images."""

from functools import partial
from pathlib import Path

import torch

import distributed
from fid import FeatureStatistics, feature_network, frechet_distance, read_reference
from models import sample_every_step, sample_heun
from networks import in_parallel, sample_block, seed_blocks
from pretrained import fetch

HEUN_STEPS = 18                 # of a teacher in training: 35 evaluations
DIGITS_REFERENCE = Path(__file__).parent / "assets" / "digits-reference.npz"


def published_reference(dataset, cache):
    if dataset == "digits":
        return DIGITS_REFERENCE
    names = {"cifar10": "fid-cifar10-32x32", "imagenet64": "fid-imagenet-64x64"}
    return fetch(names[dataset], cache)


class Scorer:
    """score(network, sigmas) -> {"1": {"digits-FID": 3.2, "right_class": 0.99}, "2": ...}."""

    def __init__(self, config, options, device):
        self.device, self.images = device, config.evaluate_images
        self.metric = "digits-FID" if config.dataset == "digits" else "FID"
        if not config.evaluate_every:
            return
        for turn in (distributed.rank() == 0, distributed.rank() > 0):      # one process downloads
            if turn:
                self.features = feature_network(config.dataset, options.cache, device,
                                                weights=options.inception)
                path = options.reference or published_reference(config.dataset, options.cache)
                self.reference = read_reference(path, self.features.dimensions)
            distributed.barrier()

    @torch.no_grad()
    def score(self, network, sigmas):
        """A student at 1..n steps from one roll-out; without sigmas a teacher (key "heun")."""
        if sigmas:
            keys = [str(n + 1) for n in range(len(sigmas))]
            sampler = partial(sample_every_step, sigmas=sigmas)
        else:
            keys = ["heun"]

            def sampler(*inputs):
                return [sample_heun(*inputs, steps=HEUN_STEPS)]

        def task(seeds):
            images, classes = sample_block(network, seeds, sampler, "random", self.device)
            return [self.features(x) for x in images], classes

        statistics = [FeatureStatistics(self.features.dimensions, self.device) for _ in keys]
        right = torch.zeros(len(keys), dtype=torch.float64, device=self.device)
        blocks = seed_blocks(range(self.images), network, self.device)
        mine = blocks[distributed.rank()::distributed.world_size()]
        for outputs, classes in in_parallel(task, mine, self.device):
            for k, (features, logits) in enumerate(outputs):
                statistics[k].add(features)
                if self.metric == "digits-FID" and classes is not None:
                    right[k] += (logits.argmax(1) == classes).sum()
        return {key: self.figures(statistics[k], right[k]) for k, key in enumerate(keys)}

    def figures(self, statistics, right):
        statistics.all_reduce()
        fid = frechet_distance(statistics.mean(), statistics.covariance(), *self.reference)
        figures = {self.metric: float(fid)}
        if self.metric == "digits-FID":
            share = distributed.mean_over_ranks([right.item()], self.device)[0]
            figures["right_class"] = share * distributed.world_size() / self.images
        return figures
