"""What a command is about: a known data set, a teacher of the user's own, or images of theirs."""

import os
from pathlib import Path
from typing import NamedTuple

from base.errors import UserError
from images.real import open_images
from presets.datasets import DATASETS
from weights.opening import find_teacher, open_network
from weights.pretrained import PUBLISHED_NETWORKS

SMALLEST = 4                    # pixels of an image, also at the lowest level of its network


class Subject(NamedTuple):
    name: str                   # of the data set; of what is the user's own, its file's
    network: dict               # the architecture of its teacher
    teacher: str                # where that comes from; "" for stage 0
    class_names: tuple = ()

    def teacher_of(self, preset):
        """A known data set's row may have a teacher of its own, as for no classes."""
        own = self.name in DATASETS and self.teacher == DATASETS[self.name].teacher
        return preset.config.teacher if own else self.teacher


def subject_of(args):
    """A known name wins; else the teacher says, the images of a stage 0, or the run's stage 0."""
    stage0 = made_here(args)
    if args.dataset in DATASETS:
        return known(args.dataset, args.teacher or stage0 or DATASETS[args.dataset].teacher)
    if args.stage == 0 and args.data and not args.teacher:
        return of_images(args)
    if args.teacher or stage0:
        return of_teacher(args, args.teacher or stage0)
    if not args.dataset:
        return known("digits", DATASETS["digits"].teacher)
    raise UserError(f"--dataset {args.dataset}: known are {', '.join(DATASETS)}; of your own give "
                    "--teacher FILE, or make one: --stage 0 --data FOLDER")


def known(name, teacher):
    return Subject(name, DATASETS[name].network, teacher, DATASETS[name].class_names)


def made_here(args):
    """The best checkpoint of the stage 0 in the run's own folder, or in that of its name."""
    if args.stage == 0:
        return ""
    folders = [Path(args.folder)] if args.folder else []
    if not args.folder or args.dataset and args.dataset not in DATASETS:
        folders.append(Path("runs") / f"{args.dataset or 'digits'}-pmdd")
    found = [os.path.join(folder, "stage0", "best.pt") for folder in folders]
    return next(filter(os.path.isfile, found), "")          # False too where a name is too long


def of_teacher(args, source):
    published = source in PUBLISHED_NETWORKS
    name = next((name for name, one in DATASETS.items()
                 if published and one.hint and one.hint in source), None)
    if name and not args.dataset:
        return known(name, source)
    found = find_teacher(source, args.dataset or "digits")
    opened = open_network(found, teacher=True, cache=args.cache)
    name = args.dataset or opened.dataset or Path(source).stem
    if name in DATASETS:
        return known(name, source)
    return Subject(name, opened.network.config, source, opened.class_names)


def of_images(args):
    name = args.dataset or Path(os.path.abspath(args.data)).stem
    if name in DATASETS:
        return known(name, DATASETS[name].teacher)
    images = open_images(args.data, args.cache)
    return Subject(name, network_for(images, args.data), "", images.class_names)


def network_for(images, source):
    """A DDPM++ network of a size that the published ones have at the nearest resolution."""
    channels, height, width = images.shape
    if height != width or height < SMALLEST:
        raise UserError(f"--data {source}: images of {width}x{height}; wanted: square ones of at "
                        f"least {SMALLEST} pixels")
    levels = [2, 2, 2] if height <= 32 else [1, 2, 2, 2]
    while len(levels) > 1 and (height % 2 ** (len(levels) - 1)
                               or height >> len(levels) - 1 < SMALLEST):
        levels.pop()                    # each level halves the image
    attended = [height >> k for k in range(len(levels)) if height >> k <= 16][:1]
    return dict(img_resolution=height, img_channels=channels, label_dim=images.classes,
                model_type="SongUNet", augment_dim=9, model_channels=128, channel_mult=levels,
                attn_resolutions=attended, dropout=0.13 if height <= 32 else 0.05)
