"""The command of the README for CIFAR-10, whole: published files over HTTP, torchrun, FID."""

import functools
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from edm_networks import EDMPrecond
from fid import read_reference, write_reference
from hostile_pickles import network_pickle
from metrics.inception import Inception
from presets.datasets import CIFAR10
from training import run_folder
from weights import checkpoint

ROOT = Path(__file__).resolve().parents[1]
SMALL = CIFAR10.network | {"model_channels": 8, "num_blocks": 1}          # DDPM++ at 32x32, RGB


@pytest.fixture
def published(tmp_path):
    """A server with a teacher pickle and an FID reference; Inception's weights put by hand."""
    folder = tmp_path / "published"
    folder.mkdir()
    torch.manual_seed(0)
    teacher = EDMPrecond(**SMALL)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    config = {k: v for k, v in teacher.config.items() if k != "attn_resolutions"}
    state = teacher.state_dict()
    pickled = network_pickle(config, state, 4)
    (folder / "edm-cifar10-32x32-cond-vp.pkl").write_bytes(pickled)
    root = np.random.default_rng(0).standard_normal((2048, 2048)) / 45
    write_reference(folder / "cifar10-32x32.npz", np.full(2048, 0.4), root @ root.T)
    torch.save(Inception().state_dict(), tmp_path / "inception.pth")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *args: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", state
    server.shutdown()


def torchrun(mirror, tmp_path, *argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "train.py"), "--dataset", "cifar10", *argv,
               "--cache", str(tmp_path / "cache"), "--inception", str(tmp_path / "inception.pth"),
               "--batch", "4", "--iterations", "2", "--evaluate-images", "6"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240,
                          env=os.environ | {"PMDD_MIRROR": mirror, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_stage_two_of_cifar10_runs_from_the_published_files(published, tmp_path):
    mirror, teacher = published
    torchrun(mirror, tmp_path, "--stage", "1")
    out = torchrun(mirror, tmp_path, "--stage", "2")
    assert "FID@1" in out and "FID@2" in out and "digits" not in out
    folder = tmp_path / "runs" / "cifar10-pmdd" / "stage2"
    saved = checkpoint.load(folder / "latest.pt")
    assert saved["iteration"] == 2 and saved["network"]["img_resolution"] == 32
    assert saved["sigmas"] == pytest.approx([80, 2.515219], rel=1e-6)
    fids = {k: v for line in run_folder.read_metrics(folder / "metrics.jsonl")
            for k, v in line.items() if k.startswith("FID@")}
    assert set(fids) == {"FID@1", "FID@2"} and all(v > 0 for v in fids.values())
    first = checkpoint.load(tmp_path / "runs" / "cifar10-pmdd" / "stage1" / "best.pt")
    latest = checkpoint.load(tmp_path / "runs" / "cifar10-pmdd" / "stage1" / "latest.pt")
    moved = [(latest["student"][k] - v).abs().max() for k, v in teacher.items()]
    assert 0 < max(moved) < 1e-3                            # it started from the published teacher
    assert set(first["ema"]) == set(teacher)
    mean, _ = read_reference(tmp_path / "cache" / "cifar10-32x32.npz", 2048)
    assert mean[0] == 0.4
