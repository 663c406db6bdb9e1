"""The small classifier behind digits-FID, and the perceptual distance made of its layers.

    python -m experiments.make_assets classifier     trains it (a minute): two files in assets/

Its penultimate features stand in for Inception's on the embedded 8x8 digits. A Frechet distance in
them is digits-FID: good for comparing models of the digits, comparable with no published FID.
"""

import torch
import torch.nn.functional as F
from torch import nn

from base.files import ASSETS
from metrics.inception import in_chunks, load_trained

WEIGHTS = ASSETS / "digits-features.pt"


class DigitsNetwork(nn.Module):
    """uint8 [B,1,8,8] -> features [B,64], logits [B,10]; the interface of Inception."""

    name, dimensions, classes, sha256 = "digits-features", 64, 10, None
    metric, share = "digits-FID", "right_class"

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

    def forward(self, images):
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, got {images.dtype}")
        if tuple(images.shape[1:]) != (1, 8, 8):
            raise ValueError(f"digits are [B,1,8,8], got {list(images.shape)}")
        return in_chunks(self._chunk, images.to(self.classify.weight.device), 64)

    def _chunk(self, images):
        features = self.layers(images.to(self.classify.weight.dtype) / 127.5 - 1)[-1].flatten(1)
        return features, self.classify(features)

    def right(self, logits, classes):
        return logits.argmax(1) == classes.to(logits.device)

    def perceptual_distance(self, a, b):
        """LPIPS in these layers, all weighted alike; a, b [B,1,8,8] in [-1,1] -> [B]."""
        pairs = zip(self.layers(a), self.layers(b))
        return sum((unit(p) - unit(q)).square().sum(1).mean((1, 2)) for p, q in pairs)


def unit(x):
    """x [B,C,H,W] scaled to unit length over channels; no infinite slope where x is all zero."""
    return x * (x.square().sum(1, keepdim=True) + 1e-10).rsqrt()


def load_digits_network(path=WEIGHTS, device="cpu"):
    return load_trained(DigitsNetwork(), path, "test_accuracy").to(device)
