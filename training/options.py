"""The command line of train.py: a preset, and a flag for each of its fields."""

import argparse
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from base import distributed
from base.errors import Parser, UserError
from models import falling
from presets.config import Config, Preset, both_betas
from presets.rows import find
from training.subject import subject_of
from weights.checkpoint import untrained

# What says nothing about a teacher in training.
STUDENTS = ("guidance", "lora", "sigmas", "trained_step", "loss", "alpha", "dm_weighting",
            "unforget_weight", "external_sampling", "gan_weight", "gan_adapted_weight",
            "regression_weight", "regression_pairs", "regression_steps", "ttur",
            "adapted_noises", "adapted_rate", "adapted_betas", "noise_range")
# And what of a student.
ARCHITECTURE = ("model_channels", "channel_mult", "num_blocks", "attn_resolutions", "dropout")
TEACHERS = ("augment", "caption_dropout", *ARCHITECTURE)


class Stage(NamedTuple):
    """One stage to train."""
    preset: Preset
    config: Config              # the preset with the flags that were given
    options: "Options"


@dataclass(frozen=True)
class Options:
    """Where and how it is computed; of these only the files named change more than rounding, and
    the processes and parts a stage 0's dropout."""
    folder: Path
    data: str
    reference: str | None
    inception: str | None
    prompts: str | None
    cache: str | None
    device: str | None
    batch_per_gpu: int
    precision: str
    compile: bool
    shard: bool
    recompute: bool
    ema_on_host: bool
    force: bool
    dry_run: bool
    world_size: int
    network: dict               # the teacher's architecture, for stage 0 and plans
    class_names: tuple


def parser():
    parser = Parser(
        prog="train.py",
        description="Distil a diffusion model into a few-step student. Without --stage, PMDD runs "
                    "its stages 1, 2, 3 in order. The same command resumes a run. --dry-run shows "
                    "a preset's values.")
    preset = parser.add_argument_group("what is computed (default: the preset's value)")
    for f in dataclasses.fields(Config):
        flag, kwargs = "--" + f.name.replace("_", "-"), dict(f.metadata, default=argparse.SUPPRESS)
        if f.name in ("method", "dataset", "teacher", "stage"):
            kwargs |= dict(default=f.default if f.name == "method" else None, type=type(f.default))
        elif isinstance(f.default, bool):
            kwargs |= dict(action=argparse.BooleanOptionalAction)
            del kwargs["choices"]
        elif isinstance(f.default, tuple):
            kwargs |= dict(type=int if f.name in ARCHITECTURE else float, nargs="+")
        else:
            kwargs["type"] = type(f.default)
        preset.add_argument(flag, **kwargs)
    preset.add_argument("--variant", default="",
                        help="another row of the same paper: unconditional, no-gan, longer, gan, "
                             "guidance-8, pretraining; fast: ours, of PMDD's rows")
    how = parser.add_argument_group("where and how")
    how.add_argument("--folder", help="folder of the run (default: runs/<dataset>-<method>, with "
                                      "-<variant> where one is given)")
    how.add_argument("--data", help="real images: digits, emoji, cifar10, a folder, a zip, or "
                                    "CIFAR-10's archive (default: the dataset's own)")
    how.add_argument("--reference", help="FID reference, an npz with mu and sigma (default: the "
                                         "published one of the dataset)")
    how.add_argument("--inception", help="file with the 2015-12-05 Inception weights (default: the "
                                         "published one, downloaded)")
    how.add_argument("--prompts", metavar="FILE",
                     help="what a text-to-image student is trained on: a text file, one prompt a "
                          "line, a .json or .jsonl list, or DMD2's .pkl (default for emoji: their "
                          "own captions)")
    how.add_argument("--cache", help="folder of downloads (default: $PMDD_CACHE or ~/.cache/pmdd)")
    how.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    how.add_argument("--batch-per-gpu", type=int, default=0,
                     help="images of one forward pass; smaller ones accumulate gradients (0: all)")
    how.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
                     help="tf32: tensor cores; bf16: autocast, trained weights in fp32")
    how.add_argument("--compile", action="store_true", help="torch.compile the networks")
    how.add_argument("--shard", action="store_true",
                     help="each process keeps its share of every network, gradient and Adam state "
                          "(torch's fully_shard), in place of a copy of all")
    how.add_argument("--recompute", action="store_true",
                     help="compute activations again for the backward pass, block by block: less "
                          "memory, a forward pass more; on a CPU the same bits")
    how.add_argument("--ema-on-host", action="store_true",
                     help="keep the average of the student in the host's memory")
    how.add_argument("--force", action="store_true",
                     help="go on although the folder was begun with other values")
    how.add_argument("--dry-run", action="store_true",
                     help="print the configuration, its cost and a memory plan, and stop")
    return parser


