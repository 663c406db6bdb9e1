"""What tests of the command lines share: stand-ins for trained networks, and ways to call."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from base import errors
from edm_networks import EDMPrecond
from metrics.inception import RESIZES, ConvNorm, Inception
from presets.datasets import DIGITS, PMDD_SIGMAS
from weights import checkpoint

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"


def small_network(seed=0, **changes):
    """Random weights, but none so small that a layer could be left out unnoticed."""
    torch.manual_seed(seed)
    network = EDMPrecond(**(DIGITS.network | {"model_channels": 16} | changes))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return network.eval()


def save_student(path, steps=3, dataset="digits", seed=0, **changes):
    """A checkpoint of a student; of a teacher with steps=0. Returns the network."""
    network = small_network(seed, **changes)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, {
        "dataset": dataset, "method": "pmdd", "stage": steps, "iteration": 10, "fid": {},
        "sigmas": list(PMDD_SIGMAS[:steps]), "network": network.config,
        "ema": network.state_dict()})
    return network


def golden_weights(golden, scaled):
    """Those for which golden values hold: scaled(key, the key's own normal numbers) of each key."""
    return {key: torch.from_numpy(scaled(key, np.random.RandomState(
        zlib.crc32(key.encode())).standard_normal(shape)).astype(np.float32))
        for key, shape in json.loads(str(golden["state_dict_shapes"])).items()}


def call(monkeypatch, script, *args):
    """The exit code of a script's main() with these arguments, as the shell would see it."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        errors.run(script.main)
    return stopped.value.code or 0


def torchrun(processes, script, *args, cwd):
    """The user's real command on several processes; returns what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
               "--standalone", str(ROOT / script), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_ranks(processes, script, *args, cwd, code=0):
    """A script's main() on several processes, as torchrun starts them, but forks of this one: they
    need not load every library again, and have what a test has patched. All exit with this code,
    or as they like with None."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank):
        os.chdir(cwd)
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes,
                "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in told.items()})
        sys.argv = [f"{script.__name__}.py", *map(str, args)]
        errors.run(script.main)                         # ends in SystemExit

    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=one, args=[rank], daemon=True) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    codes = [process.exitcode for process in started]
    assert code is None or codes == [code] * processes
    return codes


class ShallowInception(Inception):
    """In Inception's place where many figures are made: two layers that see all of the resized
    picture. Its files, passes and folding are Inception's own."""

    dimensions = 8 * 4 * 4

    def __init__(self, resize="tf1"):
        torch.nn.Module.__init__(self)
        self.resize = RESIZES[resize]
        self.first, self.second = ConvNorm(3, 8, 3, stride=2), ConvNorm(8, 8, 3, stride=2)
        self.fc = torch.nn.Linear(self.dimensions, self.classes)
        self.eval().requires_grad_(False)

    def _chunk(self, images):
        x = (self.resize(images.to(self.fc.weight.dtype)) - 128) / 128
        x = self.second(self.first(x.expand(-1, 3, -1, -1)))
        features = F.adaptive_avg_pool2d(x, 4).flatten(1)
        return features, self.fc(features)
