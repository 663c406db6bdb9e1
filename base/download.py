"""Published files: where they are, and how they come into the cache folder, verified.

Nothing takes a file's final name before it has passed every check, and two processes may ask for
the same file at once.
"""

import contextlib
import fcntl
import os
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import requests
from tqdm import tqdm

from base.errors import DISK, RunFailed, UserError
from base.files import file_digest, write_atomically

TIMEOUT = 20.0                # seconds without a connection or without data

EDM_LICENCE = "CC BY-NC-SA 4.0 (no commercial use), NVIDIA, EDM"


@dataclass(frozen=True)
class PublishedFile:
    name: str                 # in the cache folder, as published
    urls: tuple               # mirrors of the same file
    licence: str
    size: int | None = None
    sha256: str | None = None  # whole or its beginning; none published: recorded at first use
    md5: str | None = None


def _published_files():
    edm, github = "https://nvlabs-fi-cdn.nvidia.com/edm", "https://github.com"
    lpips = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master"
    sha256 = {"edm-cifar10-32x32-uncond-vp":
              "4d5dcc1f1d0d41c8934ad21626eeddbdc0460182becf9fc059a0631b1eedb4da"}
    teachers = [f"edm-{data}-{kind}" for kind in ("vp", "ve") for data in (
        "cifar10-32x32-cond", "cifar10-32x32-uncond", "ffhq-64x64-uncond", "afhqv2-64x64-uncond")]
    files = {name: PublishedFile(f"{name}.pkl", (f"{edm}/pretrained/{name}.pkl",), EDM_LICENCE,
                                 sha256=sha256.get(name))
             for name in [*teachers, "edm-imagenet-64x64-cond-adm"]}
    for data in ("cifar10-32x32", "imagenet-64x64", "ffhq-64x64", "afhqv2-64x64"):
        files[f"fid-{data}"] = PublishedFile(
            f"{data}.npz", (f"{edm}/fid-refs/{data}.npz",), EDM_LICENCE)
    inception = "inception-2015-12-05-6726825d.pth"
    files["inception-2015-12-05"] = PublishedFile(
        f"weights-{inception}",
        (f"{github}/toshas/torch-fidelity/releases/download/v0.2.0/weights-{inception}",
         f"{github}/mseitzer/pytorch-fid/releases/download/fid_weights/pt_{inception}"),
        "Apache 2.0, Google, Inception-v3", size=95_628_359,
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")
    files["cifar10"] = PublishedFile(
        "cifar-10-binary.tar.gz", ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
        "none stated; cite Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images",
        size=170_052_171, md5="c32a1d4ab5d03f1284b67883e8d87530")
    files["vgg16"] = PublishedFile(
        "vgg16-397923af.pth", ("https://download.pytorch.org/models/vgg16-397923af.pth",),
        "BSD-3-Clause, torchvision", sha256="397923af")
    files["lpips-vgg"] = PublishedFile(
        "vgg.pth", (f"{lpips}/lpips/weights/v0.1/vgg.pth",), "BSD-2-Clause, Zhang et al., LPIPS")
    return files


PUBLISHED = _published_files()


class _Refused(Exception):
    """Why an address or a file is no good; fetch() turns it into a UserError."""


def cache_folder(flag=None):
    """Where published files are kept: the flag, else $PMDD_CACHE, else ~/.cache/pmdd."""
    return Path(flag or os.environ.get("PMDD_CACHE") or "~/.cache/pmdd").expanduser()


def fetch(name, cache=None):
    """Path of a published file, verified; downloaded if it is not in the cache folder."""
    return fetch_with_digest(name, cache)[0]


def fetch_with_digest(name, cache):
    """(path, sha256) of a published file."""
    if name not in PUBLISHED:
        raise UserError(f"{name!r} is no published file; known: {', '.join(PUBLISHED)}")
    entry, folder = PUBLISHED[name], cache_folder(cache)
    path = folder / entry.name
    try:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with open(f"{path}.lock", "w") as lock:
                with contextlib.suppress(OSError):      # without locks each process brings its own
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.is_file():  # else another process brought it while this one waited
                    return path, _download(entry, path)
        return path, _verify(entry, path, path)
    except _Refused as reason:
        raise UserError(f"{path}: {reason}; {_set_aside(path)}. Run again to download it from "
                        f"{_urls(entry)[0]}, or put the right file at {path}") from None
    except OSError as error:
        kind = RunFailed if error.errno in DISK else UserError
        raise kind(f"{path}: {error.strerror or error}; it is published at "
                   f"{_urls(entry)[0]}") from None


def _set_aside(path):
    try:
        return f"moved to {path.replace(f'{path}.rejected')}"
    except OSError as error:
        return f"it could not be moved aside ({error.strerror})"


def _urls(entry):
    mirror = os.environ.get("PMDD_MIRROR")
    return (f"{mirror.rstrip('/')}/{entry.name}",) if mirror else entry.urls


def _download(entry, path):
    """Bring the file to its final name, or leave that name free; returns its sha256."""
    print(f"downloading {entry.name} (licence: {entry.licence})", file=sys.stderr)
    partial, reasons = Path(f"{path}.partial"), []
    for url in _urls(entry):
        try:
            _receive(url, entry, partial)
            try:
                digest = _verify(entry, partial, path)
            except _Refused:
                partial.unlink()
                raise
        except _Refused as reason:
            reasons.append(f"{url}: {reason}")
        else:
            os.replace(partial, path)
            Path(f"{partial}.tag").unlink(missing_ok=True)
            return digest
    raise UserError(f"{entry.name} could not be downloaded: {'; '.join(reasons)}. "
                    f"Run again, or fetch it by hand and put it at {path}")


def _receive(url, entry, partial):
    """Append what the partial file lacks, or start afresh where appending is not safe."""
    tag_file = Path(f"{partial}.tag")  # the server's name for the version that was begun
    tag = tag_file.read_text() if tag_file.exists() else ""
    have = partial.stat().st_size if partial.exists() else 0
    if not (tag or entry.sha256 or entry.md5):
        have = 0  # nothing would notice two versions of the file in one
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": tag} if tag else {})
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            status = answer.status_code
            if have and status in (206, 416) and not _continues(answer, have, tag):
                partial.unlink()
                return _receive(url, entry, partial)
            if status != 200 and not (have and status == 206):
                raise _Refused(f"HTTP {status} {answer.reason}")
            if "text/html" in answer.headers.get("Content-Type", ""):
                raise _Refused("an HTML page instead of the file")
            if status == 200:
                have = 0
                partial.unlink(missing_ok=True)  # first: an old part must never meet a new tag
            tag_file.write_text(_tag(answer))
            _write_body(answer, entry, partial, have)
    except requests.RequestException as error:
        raise _Refused(_reason(error)) from None


def _tag(answer):
    tag = answer.headers.get("ETag", "")
    return answer.headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag


def _continues(answer, have, tag):
    """Whether the answer is the rest, from byte `have` on, of the version that was begun."""
    starts = answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    return answer.status_code == 206 and starts and (not tag or _tag(answer) == tag)


def _write_body(answer, entry, partial, have):
    length = answer.headers.get("Content-Length", "")
    total = have + int(length) if length.isdecimal() else None
    if entry.size and total not in (None, entry.size):
        raise _Refused(f"the server offers {total} bytes, not {entry.size}")
    if total is None and not (entry.sha256 or entry.md5 or "Transfer-Encoding" in answer.headers):
        raise _Refused("the server does not say how long the file is, and no hash is published")
    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=entry.name, disable=None)
    with open(partial, "ab" if have else "wb") as file, bar:
        for chunk in answer.iter_content(1 << 16):
            file.write(chunk)
            bar.update(len(chunk))
            if entry.size and file.tell() > entry.size:
                raise _Refused(f"more than the {entry.size} bytes that the file has")
        file.flush()
        os.fsync(file.fileno())
        if total is not None and file.tell() != total:
            raise _Refused(f"the body ended after {file.tell()} of {total} bytes")


