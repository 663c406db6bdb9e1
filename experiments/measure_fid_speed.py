"""Speed of inception.py against torch-fidelity, and of the Frechet distance against scipy's sqrtm.

    OMP_NUM_THREADS=2 python -m experiments.measure_fid_speed      writes results/fid-speed.json

torch-fidelity is needed for this only: pip install --no-deps torch-fidelity
"""

import importlib.util
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest.mock import MagicMock

import numpy as np
import scipy
import torch

from base.errors import Parser, UserError, run
from base.files import ROOT, write_json
from fid import frechet_distance
from metrics.inception import Inception

THREADS, BATCH, BATCHES, ROUNDS, DIMENSIONS = 2, 32, 2, 5, 2048


def torch_fidelity_network(weights):
    """Its Inception with the same weights, which it takes as a file."""
    if importlib.util.find_spec("torchvision") is None:  # only other parts of the package need it
        for part in ("", ".datasets", ".transforms", ".transforms.functional"):
            sys.modules["torchvision" + part] = MagicMock()
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(f"this measurement needs torch-fidelity ({error}): "
                        "pip install --no-deps torch-fidelity") from None
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(weights, file.name)
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"],
                                           feature_extractor_weights_path=file.name).eval()


def seconds(function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


@torch.no_grad()
def inception_speed():
    ours = Inception()
    theirs = torch_fidelity_network(ours.state_dict())
    ours.fold()
    rng = torch.Generator().manual_seed(0)
    batches = torch.randint(0, 256, (BATCHES, BATCH, 3, 32, 32), dtype=torch.uint8, generator=rng)
    networks = {"ours": ours, "torch_fidelity": theirs}
    features = {name: network(batches[0])[0] for name, network in networks.items()}  # warm-up
    times = {name: [] for name in networks}
    for _ in range(ROUNDS):  # in turns, so that other load on the machine meets both
        for name, network in networks.items():
            times[name].append(seconds(lambda n=network: [n(batch) for batch in batches])[0])
    rates = {name: [round(BATCH * BATCHES / t, 2) for t in ts] for name, ts in times.items()}
    difference = (features["ours"] - features["torch_fidelity"]).norm() / features["ours"].norm()
    return {"batch": BATCH, "size": [32, 32], "threads": THREADS, "images_per_second": rates,
            "median": {name: median(rate) for name, rate in rates.items()},
            "ratio_of_medians": round(median(rates["ours"]) / median(rates["torch_fidelity"]), 2),
            "relative_difference_of_features": float(difference)}


def frechet_speed():
    rng = np.random.default_rng(0)
    scale = np.logspace(0, -1.5, DIMENSIONS)
    cov1, cov2 = (np.cov((rng.standard_normal((n, DIMENSIONS)) * scale).T) for n in (4000, 3000))
    mean1, mean2 = 0.1 * rng.standard_normal((2, DIMENSIONS))
    times, (slow, root) = [], seconds(scipy.linalg.sqrtm, cov1 @ cov2)
    wanted = np.square(mean1 - mean2).sum() + np.trace(cov1 + cov2 - 2 * root.real)
    for _ in range(ROUNDS):
        elapsed, distance = seconds(frechet_distance, mean1, cov1, mean2, cov2)
        times.append(round(elapsed, 3))
    return {"dimensions": DIMENSIONS, "threads": THREADS, "sqrtm_seconds": round(slow, 2),
            "ours_seconds": times, "ratio": round(slow / median(times), 1),
            "relative_difference": abs(distance / wanted - 1)}


def main():
    Parser(prog="experiments.measure_fid_speed", description=__doc__).parse_args()
    if os.environ.get("OMP_NUM_THREADS") != str(THREADS):
        raise UserError(f"set OMP_NUM_THREADS={THREADS}, so that both sides have the same threads")
    torch.set_num_threads(THREADS)
    report = {"command": f"OMP_NUM_THREADS={THREADS} python -m experiments.{Path(__file__).stem}",
              "python": platform.python_version(), "torch": torch.__version__,
              "numpy": np.__version__, "scipy": scipy.__version__, "machine": platform.machine(),
              "load_before": os.getloadavg()[0],  # other work on the machine, if above 0
              "inception": inception_speed(), "frechet": frechet_speed()}
    from torch_fidelity import __version__
    report["torch_fidelity"] = __version__
    write_json(ROOT / "results" / "fid-speed.json", report)


if __name__ == "__main__":
    run(main)
