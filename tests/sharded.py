"""What test_sharded.py compares: runs of two processes with --shard, and the same without it.

    torchrun --nproc_per_node=2 tests/sharded.py FOLDER      of a pipeline, prompts and pictures
"""

import contextlib
import dataclasses
import gc
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import tiny_pipelines  # noqa: E402
import train  # noqa: E402
from torch.distributed import fsdp  # noqa: E402, F401      before measured() freezes
from base import distributed  # noqa: E402
from models import Conditions  # noqa: E402
from presets.rows import find  # noqa: E402
from text_to_image import SD_SCHEDULE, TextDenoiser  # noqa: E402
from training import log, plan  # noqa: E402
from training.draws import Sources, draw  # noqa: E402
from training.roles import assemble, place  # noqa: E402

# Clipped, at every update: a gradient that is small beside AdamW's epsilon of 1e-8 moves its weight
# by a share of the rate, so its rounding has to be smaller still.
COMMON = ("--dataset sdxl --teacher pipeline --prompts prompts.txt --batch 4 --iterations 20 "
          "--ttur 2 --learning-rate 1e-4 --ema-halflife 8 --clip 0.01 --device cpu")
TERMS = {"unforget": "--stage 2 --method pmdd --loss dm --start-from start/stage1/best.pt",
         "gan": "--stage 2 --method dmd2 --data pictures --save-every 12"}
PARTS = "--batch-per-gpu 1"
HOW = {"plain": "", "shard": "--shard", "plain-parts": PARTS,
       "shard-parts": f"--shard --recompute --ema-on-host {PARTS}"}


class Score:
    """In place of an FID: what the average makes, on one rank more often than on the other."""
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


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed(at_update):
    """Every process ends in the middle of an iteration, and nothing stays but its files."""
    update, done = train.update, []

    def until(*args):
        update(*args)
        done.append(None)
        if len(done) == at_update:
            raise Killed

    train.update = until
    with contextlib.suppress(Killed):
        yield
    train.update = update


def run(name, *flags):
    assert train.main(" ".join([COMMON, *flags, f"--folder {name}"]).split()) == 0


# ---- Memory ----

def wide_network():
    """A network whose weights are far more than what it computes with them."""
    torch.manual_seed(0)
    unet = tiny_pipelines.unet(True, sample_size=4, block_out_channels=(64, 128))
    config = {k: v for k, v in unet.config.items() if not k.startswith("_")}
    network = TextDenoiser(config, "epsilon", SD_SCHEDULE)
    width = 77 * network.text_width + sum(network.y_rest)
    network.conditions = Conditions(2, lambda index: torch.ones(len(index), width),
                                    torch.zeros(1, width), on_host=True)
    return network


def tensors():
    """Bytes of all tensors that Python knows and has made since gc.freeze()."""
    storages = [one.untyped_storage() for one in gc.get_objects() if type(one) in (
        torch.Tensor, torch.nn.Parameter)]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def whole_now(modules):
    """Bytes of the weights and gradients of sharded modules that are whole at this moment."""
    total = 0
    for module in modules:
        for group in module._get_fsdp_state()._fsdp_param_groups:
            for one in group.fsdp_params:
                weight = getattr(one, "_unsharded_param", None)
                if weight is not None:
                    total += weight.untyped_storage().nbytes()
                    total += 0 if weight.grad is None else weight.grad.nbytes
    return total


def measured():
    """Of three iterations: most bytes between blocks and at updates, and what the plan foresees."""
    wide_network()          # loads the libraries; their million objects need not be looked through
    gc.freeze()             # at every update
    device = torch.device("cpu")
    config = dataclasses.replace(find("sdxl", "pmdd", 1, network={"unet": {}}).config, batch=2,
                                 guidance=1.0, ttur=2)
    network = wide_network()
    sources = Sources(network.shape, network.levels, network.conditions)
    roles, plain = assemble(config, network), network.config
    blocks = [plan.weight_bytes(block) for block in network.blocks]
    sizes = {"block": max(blocks), "rest": plan.weight_bytes(network) - sum(blocks)}
    del network
    for frozen in (roles.teacher, roles.ema):
        frozen.requires_grad_(False)
    options = SimpleNamespace(shard=True, recompute=False, ema_on_host=False, compile=False,
                              world_size=2, batch_per_gpu=1)
    place(roles, options, device)
    roles.wrap()
    optimizers, whole, held, update = train.make_optimizers(config, roles, device), [], [], (
        train.update)
    networks = [roles.student, roles.adapted, roles.teacher, roles.ema]
    modules = [m for network in networks for m in network.modules() if distributed.sharded(m)]

    def see(*args):
        whole.append(whole_now(modules))

    def seen(module, inputs, output):
        see()
        if torch.is_tensor(output) and output.requires_grad:
            output.register_hook(see)

    def updating(*args):
        held.append(tensors())
        update(*args)
        held.append(tensors())

    for network in networks[:3]:
        for block in network.blocks:
            block.register_forward_pre_hook(see)
            block.register_forward_hook(seen)
    train.update = updating
    for step in range(3):
        parts = draw(config, step, sources, options)
        train.iteration(config, roles, optimizers, parts, step % config.ttur == 0)
    train.update = update
    found = sizes | {"whole": max(whole), "held": max(held)}
    if distributed.rank() == 0:                         # one plan for all
        found["planned"] = plan.memory(train.iteration, config, plain, 1, 2, shard=True)
    return found


def main(folder):
    os.chdir(folder)
    torch.set_num_threads(1)
    distributed.finish = lambda: None                   # one group for all runs
    log.draw_curves = lambda *args: None
    train.Scorer = Score
    distributed.start("cpu")
    (Path(f"memory-{distributed.rank()}.json")).write_text(json.dumps(measured()))
    run("start", "--stage 1 --method pmdd --loss dm --iterations 2")
    for terms, flags in TERMS.items():
        for how, more in HOW.items():
            run(f"{terms}-{how}", flags, more)
    with killed(20):                                    # of 30, soon after it was saved
        run("killed", TERMS["gan"], HOW["shard"])
    if distributed.rank() == 0:
        shutil.copytree("killed", "elsewhere")          # to be resumed by other numbers of them
    distributed.barrier()
    run("killed", TERMS["gan"], HOW["shard"])


if __name__ == "__main__":
    main(sys.argv[1])
