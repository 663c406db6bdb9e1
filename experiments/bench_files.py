"""What a benchmark runs on: random weights and images in the formats of real ones."""

import dataclasses
import io
import json
import tarfile
import zipfile
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from base import distributed
from edm_networks import EDMPrecond
from presets.config import Config, Preset
from presets.datasets import CIFAR10
from training.options import Options
from weights import checkpoint


@dataclass
class Job:
    preset: Preset
    config: Config
    options: Options
    device: torch.device
    network: dict               # the architecture


def make_job(folder, width, stage, device):
    """The stage as a run that begins with files of random weights, and never evaluates."""
    preset, config, options = stage
    network = options.network | ({"model_channels": width} if width else {})
    if config.teacher == CIFAR10.unconditional:
        network = network | {"label_dim": 0}
    (folder / "run").mkdir(exist_ok=True)
    teacher, start, images = folder / "teacher.pt", folder / "start.pt", folder / "images"
    begins = config.start_from or (config.method == "pmdd" and config.stage > 1)
    if distributed.rank() == 0:
        weights = [random_weights(network, seed) for seed in (0, 1, 2)]
        about = {"dataset": config.dataset, "network": EDMPrecond(**network).config, "fid": {},
                 "iteration": 0, "method": config.method, "stage": config.stage}
        checkpoint.save(teacher, about | {"sigmas": [], "ema": weights[0]})
        if begins:
            checkpoint.save(start, about | {"sigmas": list(config.sigmas[:-1]), "ema": weights[1],
                                            "adapted": weights[2]})
        if config.dataset != "digits" and (config.gan_weight or config.stage == 0):
            write_images(images, config.dataset, network)
    distributed.barrier()
    config = dataclasses.replace(
        config, teacher=str(teacher), start_from=str(start) if begins else "", evaluate_every=0,
        regression_pairs=min(config.regression_pairs, 2 * config.batch), regression_steps=1)
    if images.exists() and options.data == config.dataset:
        options = dataclasses.replace(options, data=str(images))
    return Job(preset, config, dataclasses.replace(options, folder=folder / "run"), device, network)


def random_weights(network, seed):
    """Weights as a new teacher's, moved a little so that no two networks agree."""
    torch.manual_seed(seed)
    weights = EDMPrecond(**network).state_dict()
    return {k: v + 1e-3 * torch.randn_like(v) for k, v in weights.items()}


def write_images(path, dataset, network, count=256):
    """CIFAR-10's archive, or a zip in EDM's layout."""
    size, rng = network["img_resolution"], np.random.default_rng(0)
    shape = (size, size, 3) if network["img_channels"] == 3 else (size, size)
    pixels = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    labels = rng.integers(0, network["label_dim"] or 10, count)
    if dataset == "cifar10":
        records = np.concatenate([labels[:, None].astype(np.uint8), pixels.reshape(count, -1)], 1)
        member = tarfile.TarInfo("data_batch_1.bin")
        member.size = records.size
        with tarfile.open(path, "w:gz") as archive:
            archive.addfile(member, io.BytesIO(records.tobytes()))
        return
    with zipfile.ZipFile(path, "w") as archive:
        names = [f"{number:05d}.png" for number in range(count)]
        archive.writestr("dataset.json", json.dumps({"labels": list(zip(names, labels.tolist()))}))
        for name, image in zip(names, pixels):
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, "PNG")
            archive.writestr(name, encoded.getvalue())
