"""The teacher's noise-image pairs for DMD's regression (DMD Sec. 3.3): made once, kept, mapped."""

import hashlib
import io

import numpy as np
import torch

from base import distributed
from base.errors import RunFailed, UserError
from base.files import file_digest, read_json, write_atomically, write_json
from base.progress import progress
from images.from_seeds import heun
from models import sample_seeds
from weights.checkpoint import weights_digest

# A part is what an interruption can cost and what one rank may wait for: at most so many pairs,
# and about so many evaluations of the teacher.
PAIRS_PART, PART_EVALUATIONS = 1024, 32_768
FIRST_SEED = 10 ** 9            # the seeds from 0 on are those that a student is scored at


class Pairs:
    """The parts' .npy files, mapped: what is not looked at costs no memory."""

    def __init__(self, parts, size):
        self.parts, self.size = parts, size

    def __len__(self):
        return sum(map(len, self.parts))

    def take(self, indices):
        """z [B,C,H,W], image [B,C,H,W] float16, class int64 [B]."""
        rows = np.stack([self.parts[i // self.size][i % self.size] for i in indices])
        return tuple(torch.from_numpy(rows[name].copy()) for name in ("z", "image", "class"))


def noise_image_pairs(teacher, count, steps, folder, batch, device, stop):
    """Pair i comes from seed FIRST_SEED + i. The ranks share the parts, which survive a stop."""
    folder, size = folder / "pairs", min(PAIRS_PART, max(1, PART_EVALUATIONS // (2 * steps - 1)))
    about = dict(count=count, steps=steps, first_seed=FIRST_SEED, part=size,
                 teacher=weights_digest(teacher.state_dict())[:12])
    if distributed.rank() == 0:
        begin(folder, about)
    distributed.barrier()
    parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
    mine = [part for part in parts[distributed.rank()::distributed.world_size()]
            if not files_of(folder, part)]
    for part in progress(mine, desc="noise-image pairs", unit="part"):
        make_part(teacher, part, steps, folder, batch, device)
        if stop.received:
            print(f"{stop.received}: the pairs made so far are kept; the same command goes on",
                  flush=True)
            raise SystemExit(3)
    distributed.barrier()
    return Pairs([open_part(folder, part) for part in parts], size)


def begin(folder, about):
    """Make the folder, or refuse one whose pairs another run would want otherwise."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise RunFailed(f"cannot make {folder}: {error.strerror}") from error
    path = folder / "about.json"
    if not path.exists():
        write_json(path, about)
    elif (made_as := read_json(path)) != about:
        raise UserError(f"{folder} was made with {made_as}, this run wants {about}; move it away "
                        "to make new pairs")


def files_of(folder, part):
    return list(folder.glob(f"{part[0]}-{part[-1]}-*.npy"))


def make_part(teacher, part, steps, folder, batch, device):
    """One file, whose name ends with the hash of its content."""
    rows = np.zeros(len(part), [("z", np.float32, teacher.shape),
                                ("image", np.float16, teacher.shape), ("class", np.int64)])
    for start in range(0, len(part), batch):
        chunk = rows[start:start + batch]
        seeds = [FIRST_SEED + pair for pair in part[start:start + batch]]

        def sampler(network, z, *inputs, chunk=chunk):
            chunk["z"] = z.cpu().numpy()
            return heun(steps)(network, z, *inputs)

        (images,), classes = sample_seeds(teacher, seeds, sampler, device=device)
        chunk["image"] = images.cpu().half().numpy()
        if classes is not None:
            chunk["class"] = classes.cpu().numpy()
    content = io.BytesIO()
    np.save(content, rows)
    digest = hashlib.sha256(content.getvalue()).hexdigest()[:16]
    write_atomically(folder / f"{part[0]}-{part[-1]}-{digest}.npy",
                     lambda temporary: temporary.write_bytes(content.getvalue()))


def open_part(folder, part):
    path, *_ = files_of(folder, part)
    whole = distributed.rank() > 0 or file_digest(path)[:16] == path.stem.rpartition("-")[2]
    try:
        if not whole:
            raise ValueError("its hash is not that of its name")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); move it away, it will be made "
                        "again") from None
