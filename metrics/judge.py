"""Scores of images: FID and its companions, against a reference; memory does not grow with them."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from base import distributed
from base.distributed import from_rank_zero, say
from base.download import fetch
from base.errors import UserError
from base.files import ROOT, file_digest, shown
from base.progress import progress
from fid import (FeatureStatistics, InceptionScore, all_reduce, frechet_distance, precision_recall,
                 read_reference)
from images.captioned import COCO_PICTURES, PATCH, Pictures, patch, squares
from images.from_seeds import choose_classes, every_step, heun, sample_block, seed_blocks
from images.real import open_images
from metrics.digits_classifier import load_digits_network
from metrics.emoji_judge import load_emoji_network
from metrics.inception import load_inception
from metrics.lpips import load_lpips
from presets.datasets import DATASETS

MANIFOLD = 10_000               # images of each kind that precision and recall hold in memory
NEIGHBOURS = 3
HEUN_STEPS = 18                 # of a teacher, where none are given: 35 evaluations
TEXT_SIDE = 256                 # to which DMD, DMD2 and PMDD bring Stable Diffusion's pictures
# What is scored by a network of its own, not by Inception, and the shape of its images.
OWN = {"digits": (load_digits_network, (1, 8, 8)), "emoji": (load_emoji_network, (3, 32, 32))}

OWN_SIZE = "--side and --resize clean are for Inception; {} have a network of their own"


def feature_network(dataset, cache=None, device="cpu", weights=None, resize="tf1"):
    """The network whose features score this dataset; `weights` is Inception's file, put by hand."""
    if dataset not in OWN:
        return load_inception(cache, device, weights, resize)
    if resize != "tf1":
        raise UserError(OWN_SIZE.format(dataset))
    return OWN[dataset][0](device=device)


def perceptual_distance(dataset, cache, device, pipeline=None):
    """DMD's regression: LPIPS, of latents' pictures; or between digits the same in the layers of
    their classifier, between emoji squared differences of latents (Deviation 11)."""
    if dataset == "digits":
        return load_digits_network(device=device).perceptual_distance
    if dataset == "emoji":
        return lambda x, y: (x - y).square().mean((1, 2, 3))
    if pipeline is None:
        return load_lpips(cache, device)
    lpips = load_lpips(cache, device, resize=None)      # as DMD: of the pictures as they are

    def between(x, y):
        return lpips(pipeline.decode_float(x), pipeline.decode_float(y))

    # The decoder's graph of a large picture takes many GiB: made again for one at a time.
    return lambda x, y: torch.cat([checkpoint(between, *pair, use_reentrant=False)
                                   for pair in zip(x.split(1), y.split(1))])


def dataset_of(shape, dataset, source):
    """The data set by whose features images are scored: 8x8 grey ones of no name are digits."""
    if dataset in OWN and tuple(shape) != OWN[dataset][1]:
        raise UserError(f"--dataset {dataset}: {source} has images of shape {list(shape)}, "
                        f"{dataset} are {list(OWN[dataset][1])}")
    return dataset or ("digits" if tuple(shape) == OWN["digits"][1] else None)


def side_of(dataset, text):
    """The default side of the squares that are scored."""
    return TEXT_SIDE if text and dataset not in OWN else None


def made_by(side, resize, out=None):
    flags, coco = (f" --side {side} --resize {resize}", "; COCO's pictures are val2014/*.jpg, of "
                   "val2014.zip at cocodataset.org") if side else ("", "")
    return f"; python fid.py --data PICTURES{flags} --out {out or 'FILE.npz'} makes one{coco}"


def has_reference(dataset):
    return dataset in DATASETS and bool(DATASETS[dataset].reference)


def lacks_reference(config, options):
    return not (options.reference or has_reference(config.dataset))


def tell_of_no_reference(config, options):
    """Once for all stages of a command."""
    if config.evaluate_every and lacks_reference(config, options):
        how = made_by(TEXT_SIDE, "clean") if "unet" in options.network else (
            "; python fid.py --data IMAGES --out FILE.npz makes one")
        say(f"no FID: no reference of {config.dataset} is known (--reference); best.pt is the "
            f"newest{how}")


def find_reference(name, cache):
    """A file of this repository, or a published one in the cache."""
    embedded = ROOT / name
    return embedded if embedded.is_file() else from_rank_zero(lambda: fetch(name, cache))


def open_real(shape, dataset, side, args):
    """Real images and where they are, of the shape that is scored."""
    source = args.data or (str(Path(args.coco) / COCO_PICTURES) if args.coco else
                           DATASETS[dataset].data if dataset in DATASETS else "")
    if not source:
        raise UserError("--precision-recall needs real images: give --data")
    if side:
        return Pictures(source, side), source
    images = from_rank_zero(lambda: open_images(source, args.cache))
    if tuple(images.shape) != tuple(shape):
        raise UserError(f"--data {source} has images of shape {list(images.shape)}, those "
                        f"evaluated are {list(shape)}")
    return images, source


