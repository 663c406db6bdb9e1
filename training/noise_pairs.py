"""The teacher's noise-image pairs for DMD's regression (DMD Sec. 3.3): made once, kept, mapped."""

import json
import shutil
import struct
import zipfile

import numpy as np
import torch
from tqdm import tqdm

from base import distributed
from weights.checkpoint import weights_digest, write_arrays, write_atomically
from base.errors import RunFailed, UserError
from models import sample_heun, sample_seeds

# A part is what an interruption can cost and what one rank may wait for: at most so many pairs,
# and about so many evaluations of the teacher.
PAIRS_PART, PART_EVALUATIONS = 1024, 32_768
FIRST_SEED = 10 ** 9            # the seeds from 0 on are those that a student is scored at
PAIR = ("z", "y", "classes")
ALIGNED = 64                                        # bytes, as numpy's own headers are


def noise_image_pairs(teacher, count, steps, folder, batch, device, stop):
    """z [N,C,H,W] and images y [N,C,H,W] float16, classes [N]: made once, kept in pairs.npz.

    Pair i comes from seed FIRST_SEED + i. The ranks share the parts, which survive an interruption.
    """
    path, parts = folder / "pairs.npz", folder / "pairs"
    made_by = weights_digest(teacher.state_dict())[:12]
    about = np.array(json.dumps(dict(count=count, steps=steps, teacher=made_by,
                                     first_seed=FIRST_SEED)))
    if not path.exists():
        make_folder(parts)
        size = min(PAIRS_PART, max(1, PART_EVALUATIONS // (2 * steps - 1)))
        ranges = [range(s, min(s + size, count)) for s in range(0, count, size)]
        files = {pairs: parts / f"{pairs[0]}-{pairs[-1]}-{FIRST_SEED}-{steps}-{made_by}.npz"
                 for pairs in ranges}
        mine = [pairs for pairs in ranges[distributed.rank()::distributed.world_size()]
                if not files[pairs].exists()]
        for pairs in tqdm(mine, desc="noise-image pairs", unit="part",
                          disable=distributed.rank() > 0):
            make_part(teacher, pairs, steps, files[pairs], batch, device)
            if stop.received:
                print(f"{stop.received}: the pairs made so far are kept; the same command goes on",
                      flush=True)
                raise SystemExit(3)
        distributed.barrier()
        if distributed.rank() == 0:
            join_parts(path, about, list(files.values()), count)
        distributed.barrier()
    if distributed.rank() == 0:
        shutil.rmtree(parts, ignore_errors=True)
    made_as = read_npz(path, ("about",))["about"]
    if str(made_as) != str(about):
        raise UserError(f"{path} was made with {made_as}, this run wants {about}; "
                        "move it away to make new pairs")
    return tuple(map(torch.from_numpy, map_npz(path, PAIR, verify=distributed.rank() == 0)))


def make_folder(path):
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise RunFailed(f"cannot make {path}: {error.strerror}") from error


def make_part(teacher, pairs, steps, path, batch, device):
    z, y, classes = [], [], []

    def sampler(network, noise_input, labels, noise):
        z.append(noise_input.cpu().numpy())
        return sample_heun(network, noise_input, labels, steps=steps)

    for start in range(0, len(pairs), batch):
        chunk = [FIRST_SEED + pair for pair in pairs[start:start + batch]]
        images, label = sample_seeds(teacher, chunk, sampler, device=device)
        y.append(images.cpu().half().numpy())
        classes.append(np.zeros(len(chunk), np.int64) if label is None else label.cpu().numpy())
    write_arrays(path, z=np.concatenate(z), y=np.concatenate(y), classes=np.concatenate(classes))


def join_parts(path, about, files, count):
    """pairs.npz of the parts, one part in memory at a time; its arrays begin at whole words."""
    def member(archive, name):
        info = zipfile.ZipInfo(f"{name}.npy")
        begin = archive.fp.tell() + 30 + len(info.filename) + 20 + 4    # zip64's field, then ours
        padding = -begin % ALIGNED
        info.extra = struct.pack("<HH", 0xD935, padding) + bytes(padding)
        return archive.open(info, "w", force_zip64=True)

    def write(temporary):
        with zipfile.ZipFile(temporary, "w") as archive:
            with member(archive, "about") as file:
                np.lib.format.write_array(file, about, allow_pickle=False)
            for name in PAIR:
                parts = (read_npz(path, (name,))[name] for path in files)
                with member(archive, name) as file:
                    for number, part in enumerate(parts):
                        if number == 0:
                            head = np.lib.format.header_data_from_array_1_0(part)
                            np.lib.format.write_array_header_1_0(
                                file, head | {"shape": (count, *part.shape[1:])})
                        file.write(part.tobytes())

    write_atomically(path, write)


def map_npz(path, names, verify):
    """Arrays of an npz without compression, mapped: what is not looked at costs no memory."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            for name in names if verify else ():
                with archive.open(f"{name}.npy") as member:
                    while member.read(1 << 22):             # its end compares the checksum
                        pass
            return [map_member(file, archive.getinfo(f"{name}.npy")) for name in names]
    except Exception as error:              # numpy, zipfile and zlib raise many types
        raise damaged_npz(path, error) from error


def map_member(file, info):
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    file.seek(info.header_offset)
    name, extra = struct.unpack("<26x2H", file.read(30))
    begin = file.seek(name + extra, 1)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{info.filename} is of an unknown version")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError(f"{info.filename} holds objects")
    start = file.tell()
    mapped = np.memmap(file, dtype, "c", start, shape, "F" if fortran else "C")
    if start - begin + mapped.nbytes != info.file_size:
        raise ValueError(f"{info.filename} has {info.file_size} bytes")
    return mapped if mapped.flags.aligned else np.array(mapped)     # of an older version


def read_npz(path, names):
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except Exception as error:              # numpy, zipfile and zlib raise many types
        raise damaged_npz(path, error) from error


def damaged_npz(path, error):
    return UserError(f"{path} is damaged ({error}); move it away, it will be made again")
