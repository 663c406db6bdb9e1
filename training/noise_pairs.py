"""The teacher's noise-image pairs for DMD's regression (DMD Sec. 3.3)."""

import numpy as np

from base.files import lines_digest
from images.from_seeds import heun
from models import Guided, sample_seeds
from training.kept import made_once

# A part is what an interruption can cost and what one rank may wait for: at most so many pairs,
# and about so many evaluations of the teacher.
PAIRS_PART, PART_EVALUATIONS = 1024, 32_768
FIRST_SEED = 10 ** 9            # the seeds from 0 on are those that a student is scored at


def noise_image_pairs(teacher, digest, count, steps, folder, batch, device, stop):
    """z, image in float16 and class, or prompt, of each; pair i comes from seed FIRST_SEED + i.
    digest: of the teacher's weights, before any were stored in bf16."""
    fields = [("z", np.float32, teacher.shape), ("image", np.float16, teacher.shape),
              ("index", np.int64)]
    about = dict(count=count, steps=steps, first_seed=FIRST_SEED, teacher=digest[:12])
    if isinstance(teacher, Guided):
        about["guidance"] = teacher.weight
    if texts := teacher.conditions.texts:
        about["prompts"] = lines_digest(texts)[:12]

    def make(part):
        rows = np.zeros(len(part), fields)
        for start in range(0, len(part), batch):
            make_pairs(rows[start:start + batch], part[start:start + batch], teacher, steps, device)
        return rows

    size = min(PAIRS_PART, max(1, PART_EVALUATIONS // (2 * steps - 1)))
    return made_once(folder / "pairs", about, count, size, make, "noise-image pairs", stop)


def make_pairs(rows, numbers, teacher, steps, device):
    def sampler(network, z, *inputs):
        rows["z"] = z.cpu().numpy()
        return heun(steps)(network, z, *inputs)

    seeds = [FIRST_SEED + number for number in numbers]
    (images,), index = sample_seeds(teacher, seeds, sampler, device=device)
    rows["image"] = images.cpu().half().numpy()
    if index is not None:
        rows["index"] = index.cpu().numpy()
