"""--shard, --recompute and --ema-on-host: the same run in less memory, on two gloo processes."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import tiny_pipelines
import train
from base.devices import recompute
from faults import differences, outcome, plain
from helpers import ROOT, call, small_network
from models import sample_seeds, sample_student
from presets.rows import find
from sharded import COMMON, TERMS, Score, wide_network
from training import plan
from weights import checkpoint, exported
from weights.opening import open_network

PROMPTS = ["a cat", "two dogs", "a red car"]
NETWORKS = ("student", "ema", "adapted", "head")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Every run of sharded.py, made by one torchrun."""
    folder = tmp_path_factory.mktemp("sharded")
    tiny_pipelines.save(folder / "pipeline", xl=True, sample_size=8, block_out_channels=(16, 32),
                        transformer_layers_per_block=1, up_block_types=("UpBlock2D",) * 2,
                        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "pictures").mkdir()
    for k, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)):
        Image.fromarray(pixels).save(folder / "pictures" / f"{k}.png")
        (folder / "pictures" / f"{k}.txt").write_text(f"picture {k}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "tests" / "sharded.py", folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def latest(run):
    return checkpoint.load(run / "stage2" / "latest.pt", needs=checkpoint.RESUMED)


def distance(a, b):
    """The largest difference of two checkpoints' weights."""
    assert a.keys() == b.keys()
    return max((a[k][name] - b[k][name]).abs().max().item()
               for k in NETWORKS if k in a for name in a[k])


@pytest.mark.parametrize("parts", ["", "-parts"], ids=["whole", "recomputed in parts"])
@pytest.mark.parametrize("terms", TERMS)
def test_twenty_sharded_iterations_are_the_unsharded_ones(here, terms, parts):
    whole, shard = (latest(here / f"{terms}-{how}{parts}") for how in ("plain", "shard"))
    start = checkpoint.load(here / "start" / "stage1" / "best.pt")
    moved = max((whole["student"][k] - v).abs().max() for k, v in start["ema"].items())
    assert distance(whole, shard) < 2e-6 < 5e-4 < moved
    for one, other in zip(whole["optimizers"], shard["optimizers"], strict=True):
        assert one["param_groups"] == other["param_groups"]
        for k, moments in one["state"].items():
            for name, value in moments.items():
                assert (value - other["state"][k][name]).abs().max() <= 1e-3 * value.abs().max()
    assert whole["fid"]["2"]["FID"] == pytest.approx(shard["fid"]["2"]["FID"], rel=1e-5)
    grids = [sorted((here / f"{terms}-{how}{parts}" / "stage2" / "samples").iterdir())
             for how in ("plain", "shard")]
    one, other = (np.asarray(Image.open(grid[-1])).astype(int) for grid in grids)
    assert len(grids[0]) == len(grids[1]) and np.abs(one - other).max() <= 1


def test_a_sharded_run_that_is_killed_goes_on_bit_for_bit(here):
    assert not differences(outcome(here / "gan-shard"), outcome(here / "killed"))


def test_it_goes_on_with_another_number_of_processes(here, monkeypatch):
    monkeypatch.chdir(here)
    monkeypatch.setattr(train, "Scorer", Score)
    assert checkpoint.load(here / "elsewhere" / "stage2" / "latest.pt")["iteration"] == 12
    argv = [*COMMON.split(), *TERMS["gan"].split(), "--folder", "elsewhere"]
    assert call(monkeypatch, train, *argv) == 0
    assert distance(latest(here / "gan-shard"), latest(here / "elsewhere")) < 2e-6


def test_no_rank_holds_more_than_its_share_and_a_block(here):
    ranks = [json.loads((here / f"memory-{rank}.json").read_text()) for rank in (0, 1)]
    planned = ranks[0]["planned"]
    noise, extra = planned.pop(plan.ACTIVATIONS), planned.pop("blocks that are whole")
    for found in ranks:
        block = found["block"] + found["rest"]
        # Weights, average, teacher, moments and one gradient, half of each.
        assert found["held"] < sum(planned.values()) + block + noise / 20
        assert found["held"] > 0.9 * sum(planned.values())
        # A block with its gradient, and what is in no block, of student and adapted network.
        assert found["block"] < found["whole"] < 2 * block and found["whole"] < extra


def test_diffusers_makes_the_pictures_of_a_sharded_run(here, monkeypatch, tmp_path):
    best, out = here / "gan-shard" / "stage2" / "best.pt", tmp_path / "out"
    assert call(monkeypatch, exported, "export", best, out) == 0
    theirs = diffusers.DiffusionPipeline.from_pretrained(
        here / "pipeline", unet=diffusers.UNet2DConditionModel.from_pretrained(out),
        scheduler=diffusers.LCMScheduler.from_pretrained(out, subfolder="scheduler"))
    theirs.set_progress_bar_config(disable=True)
    opened, seeds = open_network(best), [5, 9]
    opened.serve(PROMPTS[:2], "cpu")
    for n, timesteps in ((1, [999]), (2, [999, 749])):
        sampler = partial(sample_student, sigmas=opened.sigmas[:n])
        latents, _ = sample_seeds(opened.network, seeds, sampler, [0, 1])
        expected = theirs(PROMPTS[:2], guidance_scale=0, timesteps=timesteps, output_type="latent",
                          generator=[torch.Generator().manual_seed(s) for s in seeds]).images
        assert (latents - expected).abs().max() < 1e-5 * expected.abs().max()


# ---- Recomputation ----

def saved_bytes(network, x_t, y):
    """Bytes that one pass keeps for its way back, weights aside; then every gradient."""
    weights, kept = {p.untyped_storage().data_ptr() for p in network.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x0 = network(x_t, torch.ones(len(x_t), 1, 1, 1), y)
    x0.square().mean().backward()
    return sum(kept.values()), [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("text", [True, False], ids=["SDXL", "EDM"])
def test_recomputed_activations_are_a_third_at_most_and_every_gradient_has_its_bits(text):
    network = wide_network() if text else small_network(num_blocks=2)
    torch.manual_seed(0)
    x_t = torch.randn(4, *network.shape)
    y = torch.rand(4, network.conditions.null.shape[-1] if text else 10)
    again = copy.deepcopy(network)
    recompute(again.blocks)
    (kept, expected), (less, found) = (saved_bytes(one, x_t, y) for one in (network, again))
    assert len(expected) > 50 and all(map(torch.equal, expected, found))
    assert kept > 3 * less


def test_the_plan_of_recomputed_activations_is_a_third_at_most():
    config = dataclasses.replace(find("sd15", "pmdd", 2).config, batch=16)
    unet = {k: v for k, v in tiny_pipelines.unet(True).config.items() if not k.startswith("_")}
    network = wide_network().config | {"unet": unet}
    for precision in ("fp32", "bf16"):
        kept, less = (plan.memory(train.iteration, config, network, 16, precision=precision,
                                  recompute=again)[plan.ACTIVATIONS] for again in (False, True))
        assert kept > 3 * less


@pytest.mark.parametrize("argv", ["--stage 1 --ttur 2", "--stage 0",
                                  "--method dmd2 --ttur 2 --batch-per-gpu 8"])
def test_recomputation_and_an_average_on_the_host_change_no_bit_of_a_run(
        monkeypatch, tmp_path, argv):
    few = "--batch 16 --iterations 4 --save-every 2 --evaluate-every 0".split()
    for name, more in (("plain", ()), ("less", ("--recompute", "--ema-on-host"))):
        assert call(monkeypatch, train, *argv.split(), *few, "--folder", tmp_path / name,
                    *more) == 0
    one, other = (plain(checkpoint.load(next((tmp_path / name).glob("stage*/latest.pt"))))
                  for name in ("plain", "less"))
    assert not differences(one, other)


# ---- What is refused. ----

@pytest.mark.parametrize("argv, message", [
    ("--shard", "--shard needs two processes or more: torchrun"),
    ("--recompute --teacher {pipeline} --dataset sdxl --prompts {prompts}",
     "--recompute: this teacher's network cannot be divided; allowed: one with residual blocks")])
def test_what_cannot_be_shared_is_one_line(tmp_path, monkeypatch, capsys, argv, message):
    if "{pipeline}" in argv:                            # of blocks that are not Stable Diffusion's
        odd = dict(down_block_types=("KDownBlock2D",), up_block_types=("KUpBlock2D",),
                   mid_block_type=None, block_out_channels=(32,), layers_per_block=1,
                   transformer_layers_per_block=1)
        tiny_pipelines.save(tmp_path / "pipeline", xl=True, **odd)
        (tmp_path / "prompts").write_text("a cat")
    argv = argv.format(pipeline=tmp_path / "pipeline", prompts=tmp_path / "prompts").split()
    assert call(monkeypatch, train, "--stage", "1", "--folder", tmp_path / "run", *argv) == 2
    line, = capsys.readouterr().err.splitlines()[-1:]
    assert message in line and not (tmp_path / "run" / "stage1" / "latest.pt").exists()
