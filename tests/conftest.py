"""Tests import the scripts from the repository's root, whatever folder pytest starts in."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)                    # several test processes may share two cores
