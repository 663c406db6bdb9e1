"""The CIFAR-10 network against itself with resampling by grouped (transposed) convolutions.

    python -m experiments.measure_network_speed       writes results/network-speed.json

Batch 8 on 2 threads, both in one process, in turn; medians, and the ratio ours / grouped.
"""

import statistics
import time
from contextlib import nullcontext
from unittest import mock

import torch
import torch.nn.functional as F

from base.errors import Parser, run
from base.files import ROOT, write_json
from edm_networks import Conv2d, EDMPrecond
from presets.datasets import CIFAR10

BATCH, ROUNDS, THREADS = 8, 7, 2


def grouped_forward(conv, x):
    """The same layer as a depthwise filter with one group a channel."""
    if conv.up or conv.down:
        channels = x.shape[1]
        padding = (conv.resample_filter.shape[-1] - 1) // 2
        kernel = conv.resample_filter.expand(channels, 1, -1, -1)
        if conv.up:
            x = F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)
        else:
            x = F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)
    if conv.weight is None:
        return x
    return F.conv2d(x, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2)


def main():
    Parser(prog="experiments.measure_network_speed", description=__doc__).parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    network = EDMPrecond(**CIFAR10.network).eval()
    x, sigma = torch.randn(BATCH, 3, 32, 32), torch.rand(BATCH) + 0.5
    y = torch.eye(10)[torch.arange(BATCH) % 10]

    def forward():
        with torch.no_grad():
            return network(x, sigma, y)

    def both():
        network.zero_grad(set_to_none=True)
        network(x, sigma, y).square().mean().backward()

    seconds = {(way, what): [] for way in ("ours", "grouped")
               for what in ("forward", "forward and backward")}
    outputs = {}
    for turn in range(ROUNDS + 1):
        for way in ("ours", "grouped"):
            patch = mock.patch.object(Conv2d, "forward", grouped_forward)
            with patch if way == "grouped" else nullcontext():
                for what, run in (("forward", forward), ("forward and backward", both)):
                    start = time.perf_counter()
                    outputs[way, what] = run()
                    if turn:                                # the first is a warm-up
                        seconds[way, what].append(time.perf_counter() - start)
    difference = (outputs["ours", "forward"] - outputs["grouped", "forward"]).abs().max().item()
    median = {f"{way}, {what}": round(statistics.median(v), 4)
              for (way, what), v in seconds.items()}
    report = {
        "command": "python -m experiments.measure_network_speed", "torch": torch.__version__,
        "threads": THREADS, "batch": BATCH, "rounds": ROUNDS, "median_seconds": median,
        "largest_difference_of_outputs": difference,
        "ratio_ours_to_grouped": {
            what: round(statistics.median(a / b for a, b in zip(seconds["ours", what],
                                                                seconds["grouped", what])), 4)
            for what in ("forward", "forward and backward")}}
    write_json(ROOT / "results" / "network-speed.json", report)


if __name__ == "__main__":
    run(main)
