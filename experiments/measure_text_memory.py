"""What distilling Stable Diffusion v1.5 needs of memory, by the plan; nothing of it is measured.

    python -m experiments.measure_text_memory      writes results/text-memory.json
"""

import torch

from base.errors import Parser, run
from base.files import ROOT, write_json
from base.progress import progress
from presets.datasets import DATASETS
from presets.rows import find
from train import iteration
from training.plan import ACTIVATIONS, memory

# (text, method, stage, processes, precision, images of a pass)
ROWS = (("stage 1, one GPU", "pmdd", 1, 1, "bf16", (1, 10, 20, 40)),
        ("stage 1, three GPUs", "pmdd", 1, 3, "bf16", (10, 20, 40)),
        ("stage 2, one GPU", "pmdd", 2, 1, "bf16", (1, 5, 10, 20)),
        ("stage 3, one GPU", "pmdd", 3, 1, "bf16", (1, 5, 10, 20)),
        ("stage 2, one GPU, fp32 or tf32", "pmdd", 2, 1, "fp32", (1, 5, 10)),
        ("`--method dmd2`, each of 64 GPUs", "dmd2", 1, 64, "bf16", (1, 16, 32)))


def main():
    Parser(prog="experiments.measure_text_memory", description=__doc__).parse_args()
    network, planned = DATASETS["sd15"].network, []
    for text, method, stage, processes, precision, sizes in progress(ROWS, desc="plans"):
        config = find("sd15", method, stage).config
        plans = {size: memory(iteration, config, network, size, processes, precision, on_gpu=True)
                 for size in sizes}
        first = plans[sizes[0]]
        planned.append({"what": text, "gib": {
            "weights": (sum(first.values()) - first[ACTIVATIONS]) / 2 ** 30,
            **{str(size): sum(plan.values()) / 2 ** 30 for size, plan in plans.items()}}})
    write_json(ROOT / "results" / "text-memory.json", {
        "command": "python -m experiments.measure_text_memory", "torch": torch.__version__,
        "planned": planned})


if __name__ == "__main__":
    run(main)
