"""FID and its companions for a student at every number of steps, a teacher, or a set of images.

    python evaluate.py                                   the newest student at 1, 2, .. steps
    python evaluate.py --heun 18 9 5                     the teacher at 35, 17 and 9 evaluations
    python evaluate.py --dataset sd15 --coco coco2014 --reference coco.npz --clip
                                                         text to image, as PMDD, DMD and DMD2 do it
    python evaluate.py --images samples.zip              images from anywhere: folder, .zip or .npz
    python evaluate.py --table results                   a Markdown table of recorded evaluations
    torchrun --nproc_per_node=4 evaluate.py --repeats 3  EDM's three blocks of seeds, shared out

Every score is recorded beside its protocol in evaluation.json: next to a checkpoint of a run,
else in the current folder. Evaluating the same thing again replaces it.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch

from base import distributed
from base.distributed import from_rank_zero, say
from base.errors import UserError, run
from base.files import file_digest, shown, versions
from base.progress import progress
from images.captioned import (COCO_CAPTIONS, COCO_IMAGES, COCO_PICTURES, EMOJI_CAPTIONS, KINDS,
                              Pictures, check_side, open_captioned, read_captions)
from images.emoji import SIDE
from images.from_seeds import choose_classes, heun, prepare, sample_block, seed_blocks
from images.prompts import read_prompts
from images.real import open_images
from images.sets import open_npz
from metrics.clip_score import OPENCLIP, ClipScore
from metrics.diversity import IMAGES, Diversity
from metrics.evaluations import out_path, record, records_under, table
from metrics.judge import (HEUN_STEPS, MANIFOLD, NEIGHBOURS, TEXT_SIDE, Judge, dataset_of,
                           open_real, side_of)
from models import SEEDS, sample_every_step
from weights.flags import LARGEST_NUMBER, Parser, check_shared, churn_options, refuse_of_teachers
from weights.opening import open_student, open_teacher, steps_text

ROUNDING = "uint8 of x * 127.5 + 128, clipped to 0..255, truncated (EDM)"
LABELS = {"random": "random, from each image's seed", "balanced": "balanced, seed modulo classes"}

OF_NETWORKS = dict(checkpoint=None, teacher=None, steps=None, heun=None, repeats=1, prompts=None,
                   coco=None, guidance=None, sigmas=None, base=None, churn=[0.0], labels="random",
                   precision="fp32", compile=False)


def parse(argv=None):
    parser = Parser(prog="evaluate.py", description=__doc__)
    what = parser.add_argument_group("what is evaluated")
    what.add_argument("--steps", type=int, nargs="+", metavar="N",
                      help="numbers of steps of the student (default: all that it knows)")
    what.add_argument("--heun", type=int, nargs="+", metavar="N",
                      help="a teacher with N Heun steps, 2N - 1 evaluations each (default: 18)")
    what.add_argument("--images", metavar="PATH", help="a folder, zip or npz of images instead")
    what.add_argument("--n", "--number", type=int,
                      help="images of a figure (default: 50000, all of --images, or one for each "
                           f"prompt, at most {COCO_IMAGES}); after torchrun write --number, it "
                           "takes --n for its own")
    what.add_argument("--repeats", type=int, default=1,
                      help="blocks of seeds, 0 to n-1, n to 2n-1, ..; shows mean, least and most")
    what.add_argument("--labels", choices=("random", "balanced"), default="random",
                      help="class of an image: drawn from its seed as EDM does (default), or seed "
                           "modulo classes")
    add_text(parser.add_argument_group("text to image"))
    against = parser.add_argument_group("against what")
    against.add_argument("--reference", metavar="NPZ",
                         help="mu and sigma of the real images (default: the dataset's published "
                              "ones); python fid.py makes one")
    against.add_argument("--inception", metavar="FILE",
                         help="the 2015-12-05 Inception weights (default: downloaded)")
    against.add_argument("--resize", choices=("tf1", "clean"),
                         help="to Inception's 299: TensorFlow 1's, as EDM, or clean-fid's "
                              "(default: tf1; clean with --side and for text to image)")
    against.add_argument("--precision-recall", action="store_true",
                         help=f"also k = {NEIGHBOURS} precision and recall, of the first "
                              f"{MANIFOLD:,} images and at most {MANIFOLD:,} real ones, which "
                              "bounds the memory")
    against.add_argument("--data", help="real images for it (default: the dataset's own)")
    parser.add_argument("--out", help="the json to write (default: see above)")
    parser.add_argument("--table", nargs="+", metavar="PATH",
                        help="evaluate nothing: print the records in these files and folders")
    args = parser.parse_args(argv)
    check(args)
    return args


def add_text(text):
    text.add_argument("--prompts", metavar="FILE",
                      help="what the network is asked for, seed k for prompt k: a text file, one a "
                           "line, a .json or .jsonl list, or a .pkl; of emoji also a kind of "
                           f"captions: {', '.join(KINDS)} (default: {EMOJI_CAPTIONS} of training)")
    text.add_argument("--coco", metavar="FOLDER",
                      help=f"COCO 2014: prompts from its {COCO_CAPTIONS}, one caption of each "
                           f"picture (without --prompts), real images from its {COCO_PICTURES}")
    text.add_argument("--side", type=int,
                      help=f"score middle squares, by Lanczos to so many pixels a side (default: "
                           f"{TEXT_SIDE} for text to image; DMD2 has 512 for SDXL)")
    text.add_argument("--patch-fid", metavar="NPZ",
                      help="also the FID of the middle 299 pixels a side (DMD2), against what "
                           "python fid.py --patch makes")
    text.add_argument("--diversity", metavar="FILE",
                      help=f"also the mean LPIPS between {IMAGES} images of each prompt of this "
                           "file (DMD2: 128 of PartiPrompts)")
    text.add_argument("--clip", action="store_true",
                      help="also the CLIP score, with the prompts or the captions of --images")
    text.add_argument("--clip-model", metavar="FOLDER",
                      help=f"CLIPModel of transformers, a folder or a name on the model hub "
                           f"(default: {OPENCLIP}, 5.5 GB)")


def check(args):
    for name in ("steps", "heun", "n", "repeats"):
        least = 2 if name == "n" else 1
        given = getattr(args, name)
        for value in [] if given is None else np.atleast_1d(given):
            if not least <= value <= LARGEST_NUMBER:
                raise UserError(f"--{name} {value}: must be {least} to {LARGEST_NUMBER:,}")
        if name in ("steps", "heun") and given:
            setattr(args, name, list(dict.fromkeys(given)))         # each once
    for name, default in OF_NETWORKS.items() if args.images else ():
        if getattr(args, name) != default:
            raise UserError(f"--{name}: --images are made already; leave it out")
    if args.repeats * (args.n or 50_000) > SEEDS:
        raise UserError(f"--repeats {args.repeats}: its seeds go beyond {SEEDS - 1:,}, from where "
                        "on torch draws the same images again")
    check_shared(args)
    check_side(args.side)
    if args.clip_model and not args.clip:
        raise UserError("--clip-model is for --clip; give both or neither")
    if args.diversity and not (args.prompts or args.coco):
        raise UserError("--diversity is of text to image: give --prompts or --coco with it")
    if args.patch_fid and args.images and (args.side or args.clip):
        raise UserError("--patch-fid is of images as they are: leave out --side and --clip")
    if args.teacher and args.steps and not args.heun:
        raise UserError("--steps is for a student; a teacher takes --heun")
    if args.precision_recall and args.n and args.n <= NEIGHBOURS:
        raise UserError(f"--n {args.n}: --precision-recall needs more than {NEIGHBOURS}")
    if args.data and not args.precision_recall:
        raise UserError("--data is what --precision-recall compares with; give both or neither")


# ---- What is evaluated ----

@dataclass
class Job:
    """What gives images: task(seeds or indices) -> ([uint8 [B,C,H,W], ..], classes or None)."""
    what: list                  # (text, network evaluations an image) of each image list
    shape: tuple
    dataset: str | None
    task: Callable
    protocol: list              # of each image list
    n: int
    blocks: Callable            # range of seeds or indices -> blocks of them
    source: Path
    ours: bool = False
    captions: list | None = None        # of text to image, by the index that task gives
    classes: int = 0            # that an image can be of
    diverse: Callable | None = None     # likewise a task, whose image k is of prompt k // IMAGES


def open_jobs(args, device):
    if args.images:
        return [images_job(args)]
    student = teacher = None
    if args.steps or not (args.teacher or args.heun):
        student = open_student(args, max(args.steps or [0]))
        if not student.sigmas and args.steps:
            raise UserError(f"{student.name} is a teacher: --heun says its steps, not --steps")
        student, teacher = (student, None) if student.sigmas else (None, student)
    if args.teacher or args.heun:
        teacher = open_teacher(args, student)
    if not teacher:
        refuse_of_teachers(args)
    asked = read_captions(args.prompts, args.coco, args.n, (student or teacher).dataset)
    more = read_prompts(args.diversity) if args.diversity else []
    for opened in filter(None, (student, teacher)):
        opened.ask(asked.prompts + more, "--prompts or --coco", device, student)
        opened.guide(args.guidance)
    jobs = [student_job(student, asked, args, device)] if student else []
    if teacher:
        jobs += [heun_job(teacher, n, asked, args, device) for n in args.heun or [HEUN_STEPS]]
    return jobs


def student_job(student, asked, args, device):
    """All numbers of steps from one roll-out: the images of fewer steps are its earlier outputs."""
    steps = args.steps or range(1, len(student.sigmas) + 1)
    sigmas = student.first_sigmas(max(steps))

    def sampler(*inputs):
        images = sample_every_step(*inputs, sigmas=sigmas)
        return [images[n - 1] for n in steps]

    return network_job(student, sampler, [(steps_text(n), n) for n in steps],
                       [{"sigmas": list(sigmas[:n])} for n in steps], asked, args, device)


def heun_job(teacher, steps, asked, args, device):
    told = {"guidance": teacher.guidance} if asked.prompts or teacher.guidance != 1 else {}
    churn = f"S_churn, S_tmin, S_tmax, S_noise = {args.churn}" if any(args.churn) else "no churn"
    return network_job(teacher, heun(steps, **churn_options(args.churn)),
                       [(f"Heun, {steps_text(steps)}", 2 * steps - 1)],
                       [{"sampler": f"EDM Alg. 2, {churn}"} | told], asked, args, device)


def network_job(opened, sampler, what, sampling, asked, args, device):
    network = prepare(opened.network, device, args.precision, args.compile)
    n, shape, classes = args.n or 50_000, network.shape, network.conditions.count
    labels = args.labels if classes else "random"
    said = LABELS[labels] if classes else "none"
    if asked.prompts:
        n, labels, said = len(asked.prompts), "balanced", "the prompts in order"
        shape = (3, opened.pipeline.size, opened.pipeline.size)
    protocol = {"images": n, "seeds": [f"{k * n}-{(k + 1) * n - 1}" for k in range(args.repeats)],
                "labels": said, "rounding": ROUNDING,
                "precision": args.precision + (", compiled" if args.compile else ""),
                "source": {"file": opened.name, "sha256": opened.digest(),
                           **({"base": opened.base} if args.base else {})}} | asked.protocol

    def task(seeds):
        chosen = choose_classes(labels, seeds, n if asked.prompts else classes)
        return sample_block(network, seeds, sampler, chosen, device, args.precision)

    def diverse(seeds):
        return sample_block(network, seeds, sampler, [n + seed // IMAGES for seed in seeds], device,
                            args.precision)

    return Job(what, shape, opened.dataset, task, [protocol | s for s in sampling], n,
               partial(seed_blocks, network=network, device=device), opened.path, opened.ours,
               asked.prompts or None, 0 if asked.prompts else classes,
               diverse if args.diversity else None)


def images_job(args):
    path, captions, said = Path(args.images), None, "none"
    npz = path.suffix == ".npz"
    if npz and args.clip:
        raise UserError(f"--clip: {path} has no captions, as no npz has; give a folder or zip")
    if args.clip or args.dataset == "emoji" and not npz:
        images = open_captioned(args.images, args.side or side_of(args.dataset, True) or SIDE)
        captions, said = images.captions, "captions of the files"
    elif npz:
        images = open_npz(path)
        images.classes *= args.dataset != "emoji"       # there its numbers are of prompts
    elif args.side:
        images = Pictures(path, args.side)
    else:
        images = open_images(args.images, args.cache)
    said = "of the files" if images.classes else said
    n = args.n or len(images)
    if not 2 <= n <= len(images):
        raise UserError(f"{images.name} has {len(images)} images, {max(n, 2)} are needed")
    file = {"file": shown(path), "sha256": file_digest(path) if path.is_file() else None}
    protocol = {"images": n, "seeds": None, "rounding": "none, uint8 as given", "source": file,
                "labels": said}

    def task(indices):
        pixels, labels = images.take(indices)
        return [pixels], labels if images.classes else torch.tensor(indices) if captions else None

    return Job([("images", 0)], images.shape, args.dataset, task, [protocol], n,
               lambda indices: [indices[k:k + 64] for k in range(0, len(indices), 64)], path,
               captions=captions, classes=images.classes)


# ---- Scoring ----

def make_judge(job, args, device):
    dataset = dataset_of(job.shape, args.dataset or job.dataset, shown(job.source))
    side = args.side or side_of(dataset, job.captions)
    judge = Judge(dataset, device, reference=args.reference, inception=args.inception,
                  cache=args.cache, side=side, resize=args.resize, captions=job.captions,
                  size=job.shape[-1])
    if judge.network.share == "right_class" and job.classes > judge.network.classes:
        raise UserError(f"{shown(job.source)} has class {job.classes - 1}, out of range: "
                        f"{judge.network.name} knows 0 to {judge.network.classes - 1}")
    if args.clip:
        if not job.captions:
            raise UserError(f"--clip: {shown(job.source)} is no text-to-image network")
        judge.clip = from_rank_zero(lambda: ClipScore(args.clip_model or OPENCLIP, device))
    if args.precision_recall:
        judge.compare_with(*open_real(job.shape, dataset, side, args))
    if args.patch_fid:
        judge.compare_patches(args.patch_fid)
    if args.diversity:
        judge.diversity = Diversity(args.diversity, args.cache, device)
    return judge


def evaluate(job, judge, repeat, repeats):
    """The scores of each of the job's image lists, for one block of seeds."""
    begin = repeat * job.n
    text = job.what[-1][0] + (f", block {repeat + 1} of {repeats}" if repeats > 1 else "")
    with progress(total=job.n, desc=text, unit="image") as bar:
        scores = judge.scores(job.task, job.blocks(range(begin, begin + job.n)), len(job.what),
                              job.n, bar)
    if judge.diversity and repeat == 0:                 # its seeds are those of no block
        for one, value in zip(scores, judge.diversity.scores(job.diverse, len(scores))):
            one["diversity"] = value
    return scores