def parse(argv=None):
    """The stages to train, in order."""
    args = parser().parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config)
             if getattr(args, f.name, None) is not None}
    refuse_needless(given)
    stages = [args.stage] if args.stage is not None else [1, 2, 3] if args.method == "pmdd" else [1]
    if "start_from" in given and (len(stages) > 1 or stages == [0]):
        raise UserError("--start-from is for one stage of a student: give --stage 1, 2 or 3")
    subject, wanted = subject_of(args), []
    for stage in stages:
        try:
            preset = find(subject.name, args.method, stage, args.variant, subject.network,
                          subject.teacher)
        except ValueError as error:
            raise UserError(str(error)) from None
        begins = stage or "unet" in subject.network     # stage 0 of text goes on from a pipeline
        if args.teacher and not begins:
            raise UserError("--teacher is for a student; --stage 0 trains a teacher")
        before = recorded(args, subject, preset.config, stage)
        earlier = (vars(wanted[-1].config) if wanted else
                   recorded(args, subject, preset.config, stage - 1) if stage > 1 else {})
        teacher = {"teacher": args.teacher or str((before or earlier).get("teacher", ""))
                   or subject.teacher_of(preset)} if begins else {}
        younger = {f.name: f.default for f in dataclasses.fields(Config)
                   if before and f.name not in before}
        config = merge(preset.config, younger | given | teacher
                       | {"stage": stage, "dataset": subject.name},
                       all_stages=len(stages) > 1)
        wanted.append(Stage(preset, config, options(args, config, subject)))
    return wanted


def folder_of(args, dataset, method, stage):
    name = f"{dataset}-{method}" + (f"-{args.variant}" if args.variant else "")
    return Path(args.folder or Path("runs") / name) / f"stage{stage}"


def recorded(args, subject, config, stage):
    """What a stage that goes on was begun with: its teacher stays, and is that of the stages after
    it, also where a stage 0 has come beside it; a field that is younger than the run has the
    default, which is what runs did."""
    path = folder_of(args, subject.name, config.method, stage) / "config.json"
    try:
        return dict(json.loads(path.read_text())["config"])
    except (OSError, ValueError, LookupError, TypeError):       # open_run says what is wrong
        return {}


def refuse_needless(given):
    """Flags that say nothing about a teacher in training, or about a student."""
    stage0 = given.get("stage") == 0
    needless = [k for k in given if k in (STUDENTS if stage0 else TEACHERS)]
    if needless:
        raise UserError(f"--{needless[0].replace('_', '-')} is for a "
                        + ("student; --stage 0 trains a teacher" if stage0 else
                           "teacher in training: --stage 0"))


def merge(config, given, all_stages):
    """The preset with the flags that were given; of sigmas for all stages each has its first."""
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    if "sigmas" in changes and all_stages:
        changes["sigmas"] = changes["sigmas"][:changes["stage"]]
    if changes["stage"] == 0:
        changes["method"] = config.method
    config = dataclasses.replace(config, **changes)
    check(config)
    return config


