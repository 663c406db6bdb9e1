"""FID and its companions: Inception features, their statistics, and the distances between them.

    python fid.py --data images.zip --out reference.npz     reference statistics of a set of images
    python fid.py --data val2014 --side 256 --out coco.npz  of COCO's pictures, for text to image

FID (arXiv:1706.08500) is the Frechet distance between Gaussians fitted to the features of two sets
of images. Two figures compare only where network, resize, rounding and sums are the same; these
are EDM's: the 2015-12-05 weights, TensorFlow 1's resize, float64 sums. Text to image has
clean-fid's resize in its place.
"""

import zipfile
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist

from base.errors import Parser, UserError, run
from base.files import write_arrays
from base.progress import progress


# ---- Statistics ----

class FeatureStatistics:
    """Running float64 sums of features [B,D], from which mean and covariance follow."""

    def __init__(self, dimensions, device="cpu"):
        self.n = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(dimensions, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)

    def add(self, features):
        if features.ndim != 2 or features.shape[1] != len(self.sum):
            raise ValueError(f"features must be [B,{len(self.sum)}], got {list(features.shape)}")
        features = features.to(self.sum)
        self.n += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features

    def all_reduce(self):
        """Every rank ends with the sums of all ranks."""
        all_reduce((self.n, self.sum, self.outer))

    def mean(self):
        self._need_two()
        return (self.sum / self.n).cpu().numpy()

    def covariance(self):
        """Divided by N - 1, as EDM does and numpy.cov."""
        self._need_two()
        mean = self.sum / self.n
        return ((self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)).cpu().numpy()

    def _need_two(self):
        if self.n < 2:
            raise UserError(f"statistics need at least 2 images, got {int(self.n)}")


def all_reduce(tensors):
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def reference_statistics(network, batches):
    """Statistics of all images of an iterator of uint8 batches [B,C,H,W]."""
    statistics = FeatureStatistics(network.dimensions)
    for images in batches:
        statistics.add(network(images)[0])
    return statistics


def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2), in float64."""
    mean1, cov1, mean2, cov2 = (np.asarray(x, np.float64) for x in (mean1, cov1, mean2, cov2))
    d1, d2 = mean1.size, mean2.size
    if d1 != d2 or cov1.shape != (d1, d1) or cov2.shape != (d2, d2):
        raise ValueError(f"statistics of different dimensions: mean {mean1.shape}, covariance "
                         f"{cov1.shape} against mean {mean2.shape}, covariance {cov2.shape}")
    if not all(np.isfinite(x).all() for x in (mean1, cov1, mean2, cov2)):
        raise ValueError("statistics are not finite")
    # With C1 = L L^T, C1 C2 has the eigenvalues of the symmetric L^T C2 L. L has as many columns
    # as C1 has rank; the smaller rank of the two leaves out null directions, whose rounding errors
    # would add up.
    factor, other = min((low_rank_factor(cov1), cov2), (low_rank_factor(cov2), cov1),
                        key=lambda pair: pair[0].shape[1])
    eigenvalues = scipy.linalg.eigvalsh(factor.T @ other @ factor) if factor.size else np.zeros(1)
    trace_of_root = np.sqrt(eigenvalues.clip(min=0)).sum()
    distance = np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * trace_of_root
    return max(float(distance), 0.0)  # equal arguments may round to just below zero


def low_rank_factor(covariance):
    """L [D,rank] with L L^T = covariance, by Cholesky with pivots: right for singular ones too."""
    cholesky, pivots, rank, _ = scipy.linalg.lapack.dpstrf(covariance, lower=1)
    factor = np.empty((len(covariance), rank))
    factor[pivots - 1] = np.tril(cholesky)[:, :rank]
    return factor


# ---- References in EDM's layout: an npz with mu [D] and sigma [D,D] ----


def read_reference(path, dimensions=None, **made):
    """mu [D], sigma [D,D] in float64; checked, and nothing unpickled.

    made: how the figures are; a file that says of itself that it was made otherwise is refused.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # a small file can claim to unpack to anything
            if sum(member.file_size for member in archive.infolist()) > 2 ** 30:
                raise ValueError("unpacks to more than 1 GiB")
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (np.asarray(file[key]) for key in ("mu", "sigma"))
            told = {key: file[key].item() for key in made if key in file.files}
        if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
            raise ValueError(f"mu is {mean.dtype}, sigma {covariance.dtype}, not floating point")
        if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
            raise ValueError(f"mu {mean.shape} and sigma {covariance.shape} do not fit together")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("holds values that are not finite")
        if not np.allclose(covariance, covariance.T, rtol=0, atol=1e-6 * abs(covariance).max()):
            raise ValueError("sigma is not symmetric")
        check_covariance(covariance.astype(np.float64))
    except Exception as error:  # zip, zlib and numpy raise many types
        raise UserError(f"{path}: not a reference with mu and sigma ({error})") from None
    if dimensions is not None and mean.size != dimensions:
        raise UserError(f"{path}: reference of {mean.size} dimensions, need {dimensions}: "
                        "it was made with another feature network")
    for key, value in told.items():
        if value != made[key]:
            raise UserError(f"{path} was made with --{key} {value}, these figures are of --{key} "
                            f"{made[key]}: make another one with fid.py")
    return mean.astype(np.float64), covariance.astype(np.float64)


