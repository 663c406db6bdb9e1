"""What LoRA needs of memory on one GPU, by the plan; nothing of it is measured.

    python -m experiments.measure_lora_memory      writes results/lora-memory.json
"""

from dataclasses import replace

import torch

from base.errors import Parser, run
from base.files import ROOT, write_json
from base.progress import progress
from presets.rows import find
from text_to_image import SD15_NETWORK, SDXL_NETWORK
from train import iteration
from training.plan import ACTIVATIONS, memory

RANK = 64                       # DMD2's
# (text, configuration, network, images of a pass)
ROWS = (("SD v1.5, stage 1", find("sd15", "pmdd", 1).config, SD15_NETWORK, (1, 2, 4)),
        ("SD v1.5, stage 2", find("sd15", "pmdd", 2).config, SD15_NETWORK, (1, 2, 4)),
        ("SDXL, DMD2's four steps with GAN", find("sdxl", "dmd2", 4).config, SDXL_NETWORK, (1, 2)))


def gib(plans):
    """What is there before any image; and everything, by the images of a pass."""
    first = next(iter(plans.values()))
    alive = first[ACTIVATIONS]
    return {"weights": (sum(first.values()) - alive) / 2 ** 30,
            "frozen": first["teacher and previous student"] / 2 ** 30,
            **{str(size): sum(plan.values()) / 2 ** 30 for size, plan in plans.items()}}


def main():
    Parser(prog="experiments.measure_lora_memory", description=__doc__).parse_args()
    planned = [{"what": text, "gib": gib({size: memory(
        iteration, replace(config, lora=RANK), network, size, precision="bf16", on_gpu=True)
        for size in sizes})} for text, config, network, sizes in progress(ROWS, desc="plans")]
    write_json(ROOT / "results" / "lora-memory.json", {
        "command": "python -m experiments.measure_lora_memory", "torch": torch.__version__,
        "rank": RANK, "planned": planned})


if __name__ == "__main__":
    run(main)
