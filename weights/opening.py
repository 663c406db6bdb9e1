"""Any network that can be sampled, and images from it that depend on nothing but their seeds."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from weights import checkpoint
from base import distributed
from base import errors
from base.download import PUBLISHED, cache_folder
from base.errors import UserError
from models import sample_seeds, to_uint8
from presets import TEACHERS, UNCONDITIONAL
from weights.pretrained import PUBLISHED_NETWORKS, load_network

HERE = Path(__file__).resolve().parents[1]
ASSETS = HERE / "assets"
LARGEST_NUMBER = 10 ** 8         # of images in one command
PUBLISHED_SIGMA = {".pkl": 2.5, ".bin": 80.0}       # one-step students: SiD's pickles, DMD2's .bin
# Part of a published file's name -> dataset.
DATASETS = {"digits": "digits", "cifar10": "cifar10", "imagenet": "imagenet64", "ffhq": "ffhq64",
            "afhqv2": "afhqv2-64"}


# ---- Opening ----

@dataclass
class Opened:
    network: nn.Module
    sigmas: tuple               # one noise level a step; empty: a teacher
    dataset: str | None         # None: a file that does not say
    path: Path
    ours: bool

    @property
    def name(self):
        return shown(self.path)


def shown(path):
    """The path as a reader of a record can use it: relative where it can be."""
    path = Path(path).resolve()
    for base in (Path.cwd(), HERE):
        if path.is_relative_to(base):
            return str(path.relative_to(base))
    return str(path)


def open_network(source, *, sigmas=None, teacher=False, dataset=None, cache=None):
    """A checkpoint of ours, a published name, an EDM or SiD pickle, or a DMD2 state dict."""
    if Path(source).is_dir():
        raise UserError(f"{source} is a folder; name a file, such as a run's best.pt")
    payload, published = read_ours(source), str(source) in PUBLISHED_NETWORKS
    if payload:
        if sigmas:
            raise UserError(f"--sigmas: {source} has its own, {payload['sigmas']}; leave out the "
                            "flag")
        network = checkpoint.network_from(payload, source=source)
        levels = tuple(payload["sigmas"])
        path, known = Path(source), payload["dataset"]
    else:
        network = from_rank_zero(lambda: load_network(source, cache))
        path = cache_folder(cache) / PUBLISHED[str(source)].name if published else Path(source)
        known = next((name for part, name in DATASETS.items() if part in path.name), None)
        if teacher or published or path.name.startswith("edm-"):
            levels = ()
        else:
            levels = tuple(sigmas or (PUBLISHED_SIGMA.get(path.suffix),))
            if levels[0] is None:
                raise UserError(f"{source} does not say its noise levels: give --sigmas, or "
                                "--teacher")
    if dataset and known and dataset != known:
        raise UserError(f"--dataset {dataset}: {source} is of {known}")
    return Opened(network, levels, known or dataset, path, bool(payload))


def read_ours(source):
    """The payload if `source` is one of our checkpoints; None if it is a plain file of weights."""
    if Path(source).suffix != ".pt":
        return None
    try:
        return checkpoint.load(source, needs=checkpoint.SAMPLED)
    except checkpoint.DamagedCheckpoint as damaged:
        try:
            load_network(source)
        except UserError:
            raise damaged from None
        return None


def from_rank_zero(load):
    """load() on rank 0 first, so that one process downloads and the others find the file."""
    for turn in (distributed.rank() == 0, distributed.rank() > 0):
        if turn:
            network = load()
        distributed.barrier()
    return network


def default_teacher(dataset, label_dim=None):
    """The published teacher; of a student without classes (label_dim 0), the one without."""
    if dataset not in TEACHERS:
        raise UserError(f"no teacher is known for dataset {dataset}: name one with --teacher FILE")
    if dataset == "cifar10" and label_dim == 0:
        return UNCONDITIONAL
    return ASSETS / Path(TEACHERS[dataset]).name if dataset == "digits" else TEACHERS[dataset]


def default_student(steps, dataset, runs):
    """(path, why) of the newest run's student that has that many steps, or the embedded one."""
    found = []
    for config in Path(runs).glob("*/stage*/config.json"):
        candidates = config.with_name("best.pt"), config.with_name("latest.pt")
        weights = [path for path in candidates if path.is_file()]
        try:
            row = json.loads(config.read_text())["config"]
            fits = dataset in (None, row["dataset"]) and len(row["sigmas"]) >= max(steps or 1, 1)
        except (OSError, ValueError, KeyError, TypeError):
            continue                    # a folder that something else made
        if weights and fits:
            found.append((weights[0].stat().st_mtime_ns, weights[0]))
    wanted = f"{steps}-step student" if steps else "student"
    if found:
        return max(found)[1], f"the newest {wanted} under {runs}"
    if dataset not in (None, "digits"):
        raise UserError(f"no {wanted} of {dataset} under {runs}: train one (python train.py "
                        f"--dataset {dataset}), or name one with --checkpoint")
    return ASSETS / "digits-student.pt", "the embedded student"


def open_student(args, steps=0):
    """--checkpoint (which may turn out a teacher), or the newest student with so many steps."""
    source, why = args.checkpoint, "--checkpoint"
    if not source:
        source, why = default_student(steps, args.dataset, args.runs)
    opened = open_network(source, sigmas=args.sigmas, dataset=args.dataset, cache=args.cache)
    say(f"{opened.name} ({why})")
    return opened


