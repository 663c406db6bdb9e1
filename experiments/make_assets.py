"""Make the embedded digits' files anew.

    python -m experiments.make_assets digits            digits.npz, from scikit-learn's copy
    python -m experiments.make_assets classifier        digits-features.pt, digits-reference.npz
    python -m experiments.make_assets export BEST OUT   of a checkpoint what sampling needs of it
"""

import io
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import trange

from base.errors import UserError, run
from base.files import ASSETS, write_arrays, write_atomically
from fid import FeatureStatistics, write_reference
from images.real import DIGITS, load_digits
from metrics.digits_classifier import WEIGHTS, DigitsNetwork
from weights.checkpoint import load, save


def make_digits():
    """The embedded digits from scikit-learn's copy of the published file (an extra, only here)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("making assets/digits.npz needs scikit-learn: "
                        "pip install scikit-learn") from None
    published = load_digits()
    write_arrays(DIGITS, images=published.images.astype(np.uint8),
                 labels=published.target.astype(np.uint8))


def held_out(labels):
    """Mask of the fixed, stratified fifth that training never sees: every fifth of each class."""
    seen = F.one_hot(labels, 10).cumsum(0)  # [N,10]
    return seen.gather(1, labels[:, None])[:, 0] % 5 == 0


def accuracy(network, images, labels):
    return (network(images)[1].argmax(1) == labels).double().mean().item()


def shifted(x, rng):
    """Every image moved by up to one pixel each way, between pixels too; blank beyond the edge."""
    move = torch.rand(len(x), 2, generator=rng) * 0.5 - 0.25  # two units are 8 pixels
    theta = torch.eye(2, 3).repeat(len(x), 1, 1)
    theta[:, :, 2] = move
    return F.grid_sample(x + 1, F.affine_grid(theta, x.shape, align_corners=False),
                         align_corners=False) - 1


def train(images, labels, steps=3000, batch=128, lr=2e-3):
    """A DigitsNetwork trained on images uint8 [N,1,8,8]; the same weights on every call."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    network = DigitsNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    x = images.float() / 127.5 - 1
    for _ in trange(steps, desc="training the digits network"):
        chosen = torch.randint(len(x), (batch,), generator=rng)
        features = network.layers(shifted(x[chosen], rng))[-1].flatten(1)
        logits = network.classify(features)
        # Smoothed labels keep features from growing without bound once the training set is learnt
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)


def make_classifier():
    torch.set_num_threads(1)  # sums split over threads round differently; one core is quick enough
    images, labels = load_digits()
    test = held_out(labels)
    network = train(images[~test], labels[~test])
    score = accuracy(network, images[test], labels[test])

    saved = io.BytesIO()
    torch.save({**network.state_dict(), "test_accuracy": score}, saved)
    write_atomically(WEIGHTS, lambda temporary: temporary.write_bytes(saved.getvalue()))

    statistics = FeatureStatistics(network.dimensions)
    statistics.add(network(images)[0])
    write_reference(ASSETS / "digits-reference.npz", statistics.mean(), statistics.covariance())
    print(f"test accuracy {score:.4f} on {int(test.sum())} of {len(test)} digits, held out "
          f"(every fifth of each class); wrote {WEIGHTS} and digits-reference.npz")


def export(source, out):
    """Only what sampling needs."""
    out = Path(out)
    if out.suffix != ".pt" or not os.access(out.resolve().parent, os.W_OK):
        raise UserError(f"cannot write {out}; wanted: an OUT.pt in a folder that can be written to")
    if (out.parent / "config.json").exists():
        raise UserError(f"{out} would be in a run's folder; choose another")
    names = ("dataset", "method", "stage", "sigmas", "network", "iteration", "fid", "ema")
    payload = load(source, needs=names)
    if "pipeline" in payload:
        raise UserError(f"{source} makes pictures from text: python text_to_image.py export "
                        f"{source} {out.with_suffix('')}")
    save(out, {name: payload[name] for name in (*names, "class_names") if name in payload})


COMMANDS = {("digits", 0): make_digits, ("classifier", 0): make_classifier, ("export", 2): export}


def main(argv):
    name, *files = argv or [""]
    if (name, len(files)) not in COMMANDS:
        raise UserError("usage: python -m experiments.make_assets digits, classifier, or export "
                        "BEST.pt OUT.pt")
    COMMANDS[name, len(files)](*files)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
