"""The network passes that a run has made so far: what its quality is held against."""

from dataclasses import replace

from training.cost import pair_passes
from training.draws import steps_trained
from training.rehearsal import Rehearsal

# What a pass costs in forward ones: back through frozen weights one more, for the gradient of
# trained weights another.
WEIGHT = {"none": 1, "input": 2, "weights": 3}
# Any network's passes are this one's.
SMALLEST = dict(img_resolution=4, img_channels=1, label_dim=1, model_type="SongUNet", augment_dim=9,
                model_channels=4, channel_mult=[1], num_blocks=1, attn_resolutions=[])


def smallest(iterate, config):
    """The iteration of this preset, on a network that takes no time."""
    return Rehearsal(iterate, replace(config, batch=1, lora=0), SMALLEST, device="cpu")


class Passes:
    """The network passes of a run so far: its preset's alone, so a resumed run counts the same."""

    def __init__(self, iterate, config):
        self.iterate, self.config = iterate, config
        self.kinds, self.done, self.rehearsal = {}, 0, None
        self.total = pair_passes(config)

    def until(self, iterations):
        """Of the first iterations; called with ever more of them."""
        config = self.config
        self.rehearsal = self.rehearsal or smallest(self.iterate, config)
        for step in range(self.done, iterations):
            kind = steps_trained(config, step), step % config.ttur == 0
            if kind not in self.kinds:
                self.kinds[kind] = sum(
                    one.batches * WEIGHT[one.gradient] for one in self.rehearsal.run(
                        step, self.rehearsal.optimizers()) if one.role != "distance")
            self.total += self.kinds[kind] * config.batch
        self.done = iterations
        return self.total
