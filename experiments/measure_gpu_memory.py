"""Memory of each of several GPUs that distil Stable Diffusion or SDXL, by the plan alone.

    python -m experiments.measure_gpu_memory       writes results/gpu-memory.json
"""

import torch

from base.errors import Parser, run
from base.files import ROOT, write_json
from base.progress import progress
from presets.datasets import DATASETS
from presets.rows import find
from train import iteration
from training.plan import How, by_gpus

# (dataset, method, stage, images of the one pass that each GPU makes in an iteration)
ROWS, GPUS = (("sd15", "pmdd", 1, 10), ("sdxl", "dmd2", 4, 2)), (1, 2, 3, 4, 8, 64)
WAYS = {"a copy on each": {}, "`--recompute`": {"recompute": True}, "`--shard`": {"shard": True},
        "`--shard --recompute`": {"shard": True, "recompute": True},
        "`--shard --recompute --ema-on-host`": {"shard": True, "recompute": True,
                                                "ema_on_host": True}}


def main():
    Parser(prog="experiments.measure_gpu_memory", description=__doc__).parse_args()
    planned = []
    for dataset, method, stage, images in ROWS:
        config, network = find(dataset, method, stage).config, DATASETS[dataset].network
        hows = [How(images, precision="bf16", on_gpu=True, **way) for way in WAYS.values()]
        gib = {how: {} for how in hows}
        for how, gpus, size in progress(by_gpus(iteration, config, network, hows, GPUS),
                                        desc=dataset, total=len(hows) * len(GPUS)):
            gib[how][str(gpus)] = size / 2 ** 30
        planned.append({"dataset": dataset, "method": method, "stage": stage, "images": images,
                        "gib": dict(zip(WAYS, gib.values()))})
    write_json(ROOT / "results" / "gpu-memory.json", {
        "command": "python -m experiments.measure_gpu_memory", "torch": torch.__version__,
        "planned": planned})


if __name__ == "__main__":
    run(main)
