"""The Inception-v3 network whose features FID compares: 2015-12-05 weights, one of two resizes.

A feature network maps uint8 images to (features, logits); digits_classifier.py and
emoji_judge.py have the others.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from base.devices import full_precision
from base.distributed import in_parallel
from base.download import fetch
from base.errors import UserError
from base.files import file_digest, load_tensors

# The convolutions of a block by their published names: (channels, kernel) or (channels, kernel,
# stride). One without a number, or with number 1, reads the block's input; any other reads the one
# before it, and the b of a pair reads what its a reads.


def block_35(pool):
    return {"branch1x1": (64, 1), "branch5x5_1": (48, 1), "branch5x5_2": (64, 5),
            "branch3x3dbl_1": (64, 1), "branch3x3dbl_2": (96, 3), "branch3x3dbl_3": (96, 3),
            "branch_pool": (pool, 1)}


def block_17(c):
    return {"branch1x1": (192, 1), "branch7x7_1": (c, 1), "branch7x7_2": (c, (1, 7)),
            "branch7x7_3": (192, (7, 1)), "branch7x7dbl_1": (c, 1), "branch7x7dbl_2": (c, (7, 1)),
            "branch7x7dbl_3": (c, (1, 7)), "branch7x7dbl_4": (c, (7, 1)),
            "branch7x7dbl_5": (192, (1, 7)), "branch_pool": (192, 1)}


BLOCK_8 = {"branch1x1": (320, 1), "branch3x3_1": (384, 1), "branch3x3_2a": (384, (1, 3)),
           "branch3x3_2b": (384, (3, 1)), "branch3x3dbl_1": (448, 1), "branch3x3dbl_2": (384, 3),
           "branch3x3dbl_3a": (384, (1, 3)), "branch3x3dbl_3b": (384, (3, 1)),
           "branch_pool": (192, 1)}

BLOCKS = {  # name: (pooling, convolutions); 35x35 maps, then 17x17, then 8x8
    "Mixed_5b": ("average", block_35(32)),
    "Mixed_5c": ("average", block_35(64)),
    "Mixed_5d": ("average", block_35(64)),
    "Mixed_6a": ("halve", {"branch3x3": (384, 3, 2), "branch3x3dbl_1": (64, 1),
                           "branch3x3dbl_2": (96, 3), "branch3x3dbl_3": (96, 3, 2)}),
    "Mixed_6b": ("average", block_17(128)),
    "Mixed_6c": ("average", block_17(160)),
    "Mixed_6d": ("average", block_17(160)),
    "Mixed_6e": ("average", block_17(192)),
    "Mixed_7a": ("halve", {"branch3x3_1": (192, 1), "branch3x3_2": (320, 3, 2),
                           "branch7x7x3_1": (192, 1), "branch7x7x3_2": (192, (1, 7)),
                           "branch7x7x3_3": (192, (7, 1)), "branch7x7x3_4": (192, 3, 2)}),
    "Mixed_7b": ("average", BLOCK_8),
    "Mixed_7c": ("max", BLOCK_8),  # a slip in the published network, and so part of FID
}


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU. With stride 2 there is no padding."""

    def __init__(self, inputs, channels, kernel, stride=1, padding=None):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        if padding is None:
            padding = [k // 2 for k in kernel] if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side, joined over channels in the order of the table, pooling last."""

    def __init__(self, inputs, pooling, convolutions):
        super().__init__()
        self.pooling, widths = pooling, []
        for name, spec in convolutions.items():
            if self.starts_branch(name):
                source = inputs
            elif not name.endswith("b"):
                source = widths.pop()
            self.add_module(name, ConvNorm(source, *spec))
            widths.append(spec[0])
        self.width = sum(widths) + (inputs if pooling == "halve" else 0)

    @staticmethod
    def starts_branch(name):
        return name.rpartition("_")[2][0] not in "2345"

    def pool(self, x):
        if self.pooling == "average":  # at the border over the pixels inside only
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        if self.pooling == "max":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        return F.max_pool2d(x, 3, stride=2)

    def forward(self, x):
        joined = []
        for name, conv in self.named_children():
            if self.starts_branch(name):
                source = self.pool(x) if name == "branch_pool" else x
            elif not name.endswith("b"):
                source = joined.pop()
            joined.append(conv(source))
        if self.pooling == "halve":
            joined.append(self.pool(x))
        return torch.cat(joined, 1)


class Inception(nn.Module):
    """uint8 [B,1 or 3,H,W] of any size -> features [B,2048], logits [B,1008]."""

    name, dimensions, classes, sha256 = "inception-2015-12-05", 2048, 1008, None
    metric, share = "FID", None         # no name of a share of right images

    def __init__(self, resize="tf1"):
        super().__init__()
        self.resize = RESIZES[resize]
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)  # 299 -> 149
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)  # 147, then pooled to 73
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, padding=0)  # 71, then pooled to 35
        width = 192
        for name, spec in BLOCKS.items():
            self.add_module(name, Mixed(width, *spec))
            width = self.get_submodule(name).width
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    @property
    def logit_bias(self):
        """The published Inception score is of logits without this bias."""
        return self.fc.bias

    def fold(self):
        """Batch norm is affine here: move it into the convolutions, which makes it free."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.conv = nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.Identity()
        return self.to(memory_format=torch.channels_last)

    def forward(self, images):
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, got {images.dtype}")
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be [B,1 or 3,H,W], got {list(images.shape)}")
        images = images.to(self.fc.weight.device)
        chunk = 4 if images.device.type == "cpu" else 64  # the fastest of 1 to 64 on two cores
        return in_chunks(self._chunk, images, chunk)

    def _chunk(self, images):
        x = self.resize(images.to(self.fc.weight.dtype))  # [B,C,299,299]
        x = ((x - 128) / 128).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
        features = x.mean((2, 3))
        return features, self.fc(features)


@cache
def resize_matrix(size, target=299):
    """[target,size]: TensorFlow 1's bilinear resize, where output j looks at j * size / target."""
    position = torch.arange(target, dtype=torch.float64) * size / target
    below = position.long()
    above = (below + 1).clamp(max=size - 1)
    share = (position - below)[:, None]
    return (1 - share) * F.one_hot(below, size) + share * F.one_hot(above, size)


