"""LPIPS (arXiv:1801.03924) with VGG-16, the distance of DMD's regression loss (DMD Eq. 9)."""

import torch
import torch.nn.functional as F
from torch import nn

from base.download import fetch
from metrics.inception import load_strictly, read_weights

STAGES = (64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)  # pooled between


class LPIPS(nn.Module):
    """Images a, b [B,1 or 3,H,W] in [-1,1] -> distances [B]; weights frozen, names as published.

    resize: side of the square that the images are brought to first, 224 as in DMD; None keeps them.
    """

    name = "LPIPS"

    def __init__(self, resize=224):
        super().__init__()
        self.resize = resize
        layers, self.taps, width = [], [], 3  # taps: the last ReLU of each stage
        for stage, channels in enumerate(STAGES):
            layers += [nn.MaxPool2d(2)] if stage else []
            for c in channels:
                layers += [nn.Conv2d(width, c, 3, padding=1), nn.ReLU()]
                width = c
            self.taps.append(len(layers) - 1)
            weights = nn.Conv2d(width, 1, 1, bias=False)
            published = nn.ModuleDict({"model": nn.Sequential(nn.Identity(), weights)})
            self.add_module(f"lin{stage}", published)  # so named: lin0.model.1.weight
        self.features = nn.Sequential(*layers)
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188])[:, None, None], False)
        self.register_buffer("scale", torch.tensor([.458, .448, .450])[:, None, None], False)
        self.eval().requires_grad_(False)

    def forward(self, a, b):
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] not in (1, 3):
            raise ValueError("LPIPS compares two batches [B,1 or 3,H,W] of one shape, got "
                             f"{list(a.shape)} and {list(b.shape)}")
        distance = 0
        for stage, (p, q) in enumerate(zip(self.activations(a), self.activations(b))):
            weights = self.get_submodule(f"lin{stage}.model.1")
            distance = distance + weights((unit(p) - unit(q)).square()).mean((1, 2, 3))
        return distance

    def activations(self, x):
        """relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""
        if self.resize is not None:
            size = (self.resize, self.resize)
            x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        x = (x - self.shift) / self.scale  # grey becomes three channels here
        kept = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.taps:
                kept.append(x)
        return kept


def unit(x):
    """x [B,C,H,W] at unit length over channels; vector_norm has gradient 0, not NaN, at 0."""
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)


def load_lpips(cache=None, device="cpu", resize=224):
    """LPIPS with torchvision's VGG-16 and the published linear weights."""
    vgg, linear = fetch("vgg16", cache), fetch("lpips-vgg", cache)
    network = LPIPS(resize)
    weights = {name: weight for name, weight in read_weights(vgg).items()
               if not str(name).startswith("classifier.")}  # only the convolutions take part
    load_strictly(network, {**weights, **read_weights(linear)}, f"{vgg}, {linear}")
    return network.to(device, memory_format=torch.channels_last)
