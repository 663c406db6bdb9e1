"""Presets are the papers' tables, flags are their fields, and a run's folder is its own record."""

import ast
import dataclasses
import errno
import inspect
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from presets import datasets, rows
from base import distributed
from base.errors import RunFailed, UserError, run
from base.files import hidden_beside
from presets.config import Config
from presets.datasets import DATASETS
from presets.rows import PRESETS
from training import log, options, run_folder

ROOT = Path(__file__).resolve().parents[1]
FIELDS = {f.name: f for f in dataclasses.fields(Config)}


# ---- The papers' tables, written down a second time ----

ADAMW = dict(betas=(0.9, 0.999), weight_decay=0.01)     # PMDD A.1, A.2, DMD B.1, B.2, DMD2 F.2
CIFAR10, IMAGENET = "edm-cifar10-32x32-cond-vp", "edm-imagenet-64x64-cond-adm"
CIFAR10_WITHOUT_CLASSES = "edm-cifar10-32x32-uncond-vp"
FFHQ, AFHQV2 = "edm-ffhq-64x64-uncond-vp", "edm-afhqv2-64x64-uncond-vp"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def pmdd(learning_rate, iterations, batch, unforget, teacher):
    return dict(loss="sid", alpha=1.2, ttur=5, learning_rate=learning_rate, iterations=iterations,
                batch=batch, unforget_weight=unforget, teacher=teacher, trained_step="last",
                external_sampling=True, gan_weight=0, regression_weight=0, clip=10, **ADAMW)


# Of the averages, in images.
HALFLIVES = {("cifar10", "pmdd", 1, ""): 500_000, ("sd15", "pmdd", 1, ""): 100_000,
             ("sd15", "pmdd", 2, ""): 10_000, ("sd15", "pmdd", 3, ""): 10_000,
             ("sdxl", "dmd2", 4, ""): 50_000, ("sdxl", "dmd2", 1, ""): 50_000}


def dmd(learning_rate, iterations, batch, weight, pairs, steps, teacher):
    return dict(loss="dm", dm_weighting="eq8", ttur=1, learning_rate=learning_rate, clip=10,
                iterations=iterations, batch=batch, regression_weight=weight, gan_weight=0,
                regression_pairs=pairs, regression_steps=steps, teacher=teacher,
                unforget_weight=0, **ADAMW)


def dmd2(learning_rate, iterations, gan):
    return dict(loss="dm", ttur=5, learning_rate=learning_rate, iterations=iterations, batch=280,
                gan_weight=gan, gan_adapted_weight=1e-2, clip=10, regression_weight=0,
                unforget_weight=0, teacher=IMAGENET, **ADAMW)


def sid(learning_rate, batch, teacher, ema):
    return dict(loss="sid", alpha=1.2, ttur=1, learning_rate=learning_rate, batch=batch, clip=0,
                betas=(0, 0.999), weight_decay=0, gan_weight=0, regression_weight=0,
                unforget_weight=0, teacher=teacher, ema_halflife=ema)


def edm(learning_rate, batch, ema, augment):
    return dict(learning_rate=learning_rate, batch=batch, ema_halflife=ema, ema_rampup=0.05,
                augment=augment, betas=(0.9, 0.999), weight_decay=0, clip=0, teacher="")


def pmdd_text(learning_rate, iterations, batch, ttur, unforget):
    return pmdd(learning_rate, iterations, batch, unforget, SD15) | dict(
        loss="dm", ttur=ttur, guidance=1.75)


def dmd2_text(learning_rate, iterations, gan):
    return dmd2(learning_rate, iterations, gan) | dict(ttur=10, batch=2048, guidance=1.75,
                                                       teacher=SD15)


def dmd2_xl(iterations):
    return dmd2(5e-7, iterations, 5e-3) | dict(ttur=5, batch=128, guidance=8, teacher=SDXL)