class Judge:
    """Feature network, reference statistics and real features: what all images are held against."""

    def __init__(self, dataset, device, *, reference=None, inception=None, cache=None, side=None,
                 resize=None, captions=None, size=None):
        """side: of the squares that are scored, of pictures from text; None: images as they are,
        of this size.
        captions: by the index that a task gives beside its images."""
        resize = resize or ("clean" if side else "tf1")
        self.device, self.real, self.clip, self.side = device, None, None, side
        self.captions, self.patches, self.diversity = captions, None, None
        how = made_by(side, resize, reference)
        if not (reference or has_reference(dataset)):
            raise UserError(f"no reference is known for {dataset or 'these images'}: give "
                            + ("" if side or dataset else "--dataset or ") + "--reference" + how)
        if not reference and dataset not in OWN and (side or resize != "tf1"):
            raise UserError(f"the published reference of {dataset} is of whole images, resized as "
                            "TensorFlow 1 does: leave out --side and --resize, or give --reference"
                            + how)
        if not reference and dataset not in OWN and size not in (
                None, DATASETS[dataset].network["img_resolution"]):
            raise UserError(f"the published reference of {dataset} is of other images than these, "
                            f"of {size} pixels: give --reference" + how)
        self.path = reference or find_reference(DATASETS[dataset].reference, cache)
        if not Path(self.path).is_file():
            raise UserError(f"no reference at {self.path}" + how)
        if side and dataset in OWN:
            raise UserError(OWN_SIZE.format(dataset))
        self.network = from_rank_zero(
            lambda: feature_network(dataset, cache, device, inception, resize))
        self.made = {} if dataset in OWN else {"resize": resize}
        self.made |= {"side": side} if side else {}
        sides = {"side": size} if size and dataset not in OWN else {}
        self.reference = read_reference(self.path, self.network.dimensions, **sides | self.made)

    def compare_patches(self, path):
        """Also DMD2's patch FID, against this reference."""
        if not Path(path).is_file():
            raise UserError(f"--patch-fid {path}: no such file; python fid.py --data PICTURES "
                            f"--patch --out {path} makes one")
        if self.network.share:
            raise UserError("--patch-fid is for Inception; these have a network of their own")
        self.patches = read_reference(path, self.network.dimensions, side=PATCH)
        self.patches_path = path

    def compare_with(self, images, source):
        """Also precision and recall, against these real images."""
        self.real_source = f"{min(len(images), MANIFOLD)} of {len(images)} in {source}"
        chosen = np.linspace(0, len(images) - 1, min(len(images), MANIFOLD)).round().astype(int)
        blocks = [chosen[k:k + 64] for k in range(0, len(chosen), 64)]

        def task(block):
            return self.network(images.take(block)[0].to(self.device))[0]

        parts = distributed.in_parallel(task, blocks, self.device)
        self.real = torch.cat(list(progress(parts, total=len(blocks), desc="real features",
                                             unit="block")))

    def scores(self, task, blocks, lists, n, bar=None):
        """A dict for each image list that task(block) makes; the ranks share the blocks.

        task(block) -> (lists of images, classes or None); block holds seeds or indices in a row.
        """
        def features(block):
            images, asked = task(block)
            if self.captions:
                asked = [self.captions[i] for i in asked.tolist()]
            more = [{} for _ in images]
            if self.patches:
                for one, x in zip(more, images):
                    cut = squares(x, PATCH, patch).to(self.device)
                    one["patches"] = self.network(cut)[0]
            if self.clip:                               # DMD2's is of 256 pixels, whatever --side
                seen = [squares(x, TEXT_SIDE) if self.side else x for x in images]
                for one, cosines in zip(more, self.clip(seen, asked)):
                    one["cosines"] = cosines
            if self.side:
                images = [squares(x, self.side) for x in images]
            outputs = [self.network(x.to(self.device)) for x in images]
            return block, zip(outputs, more), asked

        tallies = [Tally(self, n) for _ in range(lists)]
        mine = blocks[distributed.rank()::distributed.world_size()]
        for block, outputs, asked in distributed.in_parallel(features, mine, self.device):
            for tally, (output, more) in zip(tallies, outputs):
                tally.add(block[0] - blocks[0][0], asked, *output, **more)
            if bar is not None:
                bar.update(len(block) * distributed.world_size())
        return [tally.scores() for tally in tallies]

    def protocol(self):
        about = {"reference": {"file": shown(self.path), "sha256": file_digest(self.path)},
                 "features": {"network": self.network.name, "sha256": self.network.sha256}}
        about |= self.made
        if self.patches:
            about["patch_reference"] = {"file": shown(self.patches_path),
                                        "sha256": file_digest(self.patches_path)}
        if self.diversity:
            about["diversity"] = self.diversity.protocol()
        if self.clip:
            about["clip_score"] = {"model": self.clip.name, "sha256": self.clip.sha256}
            about["clip_score"] |= {"side": TEXT_SIDE} if self.side else {}
        if self.real is not None:
            about["precision_recall"] = (f"k = {NEIGHBOURS}, first {MANIFOLD} images, real: "
                                         f"{self.real_source}")
        return about


