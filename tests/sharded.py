"""Runs of two processes with --shard, and without it to be compared with: test_sharded.py's worker.

    torchrun --nproc_per_node=2 tests/sharded.py FOLDER      of a pipeline, prompts and pictures
"""

import contextlib
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from base import distributed  # noqa: E402
import train  # noqa: E402
from training import log  # noqa: E402

COMMON = ("--dataset sdxl --teacher pipeline --prompts prompts.txt --batch 4 --iterations 20 "
          "--save-every 12 --ttur 2 --learning-rate 1e-4 --ema-halflife 8 --device cpu")
TERMS = {"unforget": "--stage 2 --method pmdd --loss dm --start-from start/stage1/best.pt",
         "gan": "--stage 2 --method dmd2 --data pictures"}
HOW = {"plain": "", "shard": "--shard", "plain-parts": "--batch-per-gpu 1",
       "shard-parts": "--shard --recompute --batch-per-gpu 1 --ema-on-host"}


class Score:
    """In place of an FID: what the average makes, a rank more often than the other."""
    judge = True

    def __init__(self, *args):
        pass

    def score(self, network, sigmas):
        for _ in range(1 + 2 * distributed.rank()):
            y = network.conditions.embed(torch.tensor([0, 1]))
            z = torch.ones(2, *network.shape)
            with torch.no_grad():
                mean = network(z, torch.ones(2, 1, 1, 1), y).abs().mean().item()
        return {str(len(sigmas)): {"FID": mean}}


class Stopped(Exception):
    pass


@contextlib.contextmanager
def dying(at_update):
    """Every process ends in the middle of an iteration, and nothing stays but its files."""
    update, done = train.update, []

    def until(*args):
        update(*args)
        done.append(None)
        if len(done) == at_update:
            raise Stopped

    train.update = until
    with contextlib.suppress(Stopped):
        yield
    train.update = update


def run(name, *flags):
    argv = " ".join([COMMON, *flags, f"--folder {name}"]).split()
    return train.main(argv)


def main(folder):
    os.chdir(folder)
    torch.set_num_threads(1)
    distributed.finish = lambda: None                   # one group for all runs
    log.draw_curves = lambda *args: None
    train.Scorer = Score
    run("start", "--stage 1 --method pmdd --loss dm --iterations 2")
    for terms, flags in TERMS.items():
        for how, more in HOW.items():
            assert run(f"{terms}-{how}", flags, more) == 0
    with dying(25):
        run("killed", TERMS["gan"], HOW["shard"])
    run("killed", TERMS["gan"], HOW["shard"])


if __name__ == "__main__":
    main(sys.argv[1])