def open_teacher(args, student=None):
    """--teacher FILE; else the teacher of the student's dataset, or without one --checkpoint."""
    source = args.teacher if isinstance(args.teacher, str) else None
    if student and not source:
        if not student.dataset:
            raise UserError(f"{student.name} does not say its dataset: give --dataset or --teacher "
                            "FILE")
        source = default_teacher(student.dataset, student.network.label_dim)
    source = source or args.checkpoint or default_teacher(args.dataset or "digits")
    opened = open_network(source, teacher=True, dataset=args.dataset, cache=args.cache)
    if opened.sigmas:
        raise UserError(f"{opened.name} is a student of {len(opened.sigmas)} steps, not a teacher; "
                        "it takes --steps")
    say(f"{opened.name} (teacher)")
    return opened


def steps_text(n):
    return f"{n} step{'s' * (n > 1)}"


def say(text):
    if distributed.rank() == 0:
        print(text, flush=True)


# ---- Sampling. On CPU an image has the same bits in any company and on any number of cores. ----

def set_precision(precision):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"


def prepare(network, device, precision="fp32", compiled=False):
    set_precision(precision)
    network.to(device).requires_grad_(False)
    if device.type == "cuda" and precision != "fp32":       # the layout of tensor cores
        network.to(memory_format=torch.channels_last)
    if compiled:
        compile_network(network, dynamic=False)
    return network


def compile_network(network, **how):
    """All networks are one class, whose graphs torch counts together: one for each role, kind of
    gradient and batch, and beyond this limit it would silently stop compiling."""
    torch._dynamo.config.cache_size_limit = 64          # recompile_limit by its older name
    network.compile(**how)


def pass_size(network, device):
    """Images of one pass, always: kernels choose their order of summation by shape."""
    pixels = 2 ** 12 if device.type == "cpu" else 2 ** 18
    return max(1, min(1024, pixels // (network.image_shape[1] * network.image_shape[2])))


def seed_blocks(seeds, network, device):
    size = max(16, pass_size(network, device))
    return [seeds[start:start + size] for start in range(0, len(seeds), size)]


def choose_classes(labels, seeds, label_dim):
    """One class for each seed; None: drawn at random from the seed itself, as EDM does."""
    if not label_dim or labels == "random":
        return None
    return [seed % label_dim if labels == "balanced" else labels for seed in seeds]


def sample_block(network, seeds, sampler, labels, device, precision="fp32"):
    """uint8 [B,C,H,W] for each list element of the sampler, and classes [B] or None."""
    size, parts = pass_size(network, device), []
    for start in range(0, len(seeds), size):
        chunk = list(seeds[start:start + size])
        padded = chunk + chunk[-1:] * (size - len(chunk))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            images, drawn = sample_seeds(network, padded, sampler, device=device,
                                         classes=choose_classes(labels, padded, network.label_dim))
        parts.append([to_uint8(x0)[:len(chunk)] for x0 in images]
                     + ([] if drawn is None else [drawn[:len(chunk)]]))
    *images, classes = [torch.cat(part) for part in zip(*parts)] + [None] * (not network.label_dim)
    return images, classes


def gathered(task, blocks, device):
    """The results of all blocks, shared over the ranks, in order on rank 0."""
    rank, world_size = distributed.rank(), distributed.world_size()
    mine = distributed.in_parallel(task, blocks[rank::world_size], device)
    if world_size == 1:
        yield from mine
        return
    for _ in range(0, len(blocks), world_size):
        parts = [None] * world_size if rank == 0 else None
        dist.gather_object(next(mine, None), parts)
        yield from (part for part in parts or [] if part is not None)


# ---- Flags that sample.py and evaluate.py share ----

class Parser(errors.Parser):
    """The flags that both scripts have."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def add_shared(self):
        what = self.add_argument_group("which network")
        what.add_argument("--checkpoint", metavar="FILE",
                          help="a checkpoint of train.py, a published name such as "
                               "edm-cifar10-32x32-cond-vp, an EDM or SiD .pkl, or DMD2's "
                               "pytorch_model.bin (default: the newest student under --runs, else "
                               "the embedded one)")
        what.add_argument("--teacher", metavar="FILE", nargs="?", const=True,
                          help="sample a teacher by Heun's method: FILE, else --checkpoint, else "
                               "the dataset's own")
        what.add_argument("--sigmas", type=float, nargs="+", metavar="S",
                          help="noise level of each step, for a published student (default: 2.5 "
                               "for a .pkl, as SiD's; 80 for a .bin, as DMD2's)")
        what.add_argument("--dataset", choices=list(DATASETS.values()),
                          help="choose the run, the teacher and the reference by it")
        what.add_argument("--runs", default="runs", help="folder of runs (default: runs)")
        how = self.add_argument_group("how it is computed")
        how.add_argument("--device", choices=("cpu", "cuda"),
                         help="default: cuda where there is one")
        how.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
                         help="default: fp32; the others use a GPU's tensor cores and move figures "
                              "a little")
        how.add_argument("--compile", action="store_true",
                         help="torch.compile the network: worth it for thousands of images")
        how.add_argument("--cache", help="folder of downloaded files (default: $PMDD_CACHE or "
                                         "~/.cache/pmdd)")
        how.add_argument("--force", action="store_true", help="replace an output that exists")


def check_sigmas(sigmas):
    if sigmas and not all(a > b > 0 for a, b in zip([float("inf"), *sigmas], sigmas)):
        raise UserError(f"--sigmas {' '.join(map(str, sigmas))}: must fall from step to step and "
                        "stay above 0")