def _reason(error):
    text = " ".join(str(error).split())
    if "timed out" in text:
        return f"no connection or no data for {TIMEOUT:g} s"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the body ended early"
    return f"{type(error).__name__}: {text[-120:]}"


def _verify(entry, path, final):
    """The file's sha256, if it is the published file; else _Refused."""
    size = path.stat().st_size
    if entry.size and size != entry.size:
        raise _Refused(f"{size} bytes, not {entry.size}")
    with open(path, "rb") as file:
        head = file.read(512)
        file.seek(max(0, size - 1))
        end = file.read(1)
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise _Refused("an HTML page instead of the file")
    if entry.name.endswith(".pkl") and not (head[:1] == b"\x80" and end == b"."):
        raise _Refused("not a whole pickle")
    if entry.name.endswith(".npz") and not zipfile.is_zipfile(path):
        raise _Refused("not a whole npz file")
    if entry.md5 and file_digest(path, "md5") != entry.md5:
        raise _Refused(f"its md5 is not {entry.md5}")
    digest = file_digest(path)
    if not digest.startswith(entry.sha256 or ""):
        raise _Refused(f"its sha256 begins {digest[:16]}, not {entry.sha256[:16]}")
    _compare_with_first_use(digest, Path(f"{final}.sha256"))
    return digest


def _compare_with_first_use(digest, record):
    known = record.read_text().split()[:1] if record.exists() else []
    if known and known != [digest]:
        raise _Refused(f"its sha256 begins {digest[:16]}, but at first use it was {known[0][:16]} "
                       f"(delete {record} if you expect the change)")
    if not known:
        with contextlib.suppress(RunFailed):  # of a folder that may only be read; a later use will
            write_atomically(record, lambda temporary: temporary.write_text(
                f"{digest}  {record.stem}\n"))
