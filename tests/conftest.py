"""Tests import the scripts from the repository's root, whatever folder pytest starts in."""

import gc
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                    # several test processes may share two cores

from training import log  # noqa: E402

LONGEST = ("test_sharded.py", "test_train.py", "test_faults.py", "test_text_command.py",
           "test_own.py", "test_recipes.py", "test_bench.py", "test_pretrained.py",
           "test_sample.py", "test_cifar10_command.py", "test_fid.py", "test_lora.py",
           "test_text_to_image.py", "test_tables.py", "test_trace.py", "test_text_teacher.py",
           "test_fuzz.py")


def pytest_collection_modifyitems(items):
    """The longest files first, so that no process waits for another at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name)
               if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish():
    """What is loaded by now stays: it need not be looked through for garbage again and again."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def few_pictures():
    """A run that ends draws its curves: a second or more of matplotlib, of which one test knows.
    Its grids of samples have one column: of a teacher, 80 images of 35 passes take a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "draw_curves", lambda lines, path: None)
        patch.setattr(log, "COLUMNS", 1)
        patch.setenv("PYTHONPATH", str(ROOT / "tests" / "without"))
        yield
