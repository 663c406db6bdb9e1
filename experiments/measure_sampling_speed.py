"""Minutes and memory of scoring 50,000 digits at 1, 2 and 3 steps, and what layouts and types do.

    python -m experiments.measure_sampling_speed      writes results/sampling-speed.json

The first part runs evaluate.py as a user would, with 5,000 and with 50,000 images; the second times
passes of the embedded student in this process, in turn, on one thread.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from base.errors import Parser, run
from base.files import ROOT, write_json
from weights import checkpoint

BATCH, ROUNDS = 64, 15


def evaluate(images, folder):
    """Seconds and peak MB of one evaluation as a whole process."""
    command = [sys.executable, "evaluate.py", "--checkpoint", "assets/digits-student.pt", "--steps",
               "1", "2", "3", "--n", str(images), "--out", f"{folder}/{images}.json"]
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return {"images": images, "seconds": round(time.monotonic() - start, 1),
            "peak_mb": round(usage.ru_maxrss / 1024)}


def passes():
    """Median milliseconds of one pass of 64 images, each way in turn, and the ratio to fp32."""
    payload = checkpoint.load(ROOT / "assets" / "digits-student.pt")
    x, sigma = torch.randn(BATCH, 1, 8, 8), torch.full((BATCH, 1, 1, 1), 2.5)
    y = torch.eye(10)[torch.arange(BATCH) % 10]
    plain = checkpoint.network_from(payload)
    last = checkpoint.network_from(payload).to(memory_format=torch.channels_last)

    def bf16():
        with torch.autocast("cpu", torch.bfloat16):
            plain(x, sigma, y)

    ways = {"fp32": lambda: plain(x, sigma, y), "bf16": bf16,
            "channels_last": lambda: last(x.to(memory_format=torch.channels_last), sigma, y)}
    seconds = {name: [] for name in ways}
    with torch.no_grad():
        for turn in range(ROUNDS + 3):                      # the first three are a warm-up
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                if turn >= 3:
                    seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {name: {"milliseconds": round(1e3 * value, 2),
                   "ratio_to_fp32": round(value / median["fp32"], 3)}
            for name, value in median.items()}


def main():
    Parser(prog="experiments.measure_sampling_speed", description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scored = [evaluate(images, folder) for images in (5_000, 50_000)]
    torch.set_num_threads(1)
    report = {"command": "python -m experiments.measure_sampling_speed", "torch": torch.__version__,
              "cores": os.cpu_count(), "evaluate.py at 1, 2 and 3 steps": scored,
              f"one pass of {BATCH} images, one thread": passes()}
    write_json(ROOT / "results" / "sampling-speed.json", report)


if __name__ == "__main__":
    run(main)
