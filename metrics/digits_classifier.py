"""The small classifier behind digits-FID, and the perceptual distance made of its layers.

    python -m metrics.digits_classifier      trains it (a minute), writes its two files in assets/

Its penultimate features stand in for Inception's on the embedded 8x8 digits. A Frechet distance in
them is digits-FID: good for comparing models of the digits, comparable with no published FID.
"""

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

from weights.checkpoint import file_digest, write_atomically
from base.errors import Parser, run
from metrics.inception import full_precision, in_chunks, load_strictly, read_weights

ASSETS = Path(__file__).resolve().parents[1] / "assets"
WEIGHTS = ASSETS / "digits-features.pt"


class DigitsNetwork(nn.Module):
    """uint8 [B,1,8,8] -> features [B,64], logits [B,10]; the interface of Inception."""

    name, dimensions, classes, sha256 = "digits-features", 64, 10, None
    logit_bias = 0  # nothing published to agree with

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([
            nn.Conv2d(1, 24, 3, padding=1),
            nn.Conv2d(24, 24, 3, padding=1),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.Conv2d(48, 64, 4),  # 4x4 -> 1x1: the penultimate features
        ])
        self.classify = nn.Linear(64, 10)

    def layers(self, x):
        """Activations [B,C,H,W] layer by layer, for float images in [-1,1]; differentiable."""
        activations = []
        for conv in self.convs:
            x = F.silu(conv(x))  # smooth, so that its use as a loss has gradients everywhere
            activations.append(x)
        return activations

    @torch.no_grad()
    def forward(self, images):
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, got {images.dtype}")
        if tuple(images.shape[1:]) != (1, 8, 8):
            raise ValueError(f"digits are [B,1,8,8], got {list(images.shape)}")
        device = self.classify.weight.device
        with full_precision(device.type):
            return in_chunks(self._chunk, images.to(device), 64)

    def _chunk(self, images):
        features = self.layers(images.to(self.classify.weight.dtype) / 127.5 - 1)[-1].flatten(1)
        return features, self.classify(features)

    def perceptual_distance(self, a, b):
        """LPIPS in these layers, all weighted alike; a, b [B,1,8,8] in [-1,1] -> [B]."""
        pairs = zip(self.layers(a), self.layers(b))
        return sum((unit(p) - unit(q)).square().sum(1).mean((1, 2)) for p, q in pairs)


def unit(x):
    """x [B,C,H,W] scaled to unit length over channels; no infinite slope where x is all zero."""
    return x * (x.square().sum(1, keepdim=True) + 1e-10).rsqrt()


def load_digits_network(path=WEIGHTS, device="cpu"):
    """The trained network, frozen; `test_accuracy` is the one that its training recorded."""
    network, saved = DigitsNetwork(), read_weights(path)
    network.test_accuracy = saved.pop("test_accuracy", None)
    load_strictly(network, saved, path)
    network.sha256 = file_digest(path)
    return network.eval().requires_grad_(False).to(device)


def load_digits(path=ASSETS / "digits.npz"):
    """uint8 images [1797,1,8,8] in 0..255 and int64 labels [1797]."""
    with np.load(path, allow_pickle=False) as file:
        grey = np.round(file["images"] * (255 / 16)).astype(np.uint8)  # published in 0..16
        return torch.from_numpy(grey)[:, None], torch.from_numpy(file["labels"].astype(np.int64))


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


def main():
    from fid import FeatureStatistics, write_reference  # fid.py imports this file
    Parser(prog="python -m metrics.digits_classifier",
           description="Train the digits network anew.").parse_args()
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


if __name__ == "__main__":
    run(main)
