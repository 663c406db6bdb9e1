"""Images from a few-step student, or from a teacher.

    python sample.py --steps 3                      a grid, class by class, of the newest student
    python sample.py --compare                      the same noise through teacher and student
    python sample.py --dataset emoji --prompt "a fox and a lemon on a green background"
    python sample.py --heun 18                      the teacher
    python sample.py --n 50000 --out samples.zip    files for other programs: .zip, .npz or a folder
    torchrun --nproc_per_node=4 sample.py ...       shared out; on CPU the same bits
"""

import time
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

from base import distributed
from base.distributed import gathered, say
from base.errors import UserError, run
from base.progress import progress
from images.captioned import KINDS, prompts_for
from images.emoji import SHOWN
from images.from_seeds import choose_classes, every_step, heun, prepare, sample_block, seed_blocks
from images.pictures import comparison, grid, save_png
from images.prompts import whole
from images.sets import check_out, kind_of, write_folder, write_npz, write_zip
from metrics.judge import HEUN_STEPS
from models import SEEDS, sample_student
from weights.flags import LARGEST_NUMBER, Parser, check_shared, churn_options, refuse_of_teachers
from weights.opening import Opened, open_network, open_student, open_teacher, steps_text

LARGEST_GRID = 4096             # images; a grid is the one output that is held in memory


# ---- Command line ----

def parse(argv=None):
    parser = Parser(prog="sample.py", description=__doc__)
    what = parser.add_argument_group("what is drawn")
    what.add_argument("--steps", type=int, metavar="N",
                      help="steps of the student (default: all that it was trained for)")
    what.add_argument("--heun", type=int, metavar="N",
                      help="a teacher with N Heun steps, 2N - 1 evaluations (default: 18)")
    what.add_argument("--compare", action="store_true",
                      help="one picture: teacher, then 1, 2, .. steps, of the same noise")
    what.add_argument("--n", "--number", type=int,
                      help="images, seeds 0 to n-1 (default: 100; 10 with --compare; with prompts "
                           "4 of each, 1 with --compare); after torchrun write --number, it takes "
                           "--n for its own")
    what.add_argument("--seeds", help="their seeds instead, one an image: 0-63 or 1,5,7-9")
    labels = what.add_mutually_exclusive_group()
    labels.add_argument("--class", dest="label", metavar="C",
                        help="one class for all images: its number, or its name")
    labels.add_argument("--labels", choices=("random", "balanced"),
                        help="random: drawn from each seed, as EDM; balanced: seed modulo classes "
                             "(default: balanced for a picture of at most 20 classes, else random)")
    labels.add_argument("--prompt", nargs="+", metavar="TEXT",
                        help="what a text-to-image network is asked for; --n pictures of each")
    labels.add_argument("--prompts", metavar="FILE",
                        help="the same from a file, one a line, or a .json or .jsonl list; with "
                             f"--dataset emoji also some captions: {', '.join(KINDS)}")
    what.add_argument("--grid", metavar="COLUMNS[xROWS]",
                      help="shape of the picture, in seed order")
    what.add_argument("--out", help="a .png grid, .zip (EDM's layout), .npz (arr_0, arr_1), or a "
                                    "folder of PNGs (default: a .png named after what it shows, "
                                    "replaced without asking)")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args):
    """What can be refused without opening anything; fills in args.all_seeds and args.kind."""
    for name in ("steps", "heun", "n"):
        if getattr(args, name) is not None and not 1 <= getattr(args, name) <= LARGEST_NUMBER:
            raise UserError(f"--{name} {getattr(args, name)}: must be 1 to {LARGEST_NUMBER:,}")
    if args.seeds and args.n:
        raise UserError("--seeds and --n: give one of them, --seeds says how many")
    if args.compare and (args.steps or args.grid):
        raise UserError("--compare shows every number of steps, a row for each; leave out --steps "
                        "and --grid")
    if args.steps and (args.teacher or args.heun):
        raise UserError("--steps is for a student; a teacher takes --heun")
    check_shared(args)
    args.all_prompts = [*map(whole, args.prompt or ())] or args.prompts and prompts_for(
        args.dataset, args.prompts, len(SHOWN))
    args.kind = kind_of(args.out)
    choose_images(args)
    if args.compare and args.kind != "png":
        raise UserError(f"--compare makes a picture; --out {args.out} is none")
    if args.out:
        check_out(Path(args.out), args.kind, args.force)


