"""FID of a network at every step count while it trains."""

from functools import partial

import torch

from metrics.judge import Judge
from models import sample_every_step, sample_heun
from weights.opening import sample_block, seed_blocks

HEUN_STEPS = 18                 # of a teacher in training: 35 evaluations


class Scorer:
    """score(network, sigmas) -> {"1": {"digits-FID": 3.2, "right_class": 0.99}, "2": ...}."""

    def __init__(self, config, options, device):
        self.images, self.device = config.evaluate_images, device
        if config.evaluate_every:                       # now: it may lack a file
            self.judge = Judge(config.dataset, device, reference=options.reference,
                               inception=options.inception, cache=options.cache)

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
            return sample_block(network, seeds, sampler, "random", self.device)

        blocks = seed_blocks(range(self.images), network, self.device)
        return dict(zip(keys, self.judge.figures(task, blocks, len(keys), self.images)))
