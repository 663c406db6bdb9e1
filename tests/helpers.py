"""What tests of the command lines share: stand-ins for trained networks, and ways to call."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from base import errors
from edm_networks import EDMPrecond
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