def choose_images(args):
    """How many, of which seeds, in how many columns."""
    args.columns, rows = parse_grid(args.grid)
    default = ((1 if args.compare else 4) if args.all_prompts else 10 if args.compare else 100)
    args.all_seeds = parse_seeds(args.seeds) if args.seeds else range(
        args.n or (args.columns * rows if rows else default))
    count = len(args.all_seeds) * len(args.all_prompts or [""])
    if args.grid and args.all_prompts:
        raise UserError("--grid: with prompts each has a row of its own; leave it out")
    if rows and count > args.columns * rows:
        raise UserError(f"--grid {args.grid} has no place for {count} images")
    if args.kind == "png" and count > LARGEST_GRID:
        more = "" if args.compare else "; for more give --out a .zip, .npz or folder"
        raise UserError(f"a picture of {count} images; allowed: {LARGEST_GRID}{more}")


def parse_grid(text):
    columns, _, rows = (text or "10").partition("x")
    try:
        columns, rows = int(columns), int(rows) if rows else 0
        if not 1 <= columns <= LARGEST_GRID or rows < 0 or (text and text.endswith("x")):
            raise ValueError
    except ValueError:
        raise UserError(f"--grid {text}: must look like 10 or 10x4 (columns x rows), with at most "
                        f"{LARGEST_GRID} columns") from None
    return columns, rows


def parse_seeds(text):
    """ "0-63" or "1,5,7-9" as a list, in the order given."""
    try:
        ends = [part.strip().partition("-") for part in text.split(",")]
        ranges = [range(int(first), int(last or first) + 1) for first, _, last in ends]
        if not all(ranges):
            raise ValueError
    except ValueError:
        raise UserError(f"--seeds {text[:80]}: must look like 0-63 or 1,5,7-9") from None
    if max(part.stop for part in ranges) > SEEDS or sum(map(len, ranges)) > LARGEST_NUMBER:
        raise UserError(f"--seeds {text[:80]}: allowed: {LARGEST_NUMBER:,} seeds from 0 to "
                        f"{SEEDS - 1:,}, as larger ones draw no other images")
    seeds = [seed for part in ranges for seed in part]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text}: names a seed twice")
    return seeds


# ---- Networks and what is drawn from them ----

class Row(NamedTuple):
    """A network, its sampler, and what each of the images is that this returns."""
    opened: Opened
    sampler: Callable
    texts: list


def open_rows(args):
    """One row, or to compare two: a teacher and a student."""
    if (args.teacher or args.heun) and not args.compare:
        return [heun_row(open_teacher(args), args)]
    student = open_student(args, args.steps)
    if not student.sigmas:
        if args.steps or args.compare:
            flag = "--compare" if args.compare else "--steps"
            raise UserError(f"{student.name} is a teacher, not a student; leave out {flag}")
        return [heun_row(student, args)]
    if not args.compare:
        sigmas = student.first_sigmas(args.steps or len(student.sigmas))
        return [Row(student, lambda *inputs: [sample_student(*inputs, sigmas=sigmas)],
                    [steps_text(len(sigmas))])]
    teacher = open_teacher(args, student)
    if len({(one.network.shape, one.network.conditions.count) for one in (teacher, student)}) > 1:
        raise UserError(f"--compare: {teacher.name} and {student.name} make images of different "
                        "shapes or classes")
    texts = [steps_text(n + 1) for n in range(len(student.sigmas))]
    return [heun_row(teacher, args), Row(student, every_step(student.sigmas), texts)]