def check_covariance(covariance):
    """Refuse eigenvalues below 0, but for rounding."""
    # No entry is above the largest eigenvalue. Where Cholesky gets through with so little added to
    # the diagonal, none is too far below 0; it takes a sixth of the time of computing them.
    rounding = 1e-6 * covariance.diagonal().max()
    if not scipy.linalg.lapack.dpotrf(covariance + rounding * np.eye(len(covariance)), lower=1)[1]:
        return
    least, most = scipy.linalg.eigvalsh(covariance)[[0, -1]]
    if least < -1e-6 * max(most, -least):
        raise ValueError(f"sigma is no covariance: it has the eigenvalue {least:.3g}, below 0")


def write_reference(path, mean, covariance, **made):
    write_arrays(path, mu=np.asarray(mean, np.float64), sigma=np.asarray(covariance, np.float64),
                 **made)


# ---- Companions ----


class InceptionScore:
    """exp(mean KL(p(y|x) || p(y))), arXiv:1606.03498, in each of `splits` consecutive parts.

    Images are known by index, so batches and ranks may come in any order. Published scores are of
    logits without the classifier's bias: add(indices, logits - network.logit_bias).
    """

    def __init__(self, images, classes=1008, splits=10, device="cpu"):
        self.images, self.splits = images, splits
        float64 = {"dtype": torch.float64, "device": device}
        self.n = torch.zeros(splits, **float64)
        self.negative_entropy = torch.zeros(splits, **float64)  # sum over x of sum_y p log p
        self.p = torch.zeros(splits, classes, **float64)

    def add(self, indices, logits):
        """indices [B] in 0..images-1, logits [B,classes]."""
        # Part i is images i * N // splits to (i + 1) * N // splits, as in the score's first code.
        number = torch.as_tensor(indices, device=self.p.device) + 1
        split = (number * self.splits - 1) // self.images
        log_p = logits.to(self.p).log_softmax(1)
        self.n.index_add_(0, split, torch.ones_like(split, dtype=torch.float64))
        self.negative_entropy.index_add_(0, split, (log_p.exp() * log_p).sum(1))
        self.p.index_add_(0, split, log_p.exp())

    def all_reduce(self):
        """Every rank ends with the sums of all ranks."""
        all_reduce((self.n, self.negative_entropy, self.p))

    def value(self):
        """Mean and standard deviation over the splits."""
        if (self.n == 0).any():
            raise UserError(f"an Inception score in {self.splits} splits needs at least "
                            f"{self.splits} images, got {int(self.n.sum())}")
        p = self.p / self.n[:, None]
        scores = (self.negative_entropy / self.n - torch.xlogy(p, p).sum(1)).exp()
        return scores.mean().item(), scores.std(correction=0).item()


BLOCK = 1024  # rows of features at a time: memory stays below 200 MB whatever the number of images


def precision_recall(real, fake, k=3):
    """Shares of fake features [N,D] on the real manifold, and of real ones on the fake manifold.

    arXiv:1904.06991: a manifold is the union of the balls around its points that reach to each
    point's k-th nearest neighbour.
    """
    for name, features in (("real", real), ("generated", fake)):
        if len(features) <= k:
            raise UserError(f"precision and recall with k = {k} need more than {k} images, "
                            f"got {len(features)} {name}")
    return _share_covered(fake, real, k), _share_covered(real, fake, k)