def summary(values):
    return {"values": values, "mean": float(np.mean(values)), "least": min(values),
            "spread": max(values) - min(values)}


def entries(job, judge, args, device):
    """A record for each image list: its scores and the protocol that they stand for."""
    repeats = [evaluate(job, judge, k, args.repeats) for k in range(args.repeats)]
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    environment = versions() | {"device": device_name, "processes": distributed.world_size()}
    found = []
    for k, (text, evaluations) in enumerate(job.what):
        scores = {name: summary([one[k][name] for one in repeats if name in one[k]])
                  for name in repeats[0][k]}
        found.append({"what": text, "evaluations": evaluations, "figures": scores,
                      "protocol": job.protocol[k] | judge.protocol(), "environment": environment})
    return found


# ---- Command ----

def main(argv=None):
    args = parse(argv)
    if args.table:
        print(table(records_under(args.table)))
        return 0
    device = distributed.start(args.device)
    jobs = open_jobs(args, device)
    if len({tuple(job.shape) for job in jobs}) > 1:
        raise UserError("student and teacher make images of different shapes")
    path = out_path(args.out, jobs[0].source, jobs[0].ours, args.force)
    judge, done = make_judge(jobs[0], args, device), []
    for job in jobs:
        done += entries(job, judge, args, device)
        if distributed.rank() == 0:                 # what is done is kept, whatever follows
            record(path, done, args.force)
    say(f"{table(done)}\n\nwrote {path}")
    distributed.finish()
    return 0


if __name__ == "__main__":
    run(main)
