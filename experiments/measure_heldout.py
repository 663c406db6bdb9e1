"""How long the digits teacher should train: its loss on digits that it has not seen.

    OMP_NUM_THREADS=1 python -m experiments.measure_heldout     writes results/heldout.json

1,500 of the 1,797 digits train a network as stage 0 --ema-rampup 0 does; the loss of its average on
the other 297 is least where more training would only learn the 1,500 by heart.
"""

import copy

import torch
import torch.nn.functional as F
from tqdm import tqdm

from base.errors import Parser, run
from base.files import ROOT, write_json
from edm_networks import EDMPrecond
from images import real
from losses import edm_loss
from models import from_uint8, sigma_lognormal, update_ema
from presets.datasets import DIGITS
from presets.rows import find

ITERATIONS, HELD_OUT, DRAWS = 3000, 297, 8


def main():
    Parser(prog="experiments.measure_heldout", description=__doc__).parse_args()
    config, digits = find("digits", "pmdd", 0).config, real.digits()
    pixels, labels = digits.take(list(range(len(digits))))
    x, y = from_uint8(pixels), F.one_hot(labels, 10).float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(7))
    unseen, seen = order[:HELD_OUT], order[HELD_OUT:]
    torch.manual_seed(0)
    network, rng = EDMPrecond(**DIGITS.network), torch.Generator().manual_seed(1)
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=0,
                                  fused=True)

    def loss(network, chosen, rng):
        sigma = sigma_lognormal(network.levels, len(chosen), rng)
        eps = torch.randn(x[chosen].shape, generator=rng)
        return edm_loss(x[chosen], sigma, eps, y[chosen], teacher=network,
                        sigma_data=network.sigma_data)

    def mean_loss(chosen):
        rng = torch.Generator().manual_seed(5)
        with torch.no_grad():
            return sum(loss(average, chosen, rng).item() for _ in range(DRAWS)) / DRAWS

    curve = []
    for step in tqdm(range(1, ITERATIONS + 1)):
        chosen = seen[torch.randint(len(seen), (config.batch,), generator=rng)]
        loss(network, chosen, rng).backward()
        optimizer.step()
        optimizer.zero_grad()
        update_ema(average, network, config.batch, config.ema_halflife)
        if step % 250 == 0:
            curve.append({"iterations": step, "unseen": mean_loss(unseen),
                          "seen": mean_loss(seen[:HELD_OUT])})
    record = {"command": "OMP_NUM_THREADS=1 python -m experiments.measure_heldout",
              "torch": torch.__version__, "network": DIGITS.network, "curve": curve}
    write_json(ROOT / "results" / "heldout.json", record)


if __name__ == "__main__":
    run(main)
