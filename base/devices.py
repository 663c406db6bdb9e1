"""What a device computes with: precision, compiled kernels, memory that is kept."""

import contextlib
import ctypes
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint


def set_precision(precision):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"


@contextlib.contextmanager
def full_precision(device):
    """Float32 proper, whatever autocast or TF32 the caller's training runs in."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        # A plan computes on meta, which has no autocast.
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            yield
    finally:
        for backend, allowed in zip(backends, before):
            backend.allow_tf32 = allowed


def compile_network(network, **how):
    """All networks are one class, whose graphs torch counts together: one for each role, kind of
    gradient and batch, and beyond this limit it would silently stop compiling."""
    torch._dynamo.config.cache_size_limit = 64          # recompile_limit by its older name
    network.compile(**how)


def recompute(blocks, **how):
    """What is inside of a block is not kept for its backward pass, but computed again, bit for bit.
    After this a block cannot be copied: its copy would compute with the weights of the first."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **how)


def keep_freed_memory():
    """glibc gives freed memory back to the system, and each iteration takes it anew, page by page.

    Its two limits are set as high as it lets them; other C libraries have no such call.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL("libc.so.6").mallopt, -1, -3
        mallopt(mmap_threshold, 32 * 2 ** 20)
        mallopt(trim_threshold, 2 ** 31 - 1)