def check(config):
    """UserError for a value that no run can have."""
    def require(ok, name, allowed):
        if not ok:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is {getattr(config, name)!r}; allowed: {allowed}")

    for name in ("ttur", "iterations", "batch", "save_every", "regression_steps",
                 "adapted_noises"):
        require(getattr(config, name) >= 1, name, "whole numbers, at least 1")
    for name in ("unforget_weight", "gan_weight", "gan_adapted_weight", "regression_weight",
                 "regression_pairs", "weight_decay", "clip", "warm_up", "ema_halflife",
                 "ema_rampup", "evaluate_every", "alpha", "guidance", "lora"):
        require(0 <= getattr(config, name) < math.inf, name, "0 or more")
    require(0 <= config.seed < 1 << 63, "seed", "0 to 2^63 - 1, as torch's generators")
    require(0 < config.learning_rate < math.inf, "learning_rate", "above 0")
    require(0 <= config.final_rate <= 1, "final_rate", "0 to 1")
    require(0 < config.adapted_rate < math.inf, "adapted_rate", "above 0")
    shares = config.noise_range or (0, 1)
    require(len(shares) == 2 and 0 <= shares[0] < shares[1] <= 1, "noise_range",
            "two rising shares from 0 to 1")
    for name, betas in zip(("betas", "adapted_betas"), both_betas(config)):
        require(len(betas) == 2 and all(0 <= b < 1 for b in betas), name,
                "two numbers from 0 to below 1")
    require(len(config.sigmas) == config.stage, "sigmas",
            f"{config.stage} noise level{'s' * (config.stage != 1)}, one a step")
    require(falling(config.sigmas), "sigmas", "falling, above 0")
    require(config.dropout == -1 or 0 <= config.dropout < 1, "dropout", "0 to below 1")
    for name in ("augment", "caption_dropout"):
        require(0 <= getattr(config, name) <= 1, name, "0 to 1")
    require(config.evaluate_images >= 2, "evaluate_images", "whole numbers, at least 2")
    if config.stage:
        require(config.loss != "none" or config.gan_weight or config.regression_weight, "loss",
                "dm or sid, unless there is a GAN or regression term")
        previous = config.trained_step == "last" and (config.method == "pmdd" or config.start_from)
        require(not config.unforget_weight or previous, "unforget_weight",
                "0, unless a student of an earlier stage takes part: --method pmdd or "
                "--start-from, and --trained-step last")
        require(not config.regression_weight or config.regression_pairs >= 1, "regression_pairs",
                "at least 1 with --regression-weight")


def architecture(config, network):
    """The data set's own, with the flags that were given."""
    given = {name: list(value) if isinstance(value, tuple) else value for name in ARCHITECTURE
             if (value := getattr(config, name)) != getattr(Config, name)}
    if given:
        try:
            with torch.device("meta"):
                untrained(network | given)
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            flags = " ".join("--" + name.replace("_", "-") for name in given)
            raise UserError(f"{flags}: no network of {config.dataset}'s images: {error}") from None
    return network | given


def options(args, config, subject):
    world_size = distributed.processes()
    if config.batch % world_size:
        raise UserError(f"--batch {config.batch} cannot be divided by {world_size} processes; "
                        f"allowed: multiples of {world_size}")
    share = config.batch // world_size
    per_gpu = args.batch_per_gpu or share
    if per_gpu < 0 or share % per_gpu:
        raise UserError(f"--batch-per-gpu {per_gpu} does not divide the {share} images of a "
                        "process; allowed: divisors of that number, 0 for all")
    if args.prompts and "unet" not in subject.network:
        raise UserError(f"--prompts: {config.dataset} has no text; it is for text to image, such "
                        "as --dataset sd15")
    classes = "unet" in subject.network or subject.network["label_dim"]
    if config.guidance != 1 and not classes:
        raise UserError(f"--guidance {config.guidance:g}: {config.dataset} has no classes or "
                        "prompts")
    if config.augment and not subject.network.get("augment_dim"):
        raise UserError(f"--augment {config.augment:g}: the network of {config.dataset} has no "
                        "input for it (augment_dim)")
    if config.caption_dropout and not classes:
        raise UserError(f"--caption-dropout {config.caption_dropout:g}: {config.dataset} has no "
                        "captions or classes to leave out")
    if args.shard and world_size == 1 and not args.dry_run:
        raise UserError("--shard needs two processes or more: torchrun --nproc_per_node=2 "
                        "train.py ..")
    if config.lora and "unet" not in subject.network:
        raise UserError(f"--lora {config.lora}: is for text to image, such as --dataset sd15; "
                        f"train {config.dataset} without it")
    if config.lora and (args.shard or args.ema_on_host):
        raise UserError(f"--lora {config.lora} trains too little for it to be worth sharing: leave "
                        "out " + ("--shard" if args.shard else "--ema-on-host"))
    folder = folder_of(args, config.dataset, config.method, config.stage)
    return Options(folder, args.data or config.dataset, args.reference, args.inception,
                   args.prompts, args.cache, args.device, per_gpu, args.precision, args.compile,
                   args.shard, args.recompute, args.ema_on_host, args.force, args.dry_run,
                   world_size, architecture(config, subject.network), subject.class_names)
