"""Flags that sample.py and evaluate.py share: which network, and how it is computed."""

import argparse
import math

from base import errors
from base.errors import UserError
from models import falling
from presets.datasets import DATASETS

LARGEST_NUMBER = 10 ** 8         # of images in one command


class Parser(errors.Parser):
    """The flags that both scripts have."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        what = self.add_argument_group("which network")
        what.add_argument("--checkpoint", metavar="FILE",
                          help="a checkpoint of train.py, a published name such as "
                               "edm-cifar10-32x32-cond-vp, an EDM or SiD .pkl, DMD2's "
                               "pytorch_model.bin, of text to image also its .safetensors or an "
                               "exported folder (default: the newest student under --runs, else "
                               "the embedded one)")
        what.add_argument("--teacher", metavar="FILE", nargs="?", const=True,
                          help="sample a teacher by Heun's method: FILE, else --checkpoint, else "
                               "the dataset's own")
        what.add_argument("--sigmas", type=float, nargs="+", metavar="S",
                          help="noise level of each step, for a published student (default: 2.5 "
                               "for a .pkl, as SiD's; 80 for a .bin, as DMD2's; "
                               "of text to image DMD2's own timesteps)")
        what.add_argument("--base", metavar="FOLDER",
                          help="pipeline of a text-to-image student whose file does not say it, as "
                               "DMD2's U-Nets and LoRAs (default: the dataset's own)")
        what.add_argument("--guidance", type=float, metavar="W",
                          help="classifier-free guidance of a teacher (default: 3 with prompts, "
                               "or 1)")
        what.add_argument("--dataset", metavar="NAME",
                          help="choose the run, the teacher and the reference by it: "
                               f"{', '.join(DATASETS)}, or that of a run of your own")
        what.add_argument("--runs", default="runs", help="folder of runs (default: runs)")
        what.add_argument("--churn", type=float, nargs="+", default=[0.0], metavar="S",
                          help="noise that a teacher's sampler adds (EDM Alg. 2): S_churn, or "
                               "S_churn S_tmin S_tmax S_noise, on ImageNet-64 40 0.05 50 1.003")
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


def check_shared(args):
    if not falling(args.sigmas or ()):
        raise UserError(f"--sigmas {' '.join(map(str, args.sigmas))}: must fall from step to step "
                        "and stay above 0")
    if args.guidance is not None and not 0 <= args.guidance < math.inf:
        raise UserError(f"--guidance {args.guidance}: must be 0 or more")
    churn_options(args.churn)


def refuse_of_teachers(args):
    """What a student has not."""
    if args.guidance is not None:
        raise UserError("--guidance is for a teacher: a student has it in its weights")
    if any(args.churn):
        raise UserError("--churn is for a teacher: a student's steps have their own noise")


def churn_options(values):
    """--churn as sample_heun takes it."""
    if len(values) not in (1, 4) or not all(0 <= value < math.inf for value in values):
        raise UserError(f"--churn {' '.join(map(str, values))}: wanted: one number, or four, "
                        "S_churn S_tmin S_tmax S_noise, none below 0")
    return dict(zip(("churn", "churn_min", "churn_max", "churn_noise"), values))