def _share_covered(points, centres, k):
    covered = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for block in centres.split(BLOCK):
        # The point itself is the nearest of all, hence k + 1
        nearest = torch.full((len(block), 0), 0.0, dtype=torch.float64, device=block.device)
        for others in centres.split(BLOCK):
            both = torch.cat([nearest, squared_distances(block, others)], 1)
            nearest = both.topk(min(k + 1, both.shape[1]), largest=False).values
        radius = nearest[:, -1:]
        covered |= torch.cat([(squared_distances(block, some) <= radius).any(0)
                              for some in points.split(BLOCK)])
    return covered.double().mean().item()


def squared_distances(a, b):
    """[len(a),len(b)] in float64, where the cancellation of this form does no harm."""
    a, b = a.double(), b.double()
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)


# ---- Command line ----


def parse(argv=None):
    parser = Parser(prog="fid.py", description="Make reference statistics of a set of images.")
    parser.add_argument("--data", help="digits, emoji, cifar10 (downloaded), an archive, folder or "
                                       "zip")
    parser.add_argument("--coco", metavar="FOLDER",
                        help="in place of --data: the pictures of COCO 2014 whose captions "
                             "evaluate.py --coco takes")
    parser.add_argument("--n", type=int, help="of its captions the first n, as evaluate.py has "
                                              "them (default: all)")
    parser.add_argument("--out", required=True, help="the npz to write: mu and sigma")
    parser.add_argument("--dataset", help="whose they are: 8x8 grey images of another name than "
                                          "digits are scored by Inception")
    parser.add_argument("--side", type=int, help="pictures of any size: their middle squares, by "
                                                 "Lanczos to so many pixels a side")
    parser.add_argument("--patch", action="store_true",
                        help="pictures of any size: the middle 299 pixels a side of each as they "
                             "are, for DMD2's patch FID")
    parser.add_argument("--resize", choices=("tf1", "clean"),
                        help="to Inception's 299: TensorFlow 1's, as EDM, or clean-fid's (default: "
                             "tf1; clean with --side or --patch)")
    parser.add_argument("--batch", type=int, default=64, help="images read at a time")
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cache", help="folder of downloaded weights")
    parser.add_argument("--inception", help="file with the Inception weights (default: downloaded)")
    parser.add_argument("--force", action="store_true", help="replace --out if it exists")
    args = parser.parse_args(argv)
    if bool(args.data) == bool(args.coco):
        raise UserError("give --data, or --coco: one of them")
    if args.n is not None and not args.coco:
        raise UserError("--n is for --coco; --data is taken whole")
    if args.coco and not (args.side or args.patch):
        raise UserError("--coco has pictures of many sizes: give --side or --patch")
    if Path(args.out).suffix != ".npz" or Path(args.out).is_dir():
        raise UserError(f"--out {args.out}: must be the name of an .npz file")
    if Path(args.out).exists() and not args.force:
        raise UserError(f"--out {args.out} exists; --force replaces it")
    if not Path(args.out).absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: no such folder")
    if args.patch and args.side:
        raise UserError("--patch takes the pictures as they are; leave out --side")
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: no CUDA device here; cpu works")
    return args


def main(argv=None):
    # This file is mathematics too, and imports no room.
    from images.captioned import PATCH, Pictures, check_side, coco_pictures, patch, square
    from images.real import open_images
    from metrics.judge import OWN, dataset_of, feature_network

    args = parse(argv)
    check_side(args.side)
    size, cut = (PATCH, patch) if args.patch else (args.side, square)
    images = (coco_pictures(args.coco, args.n, size, cut) if args.coco else
              Pictures(args.data, size, cut=cut) if size else open_images(args.data, args.cache))
    named = args.dataset or (args.data if args.data in OWN else None)
    dataset = dataset_of(images.shape, named, args.data or args.coco)
    resize = args.resize or ("clean" if size else "tf1")
    network = feature_network(dataset, args.cache, args.device, args.inception, resize)
    made = {} if dataset in OWN else {"resize": resize, "side": images.shape[-1]}
    batches = (batch for batch, _ in images.batches(args.batch))
    steps = -(-len(images) // args.batch)
    statistics = reference_statistics(network, progress(batches, desc="features", total=steps,
                                                        unit="batch"))
    write_reference(args.out, statistics.mean(), statistics.covariance(), **made)
    print(f"{args.out}: {len(images)} images, {network.dimensions} features of {network.name}")


if __name__ == "__main__":
    run(main)