def heun_row(opened, args):
    steps = args.heun or HEUN_STEPS
    return Row(opened, heun(steps, **churn_options(args.churn)),
               [f"teacher, {2 * steps - 1} evaluation{'s' * (steps > 1)}"])


def wanted(args, network, labels):
    """Numbers of the images to draw, which are their seeds where there are no prompts; and of some
    of these numbers the (seeds, what each is asked for, or None)."""
    seeds = args.all_seeds
    if not args.all_prompts:
        count = network.conditions.count
        return seeds, lambda numbers: (numbers, choose_classes(labels, numbers, count))
    return range(len(seeds) * len(args.all_prompts)), lambda numbers: (
        [seeds[number % len(seeds)] for number in numbers],
        [number // len(seeds) for number in numbers])


def draw_block(numbers, ask, rows, device, precision):
    """One block through every row, as numpy, so that ranks can pass it on."""
    images, (seeds, asked) = [], ask(numbers)
    for row in rows:
        drawn, index = sample_block(row.opened.network, seeds, row.sampler, asked, device,
                                    precision)
        images += [x.cpu().numpy() for x in drawn]
    return numbers, images, None if index is None else index.cpu().numpy()


def write_picture(path, blocks, args, rows, labels):
    if not (everything := list(blocks)):
        return                                              # not rank 0
    variants = [np.concatenate(parts) for parts in zip(*(images for _, images, _ in everything))]
    columns, texts, labelled = args.columns, [text for row in rows for text in row.texts], {}
    if args.all_prompts:
        return save_png(prompted(variants, args, texts), path)
    if args.compare:
        return save_png(comparison(variants, texts), path)
    if args.label is not None:
        labelled = {"row_labels": [class_name(rows[0].opened.class_names, args.label)]}
    elif labels == "balanced" and not args.grid:            # a row for each class
        classes = np.concatenate([classes for _, _, classes in everything])
        order, counts = np.argsort(classes, kind="stable"), np.unique(classes, return_counts=True)
        if len(set(counts[1])) == 1:
            variants, columns = [variants[0][order]], counts[1][0]
            names = rows[0].opened.class_names
            labelled = {"row_labels": [class_name(names, c) for c in counts[0]]}
    save_png(grid(np.concatenate(variants), columns, **labelled), path)


def prompted(variants, args, texts):
    """A row for each prompt, its caption beside it; to compare, one for each of its seeds."""
    scale = max(1, 128 // variants[0].shape[2])         # small pictures are shown at 128 pixels
    if not args.compare:
        return grid(variants[0], len(args.all_seeds), scale, row_labels=args.all_prompts)
    captions = [prompt if seed == args.all_seeds[0] else "" for prompt in args.all_prompts
                for seed in args.all_seeds]
    images = np.stack(variants, 1).reshape(-1, *variants[0].shape[1:])
    return grid(images, len(variants), scale, row_labels=captions, column_labels=texts)


def class_name(names, number):
    return names[number] if number < len(names) else str(number)


def class_number(asked, names, classes):
    """Of a class by its number, as text, or by its name."""
    if not classes:
        raise UserError(f"class {asked}: this network has no classes")
    if asked in names and not asked.isdecimal():
        return names.index(asked)
    if not asked.isdecimal() or int(asked) >= classes:
        named = f", or {', '.join(names)[:300]}" if names else ""
        raise UserError(f"--class {asked}: allowed: 0 to {classes - 1}{named}")
    return int(asked)


def choose_labels(args, opened):
    """ "random", "balanced", or one class; with prompts nothing."""
    classes = opened.network.conditions.count
    if args.all_prompts:
        return None
    if classes == 0:
        if args.label is not None or args.labels == "balanced":
            raise UserError("--class and --labels: this network has no classes")
        return "random"
    if args.label is not None:
        args.label = class_number(args.label, opened.class_names, classes)
        return args.label
    by_class = args.kind == "png" and classes <= 20
    return args.labels or ("balanced" if by_class else "random")


def write(path, blocks, count, args, rows, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    if args.all_prompts and args.kind in ("zip", "folder"):     # captions in place of numbers
        blocks = ((numbers, images, [args.all_prompts[k] for k in index])
                  for numbers, images, index in blocks)
    if args.kind == "png":
        write_picture(path, blocks, args, rows, labels)
    elif distributed.rank() > 0:
        for _ in blocks:                                    # its share of the work, for rank 0
            pass
    elif args.kind == "npz":
        write_npz(path, blocks, count)
    else:
        {"zip": write_zip, "folder": write_folder}[args.kind](path, blocks)


def default_path(opened, texts, compare):
    what = "compare" if compare else texts[0].split(",")[0].replace(" ", "-")
    return f"{opened.dataset or opened.path.stem}-{what}.png"


# ---- From Python ----

def load(source, device="cpu", **how):
    """To be called: load("best.pt")(n=16, steps=3, seed=0); of a teacher's pickle teacher=True."""
    opened, device = open_network(source, **how), torch.device(device)
    network = prepare(opened.network, device)

    def images(n=1, steps=None, seed=0, asked=None):
        """uint8 [n,C,H,W] of the seeds from `seed` on; asked: a class, or a prompt, for each."""
        if n < 1 or steps is not None and steps < 1:
            raise UserError(f"n is {n}, steps is {steps}: allowed: 1 or more")
        if asked is not None and (isinstance(asked, str) or len(asked) != n):
            raise UserError(f"asked for {len(asked)} things, n is {n}: a list, one for each image")
        if asked is not None and not opened.base:       # whole numbers of any kind, or names
            asked = [class_number(str(one), opened.class_names, network.conditions.count)
                     for one in (asked.tolist() if hasattr(asked, "tolist") else asked)]
        opened.network = network                        # not guided yet
        opened.ask(asked if opened.base else None, "asked", device)
        opened.guide(None)
        asked = range(n) if opened.base else asked
        sampler = heun(steps or HEUN_STEPS)
        if opened.sigmas:
            sampler = every_step(opened.first_sigmas(steps or len(opened.sigmas)))
        return sample_block(opened.network, range(seed, seed + n), sampler, asked, device)[0][-1]

    return images


def main(argv=None):
    args = parse(argv)
    device = distributed.start(args.device)
    rows = open_rows(args)
    if rows[0].opened.dataset == "emoji" and not (args.all_prompts or args.label or args.labels):
        args.all_prompts = list(SHOWN)
        choose_images(args)
    for row in rows:
        row.opened.ask(args.all_prompts, "--prompt or --prompts", device, rows[0].opened)
    labels = choose_labels(args, rows[0].opened)
    if all(row.opened.sigmas for row in rows):
        refuse_of_teachers(args)
    for row in rows:
        row.opened.guide(args.guidance)
        prepare(row.opened.network, device, args.precision, args.compile)
    texts = [text for row in rows for text in row.texts]
    path = Path(args.out or default_path(rows[-1].opened, texts, args.compare))

    start, (numbers, ask) = time.monotonic(), wanted(args, rows[0].opened.network, labels)
    draw = partial(draw_block, ask=ask, rows=rows, device=device, precision=args.precision)
    blocks = gathered(draw, seed_blocks(numbers, rows[0].opened.network, device), device)
    with progress(total=len(numbers), unit="image", delay=1) as bar:
        def counted():
            for block in blocks:
                yield block
                bar.update(len(block[0]))

        write(path, counted(), len(numbers), args, rows, labels)
    say(f"wrote {path}: {len(numbers)} images; {'; '.join(texts)}; "
        f"{time.monotonic() - start:.1f} s")
    distributed.finish()
    return 0


if __name__ == "__main__":
    run(main)