TABLE = {   # (dataset, method, stage, variant): (fields, noise levels, reported FID, hardware)
    ("cifar10", "pmdd", 1, ""): (pmdd(1e-5, 200_000, 256, 0, CIFAR10), 1, 2.52, "4 A100"),
    ("cifar10", "pmdd", 2, ""): (pmdd(5e-6, 35_000, 256, 1.0, CIFAR10), 2, 2.19, "4 A100"),
    ("cifar10", "pmdd", 3, ""): (pmdd(8e-7, 65_000, 256, 1.0, CIFAR10), 3, 2.48, "4 A100"),
    ("imagenet64", "pmdd", 1, ""): (pmdd(2e-6, 400_000, 72, 0, IMAGENET), 1, 2.60, "4 A100"),
    ("imagenet64", "pmdd", 2, ""): (pmdd(8e-7, 40_000, 72, 0.3, IMAGENET), 2, 1.95, "4 A100"),
    ("imagenet64", "pmdd", 3, ""): (pmdd(8e-7, 40_000, 72, 0.3, IMAGENET), 3, 2.14, "4 A100"),
    ("cifar10", "dmd", 1, ""): (
        dmd(5e-5, 300_000, 392, 0.25, 100_000, 18, CIFAR10), 1, 2.66, "7 GPUs"),
    ("cifar10", "dmd", 1, "unconditional"): (
        dmd(5e-5, 300_000, 392, 0.5, 500_000, 18, CIFAR10_WITHOUT_CLASSES), 1, 3.77, "7 GPUs"),
    ("imagenet64", "dmd", 1, ""): (
        dmd(2e-6, 350_000, 336, 0.25, 25_000, 256, IMAGENET), 1, 2.62, "7 GPUs"),
    ("imagenet64", "dmd2", 1, ""): (dmd2(2e-6, 200_000, 3e-3), 1, 1.51, "7 A100"),
    ("imagenet64", "dmd2", 1, "no-gan"): (dmd2(2e-6, 400_000, 0), 1, 2.61, "7 A100"),
    ("imagenet64", "dmd2", 1, "longer"): (dmd2(5e-7, 150_000, 3e-3), 1, 1.28, "7 A100"),
    ("cifar10", "sid", 1, ""): (sid(1e-5, 256, CIFAR10, 500_000), 2.5, 1.710, "4 GPUs"),
    ("cifar10", "sid", 1, "unconditional"): (
        sid(1e-5, 256, CIFAR10_WITHOUT_CLASSES, 500_000), 2.5, 1.923, "4 GPUs"),
    ("imagenet64", "sid", 1, ""): (sid(4e-6, 8192, IMAGENET, 2_000_000), 2.5, 1.524, "4 GPUs"),
    ("ffhq64", "sid", 1, ""): (
        sid(1e-5, 512, FFHQ, 500_000) | {"betas": (0.9, 0.999), "adapted_betas": (0, 0.999)},
        2.5, 1.550, "4 GPUs"),
    ("afhqv2-64", "sid", 1, ""): (
        sid(5e-6, 512, AFHQV2, 500_000) | {"alpha": 1.0}, 2.5, 1.628, "4 GPUs"),
    ("sd15", "pmdd", 1, ""): (pmdd_text(5e-6, 120_000, 120, 10, 0), 1, 10.41, "3 H100"),
    ("sd15", "pmdd", 2, ""): (pmdd_text(8e-7, 16_000, 20, 5, 0.3), 2, 8.63, "1 H100"),
    ("sd15", "pmdd", 3, ""): (pmdd_text(8e-7, 16_000, 20, 5, 0.01), 3, 8.50, "1 H100"),
    ("sd15", "dmd", 1, ""): (       # 50 steps of its sampler are about 25 of Heun's
        dmd(1e-5, 20_000, 2304, 0.25, 500_000, 25, SD15) | {"guidance": 3}, 1, 11.49, "72 A100"),
    ("sd15", "dmd", 1, "guidance-8"): (         # 32 images on each of 80 GPUs
        dmd(1e-5, 165_000, 2560, 0.25, 12_000_000, 25, SD15) | {"guidance": 8}, 1, 14.93,
        "about 80 A100"),
    ("sd15", "dmd2", 1, ""): (dmd2_text(1e-5, 40_000, 0), 1, 9.28, "64 A100"),
    ("sd15", "dmd2", 1, "gan"): (dmd2_text(5e-7, 5_000, 1e-3), 1, 8.35, "64 A100"),
    ("sdxl", "dmd2", 4, ""): (dmd2_xl(20_000), 4, 19.32, "64 A100"),
    ("sdxl", "dmd2", 1, ""): (dmd2_xl(25_000), (399,), 19.01, "64 A100"),
    ("sdxl", "dmd2", 1, "pretraining"): (       # 10,000 pairs of its 50-step sampler, no dm
        dict(loss="none", gan_weight=0, regression_weight=1, regression_pairs=10_000,
             regression_steps=25, learning_rate=1e-5, batch=256, iterations=2_000, guidance=8,
             teacher=SDXL, trained_step="last"), (399,), None, "64 A100"),
    ("cifar10", "pmdd", 0, ""): (edm(1e-3, 512, 500_000, 0.12), 0, None, "8 V100"),
    ("ffhq64", "pmdd", 0, ""): (edm(2e-4, 256, 500_000, 0.15), 0, None, "8 V100"),
    ("afhqv2-64", "pmdd", 0, ""): (edm(2e-4, 256, 500_000, 0.15), 0, None, "8 V100"),
    ("imagenet64", "pmdd", 0, ""): (edm(1e-4, 4096, 50_000_000, 0), 0, None, "32 A100"),
}
CLIP = {("sd15", "pmdd", 1, ""): 0.302, ("sd15", "pmdd", 2, ""): 0.30,
        ("sd15", "pmdd", 3, ""): 0.302, ("sd15", "dmd", 1, "guidance-8"): 0.320,
        ("sd15", "dmd2", 1, "gan"): 0.30, ("sdxl", "dmd2", 4, ""): 0.332,
        ("sdxl", "dmd2", 1, ""): 0.336}
IMAGES = {  # what the papers say in images, not in iterations: in millions
    ("cifar10", "sid", 1, ""): 800, ("cifar10", "sid", 1, "unconditional"): 500,
    ("imagenet64", "sid", 1, ""): 1000, ("ffhq64", "sid", 1, ""): 500,
    ("afhqv2-64", "sid", 1, ""): 500, ("cifar10", "pmdd", 0, ""): 200,
    ("ffhq64", "pmdd", 0, ""): 200, ("afhqv2-64", "pmdd", 0, ""): 200,
    ("imagenet64", "pmdd", 0, ""): 2500}