@cache
def bicubic_matrix(size, target=299):
    """[target,size]: Pillow's bicubic resize, whose kernel widens where it makes images smaller."""
    scale = size / target
    centre = (torch.arange(target, dtype=torch.float64)[:, None] + 0.5) * scale
    d = (torch.arange(size, dtype=torch.float64) + 0.5 - centre).abs() / max(scale, 1)
    near, far = 1.5 * d ** 3 - 2.5 * d ** 2 + 1, -0.5 * d ** 3 + 2.5 * d ** 2 - 4 * d + 2
    weights = torch.where(d < 1, near, torch.where(d < 2, far, 0))
    return weights / weights.sum(1, keepdim=True)


def along_both(matrix, images):
    vertical, horizontal = (matrix(n).to(images) for n in images.shape[2:])
    return vertical @ images @ horizontal.T


# Float [B,C,H,W] in 0..255 -> [B,C,299,299]: EDM's, and clean-fid's (arXiv:2104.11222), which does
# not round to whole levels.
RESIZES = {"tf1": lambda images: along_both(resize_matrix, images),
           "clean": lambda images: along_both(bicubic_matrix, images).clip(0, 255)}


def in_chunks(network, images, size):
    """network(images) in passes of exactly `size` images, the last one padded with blanks.

    Kernels choose their order of summation by shape and by number of threads. With one shape, and
    on a CPU one thread to each pass, an image's features have the same bits in any batch and any
    number of processes.
    """
    if len(images) == 0:
        raise ValueError("no images")

    def one_pass(chunk):
        padding = (0, 0) * (images.ndim - 1) + (0, size - len(chunk))
        with torch.no_grad():  # each thread has its own switch
            return [out[:len(chunk)] for out in network(F.pad(chunk, padding))]

    with full_precision(images.device.type):
        outputs = in_parallel(one_pass, images.split(size), images.device)
        return tuple(torch.cat(parts) for parts in zip(*outputs))


def read_weights(path):
    """The dict in a torch.save file; no code in it runs."""
    try:
        weights = load_tensors(path)
    except Exception as error:  # torch raises many types for a damaged file
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: not a readable weights file ({reason})") from None
    if not isinstance(weights, dict):
        raise UserError(f"{path}: holds a {type(weights).__name__}, not weights by name")
    return weights


def load_strictly(network, weights, source):
    """Every name and shape must fit."""
    try:
        network.load_state_dict(weights)
    except (AttributeError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]  # it may name hundreds of weights
        raise UserError(f"{source}: not the weights of {network.name} ({reason})") from None


def load_trained(network, path, told):
    """One of our own, frozen; `told` is what its training has recorded beside the weights."""
    saved = read_weights(path)
    setattr(network, told, saved.pop(told, None))
    load_strictly(network, saved, path)
    network.sha256 = file_digest(path)
    return network.eval().requires_grad_(False)


def load_inception(cache=None, device="cpu", weights=None, resize="tf1"):
    """The published network, frozen and folded."""
    path = weights or fetch("inception-2015-12-05", cache)
    network = Inception(resize)
    load_strictly(network, read_weights(path), path)
    network.sha256 = file_digest(path)
    return network.fold().to(device)