class Tally:
    """Running sums over one list of n images, and features up to MANIFOLD where asked for."""

    def __init__(self, judge, n):
        self.judge, self.n = judge, n
        self.statistics = FeatureStatistics(judge.network.dimensions, judge.device)
        self.patches = judge.patches and FeatureStatistics(judge.network.dimensions, judge.device)
        self.right = torch.zeros(2, dtype=torch.float64, device=judge.device)   # of how many
        self.cosines = torch.zeros((), dtype=torch.float64, device=judge.device)
        self.inception_score = None
        if n >= 10 and not judge.network.share:
            self.inception_score = InceptionScore(n, device=judge.device)
        self.kept = []

    def add(self, first, asked, features, logits, cosines=None, patches=None):
        """One block, whose first image is number `first` of the list; asked: its classes, or
        captions, or None."""
        self.statistics.add(features)
        if self.judge.network.share and asked is not None:
            hits = self.judge.network.right(logits, asked)
            self.right += self.right.new_tensor([hits.sum(), len(hits)])
        if patches is not None:
            self.patches.add(patches)
        if cosines is not None:
            self.cosines += cosines.double().sum()
        if self.inception_score:
            indices = torch.arange(first, first + len(logits))
            self.inception_score.add(indices, logits - self.judge.network.logit_bias)
        if self.judge.real is not None and first < MANIFOLD:
            self.kept.append(features[:MANIFOLD - first].cpu())

    def scores(self):
        """On every rank, of the images of all ranks; precision and recall on rank 0 only."""
        self.statistics.all_reduce()
        all_reduce([self.right, self.cosines])
        statistics = self.statistics.mean(), self.statistics.covariance()
        scores = {self.judge.network.metric: frechet_distance(*statistics, *self.judge.reference)}
        if self.right[1]:
            scores[self.judge.network.share] = (self.right[0] / self.right[1]).item()
        if self.patches:
            self.patches.all_reduce()
            scores["patch_fid"] = frechet_distance(
                self.patches.mean(), self.patches.covariance(), *self.judge.patches)
        if self.judge.clip:
            scores["clip_score"] = (self.cosines / self.statistics.n).item()
        if self.inception_score:
            self.inception_score.all_reduce()
            scores["inception_score"] = self.inception_score.value()[0]
        if self.judge.real is not None and (kept := sum(distributed.gather(self.kept), [])):
            fake = torch.cat(kept).to(self.judge.device)
            pair = precision_recall(self.judge.real, fake, NEIGHBOURS)
            scores["precision"], scores["recall"] = pair
        return scores


class Scorer:
    """score(network, sigmas) -> {"1": {"digits-FID": 3.2, "right_class": 0.99}, "2": ...}."""

    def __init__(self, config, options, device):
        self.images, self.device, self.judge = config.evaluate_images, device, None
        if not config.evaluate_every or lacks_reference(config, options):
            return
        text = "unet" in options.network
        self.labels = "balanced" if text else "random"          # with text the prompts in order
        self.judge = Judge(config.dataset, device, reference=options.reference,
                           inception=options.inception, cache=options.cache,
                           side=side_of(config.dataset, text),
                           size=options.network.get("img_resolution"))

    @torch.no_grad()
    def score(self, network, sigmas, first=0):
        """A student at 1..n steps from one roll-out; without sigmas a teacher (key "heun").
        Of the images of the seeds from `first` on."""
        if sigmas:
            keys, sampler = [str(n + 1) for n in range(len(sigmas))], every_step(sigmas)
        else:
            keys, sampler = ["heun"], heun(HEUN_STEPS)
        self.judge.captions = network.conditions.texts

        def task(seeds):
            asked = choose_classes(self.labels, seeds, network.conditions.count)
            return sample_block(network, seeds, sampler, asked, self.device)

        blocks = seed_blocks(range(first, first + self.images), network, self.device)
        return dict(zip(keys, self.judge.scores(task, blocks, len(keys), self.images)))