def karras(fraction):                                   # EDM Eq. 5 with rho 7
    return (0.002 ** (1 / 7) + fraction * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7


def stable_diffusion(timestep):
    """sigma at a timestep of its schedule, whose betas are linear in their square roots."""
    betas = [(0.00085 ** 0.5 + k / 999 * (0.012 ** 0.5 - 0.00085 ** 0.5)) ** 2 for k in range(1000)]
    kept = math.prod(1 - beta for beta in betas[:timestep + 1])
    return math.sqrt((1 - kept) / kept)


def noise_levels(steps, dataset):
    """PMDD's schedule [1, 0.5, 0.25]; SiD's is given as a noise level."""
    if dataset == "sdxl":
        timesteps = (999, 749, 499, 249) if steps == 4 else steps
        return [stable_diffusion(timestep) for timestep in timesteps]
    if dataset == "sd15":
        return [stable_diffusion(timestep) for timestep in (999, 499, 249)[:steps]]
    return [steps] if steps == 2.5 else [karras(f) for f in (1, 0.5, 0.25)[:steps]]


@pytest.mark.parametrize("key", TABLE, ids=lambda key: " ".join(map(str, key)))
def test_a_preset_equals_the_papers_row(key):
    fields, steps, fid, gpus = TABLE[key]
    # No paper lowers its learning rate, and every average ramps up as EDM's and SiD's.
    fields, preset = fields | {"final_rate": 1, "ema_rampup": 0.05}, PRESETS[key]
    differing = {name: (value, getattr(preset.config, name)) for name, value in fields.items()
                 if getattr(preset.config, name) != value}
    assert not differing
    assert preset.config.ema_halflife == HALFLIVES.get(key, preset.config.ema_halflife)
    assert list(preset.config.sigmas) == pytest.approx(noise_levels(steps, key[0]), rel=1e-9)
    assert preset.paper_fid == fid and preset.gpus == gpus and preset.paper_clip == CLIP.get(key)
    if key in IMAGES:                                   # less than one batch off
        assert 0 <= IMAGES[key] * 10 ** 6 - preset.images < preset.config.batch


def test_every_row_is_of_a_paper_or_says_that_it_is_ours():
    ours = {key for key, preset in PRESETS.items() if preset.source.startswith("ours")}
    assert ours | set(TABLE) == set(PRESETS) and not ours & set(TABLE)
    assert {key for key in PRESETS if key[0] == "digits"} < ours
    for key in ours:
        assert PRESETS[key].paper_fid is None
    papers = {"pmdd": "PMDD A.", "dmd": "DMD B.", "dmd2": "DMD2 F.", "sid": "SiD"}
    for key in TABLE:
        assert PRESETS[key].source.startswith(papers[key[1]] if key[2] else "EDM Table 7")


def test_a_row_stands_where_its_key_says_and_passes_the_checks_of_a_command_line():
    for (dataset, method, stage, _), preset in PRESETS.items():
        config = preset.config
        assert (config.dataset, config.method, config.stage) == (dataset, method, stage)
        options.check(config)
        assert len(config.sigmas) == stage
        assert preset.images == config.iterations * config.batch > 0
        begins = stage > 0 or dataset == "emoji"        # its stage 0 goes on from a pipeline
        assert preset.source and preset.gpus and bool(config.teacher) == begins
        assert config.teacher in ("", DATASETS[dataset].teacher, DATASETS[dataset].unconditional)


def test_the_sum_of_the_papers_stages_is_what_it_says_in_images():
    """PMDD, Section 4.2: around 34M synthetic images in all for ImageNet."""
    total = sum(PRESETS["imagenet64", "pmdd", stage, ""].images for stage in (1, 2, 3))
    assert total == 34_560_000


def test_the_average_of_every_row_ramps_up():
    assert all(row.config.ema_rampup in (0.05, 0.1) for row in PRESETS.values())
    assert all(row.config.ema_rampup == 0.05 for (of, *_), row in PRESETS.items() if of != "emoji")


def test_the_average_of_every_row_has_forgotten_where_it_began():
    for (dataset, *_), row in PRESETS.items():
        config = row.config
        images = config.iterations // max(config.ttur, 1) * config.batch
        halflife = min(config.ema_halflife, (config.ema_rampup or 1) * images)
        assert images > 6 * halflife, (dataset, row)                    # 0.5^6 is below 2 %


def test_the_schedule_in_noise_levels():
    assert datasets.PMDD_SIGMAS == pytest.approx((80, 2.515, 0.170), abs=6e-4)
    assert datasets.EQUAL_WIDTH_SIGMAS == pytest.approx((80, 9.96, 0.452), abs=5e-3)
    assert datasets.PMDD_SIGMAS[0] == datasets.EQUAL_WIDTH_SIGMAS[0] == 80


def test_dmd2_with_several_steps_is_its_one_step_row_with_more_noise_levels():
    one = rows.find("imagenet64", "dmd2", 1)
    for stage in (2, 3):
        row = rows.find("imagenet64", "dmd2", stage)
        assert row.config == dataclasses.replace(
            one.config, stage=stage, sigmas=datasets.PMDD_SIGMAS[:stage], trained_step="random")
        assert row.paper_fid is None and "several steps" in row.source
    with pytest.raises(ValueError, match="--method dmd2 --stage 4"):
        rows.find("imagenet64", "dmd2", 4)


@pytest.mark.parametrize("changes, expected", [
    ({}, True), (dict(unforget_weight=0.0), True), (dict(external_sampling=False), True),
    (dict(unforget_weight=0.0, external_sampling=False), False),        # it would do nothing
    (dict(trained_step="random"), False), (dict(stage=1, sigmas=(80.0,)), False),
    (dict(method="dmd2"), False), (dict(method="dmd2", start_from="best.pt"), True),
    (dict(stage=1, sigmas=(80.0,), start_from="best.pt"), False)])
def test_a_previous_student_takes_part_where_there_is_one_and_a_use_for_it(changes, expected):
    base = rows.find("digits", "pmdd", 2).config
    assert dataclasses.replace(base, **changes).has_previous is expected


# ---- A flag for each field ----

def parse(*argv):
    return options.parse([str(word) for word in argv])


def flag_of(name):
    return "--" + name.replace("_", "-")


BASE = ("--dataset", "digits", "--method", "pmdd", "--stage", "2", "--regression-pairs", "7")
STAGE_0 = ("--dataset", "digits", "--stage", "0")
OTHER = {"teacher": "other.pt", "start_from": "start.pt", "sigmas": (70.0, 1.5),
         "betas": (0.1, 0.2), "adapted_betas": (0.3, 0.4), "trained_step": "random",
         "loss": "dm", "dm_weighting": "sigma3", "external_sampling": False, "channel_mult": (1, 1),
         "attn_resolutions": (4,), "dropout": 0.25, "model_channels": 8, "noise_range": (0.1, 0.9)}


def another(name, value):
    if name in OTHER:
        return OTHER[name]
    return value + 3 if isinstance(value, int) else value / 2 + 0.1


def words(name, value):
    if isinstance(value, bool):
        return [flag_of(name) if value else "--no-" + name.replace("_", "-")]
    return [flag_of(name), *(value if isinstance(value, tuple) else [value])]


@pytest.mark.parametrize("name", [n for n in FIELDS if n not in ("dataset", "method", "stage")])
def test_a_flag_overrides_its_field_and_only_that(name):
    row = STAGE_0 if name in options.TEACHERS else BASE
    if name == "trained_step":  # A step drawn at random has no previous student to unforget.
        row = [*BASE, "--unforget-weight", 0]
    if name == "augment":       # for networks that are told of it
        row = ["--dataset", "cifar10", "--stage", 0]
    if name == "lora":          # of text to image alone
        row = ["--dataset", "sd15", "--stage", 1]
    (_, base, how), = parse(*row)
    value = another(name, getattr(base, name))
    assert value != getattr(base, name)
    (_, config, options_), = parse(*row, *words(name, value))
    assert dataclasses.asdict(config) == dataclasses.asdict(base) | {name: value}
    assert type(getattr(config, name)) is type(getattr(base, name))
    changed = {"batch_per_gpu": value} if name == "batch" else {}
    if name in options.ARCHITECTURE:
        changed = {"network": how.network | {name: list(value) if isinstance(value, tuple) else
                                             value}}
    assert options_ == dataclasses.replace(how, **changed)


def test_dataset_method_stage_and_variant_choose_the_row():
    for (dataset, method, stage, variant), preset in PRESETS.items():
        (found, config, _), = parse("--dataset", dataset, "--method", method, "--stage", stage,
                                    "--variant", variant)
        assert found is preset and config == preset.config


def test_there_is_no_flag_but_for_a_field_and_for_where_and_how():
    flags = {action.dest for action in options.parser()._actions} - {"help", "variant"}
    where = {f.name for f in dataclasses.fields(options.Options)} - {
        "world_size", "network", "class_names"}                         # of what the others say
    assert flags == set(FIELDS) | where and not set(FIELDS) & where
    text = options.parser().format_help()
    for name, field in FIELDS.items():
        assert flag_of(name) in text and field.metadata["help"].split()[0] in text


def attributes_read(owner):
    """Names x of every `owner.x` in the sources, but for where flags are defined."""
    found, here = set(), ("tests", ".venv", "options.py")
    for path in ROOT.rglob("*.py"):
        if not set(here) & set(path.relative_to(ROOT).parts):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    if ast.unparse(node.value).split(".")[-1] == owner:
                        found.add(node.attr)
    return found


def test_every_field_is_read_somewhere():
    by_name = set(options.ARCHITECTURE)
    assert "ARCHITECTURE" in inspect.getsource(options.architecture)
    assert set(FIELDS) <= attributes_read("config") | by_name


def test_every_flag_of_where_and_how_is_read_somewhere():
    assert {f.name for f in dataclasses.fields(options.Options)} <= attributes_read("options")


def test_stages_run_in_order_without_stage():
    rows = parse()
    assert [config.stage for _, config, _ in rows] == [1, 2, 3]
    assert [len(config.sigmas) for _, config, _ in rows] == [1, 2, 3]
    assert [o.folder for *_, o in rows] == [Path(f"runs/digits-pmdd/stage{k}") for k in (1, 2, 3)]
    for method in ("dmd", "dmd2", "sid"):
        assert [config.stage for _, config, _ in parse("--method", method)] == [1]
    # One list of noise levels serves all three; a flag holds for all.
    rows = parse("--sigmas", 80, 9.5, 0.5, "--batch", 8)
    assert [config.sigmas for _, config, _ in rows] == [(80,), (80, 9.5), (80, 9.5, 0.5)]
    assert {config.batch for _, config, _ in rows} == {8}


def test_a_run_folder_is_named_after_what_is_computed():
    for argv, folder in {
            (): "runs/digits-pmdd/stage1",
            ("--dataset", "cifar10", "--method", "dmd", "--variant", "unconditional"):
                "runs/cifar10-dmd-unconditional/stage1",
            ("--method", "dmd2", "--stage", "3"): "runs/digits-dmd2/stage3",
            ("--stage", "0"): "runs/digits-pmdd/stage0",
            ("--method", "dmd", "--stage", "0"): "runs/digits-pmdd/stage0",
            ("--folder", "elsewhere/mine", "--stage", "2"): "elsewhere/mine/stage2"}.items():
        assert parse(*argv)[0][2].folder == Path(folder)
    # DMD2's longer training goes on from where its first part is saved.
    first = parse("--dataset", "imagenet64", "--method", "dmd2", "--variant", "no-gan")[0][2].folder
    longer = parse("--dataset", "imagenet64", "--method", "dmd2", "--variant", "longer")[0][1]
    assert Path(longer.start_from) == first / "best.pt"


def test_where_and_how_have_the_defaults_that_the_help_states(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (_, config, how), = parse("--method", "dmd2")
    assert how == options.Options(
        folder=Path("runs/digits-dmd2/stage1"), data="digits", reference=None, inception=None,
        prompts=None, cache=None, device=None, batch_per_gpu=config.batch, precision="fp32",
        compile=False, shard=False, recompute=False, ema_on_host=False, force=False,
        dry_run=False, world_size=1,
        network=DATASETS["digits"].network, class_names=tuple("0123456789"))
    monkeypatch.setenv("WORLD_SIZE", "4")               # a batch system's, not torchrun's
    assert parse()[0][2].world_size == 1
    monkeypatch.setenv("RANK", "0")
    how = parse("--method", "dmd2", "--batch", 24, "--batch-per-gpu", 3, "--data", "a.zip")[0][2]
    assert (how.world_size, how.batch_per_gpu, how.data) == (4, 3, "a.zip")
    assert parse("--batch", 24)[0][2].batch_per_gpu == 6


# ---- Wrong flags ----

def refused(*argv):
    """The one line that a wrong command line ends with, and its exit code 2."""
    with pytest.raises(UserError) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("argv, said", [
    ("--dataset mnist", ["--dataset", "mnist", "digits", "cifar10", "imagenet64"]),
    ("--method ladd", ["--method", "ladd", "pmdd", "dmd", "dmd2", "sid"]),
    ("--variant best", ["--variant best", "--stage 1, --stage 2, --stage 3"]),
    ("--stage 4", ["--stage 4", "--stage 3"]), ("--stage -1", ["--stage -1", "--stage 0"]),
    ("--method sid --stage 2", ["--method sid --stage 2", "--stage 1"]),
    ("--method dmd2 --stage 4", ["--stage 4", "--stage 1, --stage 2, --stage 3"]),
    ("--stage 1 --sigmas 80 2", ["--sigmas is (80.0, 2.0)", "1 noise level"]),
    ("--stage 0 --teacher assets/digits-teacher.pt", ["--teacher is for a student"]),
    ("--stage 0 --gan-weight 1", ["--gan-weight is for a student"]),
    ("--stage two", ["--stage", "two"]),
    ("--stage 0 --variant ../../elsewhere", ["--variant ../../elsewhere"]),
    ("--dataset cifar10 --method dmd --variant longer", ["longer", "--variant unconditional"]),
    ("--iterations 0", ["--iterations is 0", "at least 1"]),
    ("--iterations 1.5", ["--iterations", "1.5"]), ("--batch 0", ["--batch is 0", "at least 1"]),
    ("--batch -8", ["--batch is -8"]), ("--ttur 0", ["--ttur is 0"]),
    ("--save-every 0", ["--save-every is 0"]),
    ("--regression-steps 0", ["--regression-steps is 0"]),
    ("--evaluate-images 1", ["--evaluate-images is 1", "at least 2"]),
    ("--evaluate-every -1", ["--evaluate-every is -1", "0 or more"]),
    ("--learning-rate 0", ["--learning-rate is 0.0", "above 0"]),
    ("--learning-rate nan", ["--learning-rate is nan"]),
    ("--final-rate -0.1", ["--final-rate is -0.1", "0 to 1"]),
    ("--adapted-noises 0", ["--adapted-noises is 0"]),
    ("--adapted-rate 0", ["--adapted-rate is 0.0", "above 0"]),
    ("--noise-range 0.5", ["--noise-range is (0.5,)", "two rising shares"]),
    ("--noise-range 0.8 0.2", ["--noise-range is (0.8, 0.2)"]),
    ("--final-rate 1.5", ["--final-rate is 1.5"]), ("--final-rate nan", ["--final-rate is nan"]),
    ("--learning-rate inf", ["--learning-rate is inf"]), ("--learning-rate x", ["x"]),
    ("--alpha nan", ["--alpha is nan"]), ("--alpha -1", ["--alpha is -1.0", "0 or more"]),
    ("--unforget-weight -0.1", ["--unforget-weight is -0.1"]),
    ("--gan-weight inf", ["--gan-weight is inf"]), ("--clip nan", ["--clip is nan"]),
    ("--weight-decay -1", ["--weight-decay is -1.0"]),
    ("--ema-halflife -5", ["--ema-halflife is -5"]), ("--seed -1", ["--seed is -1"]),
    (f"--seed {2 ** 63}", ["--seed is 9223372036854775808", "2^63"]),
    ("--betas 0.9", ["--betas is (0.9,)", "two numbers"]),
    ("--betas 0 1", ["--betas is (0.0, 1.0)"]), ("--betas nan 0.9", ["--betas is (nan, 0.9)"]),
    ("--adapted-betas 0.9", ["--adapted-betas is (0.9,)", "two numbers"]),
    ("--betas -0.5 0.9", ["--betas is (-0.5, 0.9)"]),
    ("--stage 2 --sigmas 80", ["--sigmas is (80.0,)", "2 noise levels"]),
    ("--sigmas 80 2.5", ["--sigmas is (80.0, 2.5)", "3 noise levels"]),
    ("--stage 0 --sigmas 80", ["--sigmas is for a student"]),
    ("--stage 2 --sigmas 2.5 80", ["--sigmas is (2.5, 80.0)", "falling"]),
    ("--stage 2 --sigmas 80 80", ["--sigmas is (80.0, 80.0)", "falling"]),
    ("--stage 2 --sigmas 80 0", ["--sigmas is (80.0, 0.0)", "above 0"]),
    ("--stage 1 --sigmas nan", ["--sigmas is (nan,)"]),
    ("--stage 1 --sigmas inf", ["--sigmas is (inf,)"]),
    ("--stage 1 --sigmas -1", ["--sigmas is (-1.0,)"]), ("--sigmas", ["--sigmas"]),
    ("--loss none", ["--loss is 'none'", "dm or sid"]),
    ("--loss kl", ["--loss", "kl", "dm", "sid"]),
    ("--regression-weight 0.25", ["--regression-pairs is 0", "at least 1"]),
    ("--trained-step first", ["--trained-step", "first", "last", "random"]),
    ("--precision fp16", ["--precision", "fp16", "bf16"]),
    ("--device tpu", ["--device", "tpu", "cuda"]),
    ("--batch-per-gpu 3 --batch 8", ["--batch-per-gpu 3", "8 images", "divisors"]),
    ("--batch-per-gpu -1 --batch 8", ["--batch-per-gpu -1"]),
    ("--batch-per-gpu 16 --batch 8", ["--batch-per-gpu 16"]),
    ("--guidance -1", ["--guidance is -1.0"]), ("--guidance nan", ["--guidance is nan"]),
    ("--stage 0 --guidance 2", ["--guidance is for a student"]),
    ("--stage 1 --augment 0.1", ["--augment is for a teacher in training"]),
    ("--stage 1 --num-blocks 2", ["--num-blocks is for a teacher in training"]),
    ("--ema-rampup nan", ["--ema-rampup is nan"]), ("--ema-rampup -1", ["--ema-rampup is -1.0"]),
    ("--stage 0 --augment 7", ["--augment is 7.0"]),
    ("--stage 0 --augment 0.1", ["--augment 0.1", "digits has no input for it"]),
    ("--stage 0 --caption-dropout 7", ["--caption-dropout is 7.0"]),
    ("--stage 0 --dataset ffhq64 --caption-dropout 0.1", ["--caption-dropout 0.1", "no captions"]),
    ("--stage 0 --dataset mine --data digits --teacher assets/digits-teacher.pt",
     ["--teacher is for a student"]),
    ("--method dmd2 --stage 2 --variant x", ["--method dmd2 --stage 2 --variant x"]),
    ("--stage 0 --augment nan", ["--augment is nan"]),
    ("--stage 0 --dropout nan", ["--dropout", "nan"]),
    ("--stage 0 --dropout 2", ["--dropout", "2.0"]),
    ("--stage 0 --num-blocks -3", ["--num-blocks", "-3"]),
    ("--stage 0 --model-channels 2", ["--model-channels", "2"]),
    ("--stage 0 --channel-mult 0", ["--channel-mult", "0"]),
    ("--unknown 1", ["--unknown"]), ("digits", ["digits"]), ("--no-seed", ["--no-seed"])])
def test_a_wrong_flag_is_one_line_that_names_it_its_value_and_what_is_allowed(argv, said):
    line = refused(*argv.split())
    for word in said:
        assert word in line


def test_a_batch_that_the_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert refused("--batch", 8) == (
        "--batch 8 cannot be divided by 3 processes; allowed: multiples of 3")
    assert "4 images of a process" in refused("--batch", 12, "--batch-per-gpu", 3)


def test_processes_that_are_not_told_where_to_meet_are_told_of_torchrun(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR is not: start with torchrun"):
        distributed.start("cpu")


def test_a_mistake_in_a_later_stage_is_found_before_the_first_begins():
    assert "3 noise levels" in refused("--sigmas", 80, 2.5, "--iterations", 1)


def test_no_command_line_ends_in_a_traceback():
    flags = [flag for action in options.parser()._actions for flag in action.option_strings]
    flags = [flag for flag in flags if flag not in ("-h", "--help")]
    values = ["0", "1", "2", "3", "-1", "1e9", "nan", "-inf", "1e-400", "9" * 30, "9" * 5000, "",
              "x", "é", "digits", "cifar10", "imagenet64", "pmdd", "dmd2", "sid", "none", "dm",
              "longer", "80", "0.17", "random", "true", "--", "%s", "\0", "a\nb"]
    random_, outcomes = random.Random(0), {True: 0, False: 0}
    for _ in range(2000):
        argv = []
        for _ in range(random_.randrange(1, 5)):
            argv += [random_.choice(flags), *random_.choices(values, k=random_.randrange(3))]
        try:
            rows = options.parse(argv)
        except UserError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
            for _, config, how in rows:
                assert config.batch % how.batch_per_gpu == 0
                assert all(math.isfinite(v) for v in vars(config).values() if isinstance(v, float))
    assert min(outcomes.values()) > 50


@pytest.mark.parametrize("raised, code, said", [
    (UserError("wrong\nflag"), 2, "error: wrong flag\n"), (RunFailed("full"), 1, "error: full\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
    (torch._inductor.exc.InvalidCxxCompiler(), 1, "error: --compile: No working C++ compiler found "
     "in torch._inductor.config.cpp.cxx: (None, 'g++'); leave out the flag\n")])
def test_a_program_leaves_with_one_line_and_the_code_that_it_promises(capsys, raised, code, said):
    def main():
        raise raised

    with pytest.raises(SystemExit) as left:
        run(main)
    assert left.value.code == code and capsys.readouterr().err == said


def test_of_several_processes_each_says_which_it_is(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for raised, said in ((UserError("flag"), "error in process 1: flag\n"),
                         (RunFailed("dead"), "error in process 1: dead\n")):
        with pytest.raises(SystemExit):
            run(lambda raised=raised: (_ for _ in ()).throw(raised))
        assert capsys.readouterr().err == said
    for value in (0, 3, None):
        with pytest.raises(SystemExit) as left:
            run(lambda value=value: value)
        assert left.value.code == value


def test_a_reader_that_leaves_early_is_no_traceback():
    command = f"{sys.executable} train.py --dry-run | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.stdout.startswith("digits, pmdd, stage 1") and done.stderr == ""


# ---- The folder of a run ----

def opened(folder, *argv):
    (_, config, how), = parse("--stage", 1, "--folder", folder, *argv)
    lock, _ = run_folder.open_run(how.folder, config, how)
    run_folder.write_config(how.folder, config, how)               # as a run does when it begins
    return lock


def test_later_stages_keep_the_teacher_of_the_first_though_another_has_come_beside_it(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened(tmp_path / "runs" / "digits-pmdd").close()
    best = tmp_path / "runs" / "digits-pmdd" / "stage0" / "best.pt"
    best.parent.mkdir()
    best.touch()
    for flags in ((), ("--stage", 3)):
        for _, config, _ in parse("--dataset", "digits", *flags):
            assert config.teacher == (DATASETS["digits"].teacher if not flags else
                                      "runs/digits-pmdd/stage0/best.pt")


def test_a_stage_0_of_text_goes_on_from_its_pipeline_however_it_is_asked_for():
    for flags in (("--dataset", "emoji"), ("--data", "emoji")):
        (_, config, _), = parse("--stage", 0, *flags)
        assert config.teacher == DATASETS["emoji"].teacher


def test_config_json_holds_the_configuration_and_what_produced_the_numbers(tmp_path):
    lock = opened(tmp_path, "--seed", 7, "--betas", 0.5, 0.6)
    written = json.loads((tmp_path / "stage1" / "config.json").read_text())
    (_, config, how), = parse("--stage", 1, "--folder", tmp_path, "--seed", 7, "--betas", 0.5, 0.6)
    assert Config(**{k: tuple(v) if isinstance(v, list) else v
                     for k, v in written["config"].items()}) == config
    assert written["options"]["folder"] == str(tmp_path / "stage1")
    assert set(written["options"]) == {f.name for f in dataclasses.fields(how)}
    assert set(written["versions"]) == {"torch", "numpy", "device", "commit", "modified"}
    lock.close()
    # The same command opens it again, and where or how it runs may change.
    opened(tmp_path, "--seed", 7, "--betas", 0.5, 0.6, "--precision", "bf16").close()


def test_a_changed_preset_is_refused_by_the_names_of_its_fields_and_force_goes_on(tmp_path):
    opened(tmp_path).close()
    opened(tmp_path, "--batch", 64).close()                     # nothing was trained: a new start
    opened(tmp_path).close()
    (tmp_path / "stage1" / "metrics.jsonl").write_text("")
    before = (tmp_path / "stage1" / "config.json").read_text()
    with pytest.raises(UserError) as caught:
        opened(tmp_path, "--seed", 7, "--sigmas", 70)
    for word in ("seed (was 0, now 7)", "sigmas (was [80.0], now [70.0])", "--force", "--folder"):
        assert word in str(caught.value)
    assert "batch" not in str(caught.value)
    del caught                                                  # and with it, here, the lock
    assert (tmp_path / "stage1" / "config.json").read_text() == before
    opened(tmp_path, "--seed", 7, "--force").close()
    opened(tmp_path, "--seed", 7).close()                       # it is now this run's own


def test_other_images_or_another_reference_are_another_run(tmp_path):
    opened(tmp_path).close()
    (tmp_path / "stage1" / "metrics.jsonl").write_text("")
    for flag, changed in (("--data", "data (was 'digits', now 'other')"),
                          ("--reference", "reference (was None, now 'other')"),
                          ("--inception", "inception (was None, now 'other')")):
        with pytest.raises(UserError, match=re.escape(changed)):
            opened(tmp_path, flag, "other")
    opened(tmp_path, "--data", "other", "--force").close()
    opened(tmp_path, "--data", "other", "--cache", "elsewhere").close()


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"config": 3}', '{"config": {}}',
                                     "\x00\x01"])
def test_a_config_json_that_cannot_be_read_is_named(tmp_path, content):
    opened(tmp_path).close()
    path = tmp_path / "stage1" / "config.json"
    path.write_text(content)
    (tmp_path / "stage1" / "latest.pt").write_text("")
    with pytest.raises(UserError, match="config.json"):
        opened(tmp_path)
    opened(tmp_path, "--force").close()
    opened(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*file.*; choose another --folder"):
        opened(tmp_path / "file")


def test_what_a_killed_run_was_writing_is_cleared_away_and_nothing_else(tmp_path):
    folder = tmp_path / "stage1"
    folder.mkdir()
    for name in (".newest.pt.123.tmp", ".best.pt.9.tmp", "latest.pt", "notes.tmp", ".hidden"):
        (folder / name).write_text("x")
    (folder / ".exported.9.tmp").mkdir()
    (folder / ".exported.9.tmp" / "half").write_text("x")
    with hidden_beside(folder / "evaluation.json") as held:         # another's, who still writes
        opened(tmp_path).close()
        assert held.exists()
    assert sorted(p.name for p in folder.iterdir()) == [
        ".hidden", "config.json", "latest.pt", "lock", "notes.tmp"]


def test_where_nothing_can_be_locked_a_run_begins_and_says_so(tmp_path, monkeypatch, capsys):
    def none(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", none)
    opened(tmp_path).close()
    assert "stage1 cannot be locked (Function not implemented)" in capsys.readouterr().out
    assert (tmp_path / "stage1" / "config.json").is_file()


HOLDER = """
import sys, time
from training import options, run_folder
(_, config, how), = options.parse(["--stage", "1", "--folder", sys.argv[1]])
lock, _ = run_folder.open_run(how.folder, config, how)
print("open", flush=True)
time.sleep(60)
"""


def test_a_folder_in_use_is_refused_until_its_process_is_dead(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        assert holder.stdout.readline() == "open\n"
        for more in ((), ("--force",)):
            with pytest.raises(UserError, match="another process is training in .*stage1"):
                opened(tmp_path, *more)
        opened(tmp_path / "another").close()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        lock = opened(tmp_path)                                 # at once, with nothing to clean up
        with pytest.raises(UserError, match="another process is training"):
            opened(tmp_path)
        lock.close()
        opened(tmp_path).close()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


# ---- metrics.jsonl ----

def test_a_resumed_run_drops_half_a_line_and_the_lines_after_its_checkpoint(tmp_path):
    metrics = run_folder.Metrics(tmp_path, 0)
    for k in range(6):
        metrics.write(iteration=k, denoising=k / 2, tiny=1e-30)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    with open(path, "a") as file:
        file.write('{"iteration": 6, "denoi')                   # a full disk, or a kill
    assert [line["iteration"] for line in run_folder.read_metrics(path)] == [*range(6)]
    resumed = run_folder.Metrics(tmp_path, 4)
    assert path.read_text() == "".join(whole.splitlines(True)[:4])
    resumed.write(iteration=4, denoising=9.0)
    assert run_folder.read_metrics(path) == [
        {"iteration": k, "denoising": k / 2, "tiny": 1e-30} for k in range(4)] + [
        {"iteration": 4, "denoising": 9.0}]
    run_folder.Metrics(tmp_path, 0)                                # started afresh
    assert path.read_text() == ""


def test_every_cut_of_the_file_leaves_its_whole_lines(tmp_path):
    metrics, path = run_folder.Metrics(tmp_path, 0), tmp_path / "metrics.jsonl"
    for k in range(3):
        metrics.write(iteration=k, loss=1.5)
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        lines = run_folder.read_metrics(path)
        ended = content[:length].count(b"}")
        assert lines == [{"iteration": k, "loss": 1.5} for k in range(ended)]


def test_garbage_in_the_metrics_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert run_folder.read_metrics(path) == []
    good = b'{"iteration": 1, "loss": 2.0}'
    garbage = [b"", b"\xff\xfe\x00", b"null", b"3", b"[1]", b'"iteration"', b"{}", b"{" * 50,
               b'{"iteration": "1"}', b'{"iteration": null}', b'{"iteration": 1.5}', b"[" * 100_000,
               b'{"iteration": ' + b"9" * 5000 + b"}", random.Random(0).randbytes(300)]
    path.write_bytes(b"\n".join([good, *garbage, good]) + b"\n")
    assert run_folder.read_metrics(path) == [{"iteration": 1, "loss": 2.0}] * 2


def test_a_metrics_line_that_cannot_be_written_ends_the_run_in_one_line(tmp_path):
    metrics = run_folder.Metrics(tmp_path, 0)
    metrics.path = Path("/dev/full")                            # a disk without room
    with pytest.raises(RunFailed, match="cannot write /dev/full: No space left on device"):
        metrics.write(iteration=1)


def test_the_seconds_left_follow_from_the_pace_and_leave_out_the_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: now[0]))
    clock = log.Clock(batch=8)
    now[0] += 10
    clock.pause()
    now[0] += 1000                                              # an evaluation
    clock.go_on()
    now[0] += 10
    assert clock.read(iterations=5, left=100) == {"images_per_second": 2.0, "seconds_left": 400}
    now[0] += 4
    assert clock.read(iterations=1, left=0) == {"images_per_second": 2.0, "seconds_left": 0}
    now[0] += 12_000                                            # a pace that two digits would end
    assert clock.read(iterations=1, left=0)["images_per_second"] == 0.0006667


def test_a_step_drawn_at_random_has_nothing_to_unforget():
    with pytest.raises(UserError, match="--unforget-weight is 1.0; allowed: 0, unless a student"):
        parse("--stage", 2, "--trained-step", "random", "--unforget-weight", 1)


def test_a_starting_checkpoint_is_for_one_stage():
    for stages in ([], ["--stage", 0]):
        with pytest.raises(UserError, match="--start-from is for one stage"):
            parse("--start-from", "best.pt", *stages)


def test_a_full_gpu_is_one_line_that_says_what_needs_less(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SystemExit) as stopped:
        run(main)
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and said.count("\n") == 1 and "--batch-per-gpu" in said
