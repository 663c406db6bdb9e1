"""Random files and random command lines: each ends with what the README says, never a traceback.

Here a bounded part, the same cases every time; `make soak` runs many more. FUZZED has a strategy
and a check for each reader and each command; a check raises where the promise is broken.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import signal
import struct
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), "hypo"))
import faults  # noqa: E402
import hostile_pickles  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from faults import ROOT, Watched  # noqa: E402
from helpers import save_student  # noqa: E402
from hypothesis import HealthCheck, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from PIL import Image  # noqa: E402

from weights import checkpoint  # noqa: E402
from images import real  # noqa: E402
from base import errors  # noqa: E402
import evaluate  # noqa: E402
import fid  # noqa: E402
from images import sets  # noqa: E402
from training import kept, options  # noqa: E402
from weights import pickle_reader  # noqa: E402
from weights import pretrained  # noqa: E402
from experiments import make_assets, readme  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from base.errors import RunFailed, UserError  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
NOWHERE = "http://127.0.0.1:9"                          # where no server answers


# ---- Damage to a good file ----

@st.composite
def damaged(draw, whole):
    """The bytes of a good file with pieces changed, cut out, doubled or put in."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.integers(0, 64))
        kind = draw(st.sampled_from(("flip", "cut", "end", "double", "put", "zero")))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at:at + length]
        elif kind == "end":
            del content[at:]
        elif kind == "double":
            content[at:at] = content[at:at + length]
        elif kind == "put":
            content[at:at] = draw(st.binary(max_size=16))
        else:
            content[at:at + length] = bytes(length)
    return bytes(content)


def folder():
    """A scratch folder for one case."""
    return tempfile.TemporaryDirectory(prefix="fuzz", ignore_cleanup_errors=True)


def refused_or(read, name, content):
    """read(path) gives a value, or a UserError of one line that names the file."""
    with folder() as scratch, Watched(scratch) as watched:
        path = Path(scratch) / name
        path.write_bytes(content)
        try:
            return read(path)
        except UserError as error:
            assert name in str(error) and "\n" not in str(error), str(error)
        finally:
            assert not watched.outside, watched.outside
            assert [p.name for p in Path(scratch).iterdir()] == [name]


# ---- Pickles ----

def opcodes():
    """Programs of a pickle: real opcodes with arguments that fit them, in any order."""
    words = st.sampled_from([
        b"N", b"\x88", b"}", b"]", b")", b"(", b"t", b"e", b"a", b"s", b"u", b"R", b"b", b"\x81",
        b"\x93", b"0", b"2", b"\x85", b"\x86", b"\x87", b"\x8f", b"\x90", b"q\0", b"h\0", b"h\1",
        b"q\1", b"\x94", b"Q", b"o", b"\x92", b"P1\n", b"ios\nsystem\n", b"cos\nsystem\n", b"."])
    text = st.text(max_size=8).map(hostile_pickles.text)
    number = st.integers(-2 ** 70, 2 ** 70).map(hostile_pickles.number)
    names = st.sampled_from(sorted(pickle_reader.CALLS)).map(
        lambda name: hostile_pickles.name(*name.split(" ")))
    calls = st.sampled_from(sorted(pickle_reader.CALLS)).map(
        lambda name: hostile_pickles.name(*name.split(" ")) + b"]\x85R")
    tensors = st.just(hostile_pickles.loaded(hostile_pickles.legacy()))
    some = st.one_of(words, text, number, names, calls, tensors, st.binary(max_size=4))
    return st.lists(some, max_size=40).map(lambda parts: hostile_pickles.whole(b"".join(parts)))


GOOD_PICKLE = (GOLDEN / "ddpmpp-cond-8.pkl").read_bytes()
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-2 ** 60, 2 ** 60) | st.text(max_size=9) | st.floats(
        allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=4), max_leaves=12)


def head_damaged(whole, structure=40_000):
    """Damage where a pickle's structure is; the numbers of its weights come after it."""
    return damaged(whole[:structure]).map(lambda head: head + whole[structure:])


def check_pickle(content):
    value = refused_or(pretrained.network_from_pickle, "a.pkl", content)
    assert value is None or isinstance(value[1], dict)


def check_plain_pickle(value):
    for protocol in (2, 4):
        assert pickle_reader.read_pickle(pickle.dumps(value, protocol)) == value


# ---- Checkpoints ----

def checkpoint_bytes():
    with folder() as scratch:
        path = Path(scratch) / "a.pt"
        faults.make_teacher(path)
        return path.read_bytes()


def signed_checkpoint(changes):
    """A checkpoint with a right checksum whose entries are of any kind."""
    with folder() as scratch:
        path = Path(scratch) / "a.pt"
        checkpoint.save(path, CONTENT | changes)
        return path.read_bytes()


GOOD_CHECKPOINT = checkpoint_bytes()
CONTENT = torch.load(io.BytesIO(GOOD_CHECKPOINT[:-checkpoint.DIGEST]
                                + GOOD_CHECKPOINT[-checkpoint.DIGEST:]), weights_only=True)
NETWORK_CHANGES = st.dictionaries(st.sampled_from(sorted(CONTENT["network"])), PLAIN, max_size=2)


def check_checkpoint(content):
    payload = refused_or(checkpoint.load, "latest.pt", content)
    assert payload is None or content == GOOD_CHECKPOINT


def check_signed(changes):
    content = signed_checkpoint(changes)

    def sampled(path):
        payload = checkpoint.load(path, needs=checkpoint.SAMPLED)
        return checkpoint.network_from(payload, source=path)

    refused_or(sampled, "signed.pt", content)


def check_weights(content):
    refused_or(pretrained.load_network, "weights.pth", content)


# ---- Images, archives, references ----

def png_bytes(value=7, size=8):
    content = io.BytesIO()
    Image.fromarray(np.full((size, size), value, np.uint8)).save(content, format="PNG")
    return content.getvalue()


def zipped(members, method=zipfile.ZIP_STORED):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, value in members.items():
            archive.writestr(zipfile.ZipInfo(name), value)
    return content.getvalue()


def npz(**arrays):
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def npy(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def tarred(members):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, value in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(value)
            archive.addfile(info, io.BytesIO(value))
    return content.getvalue()


GOOD_TAR = tarred({"data_batch_1.bin": bytes(3073), "data_batch_2.bin": b"\5" + bytes(3072)})
LABELS = json.dumps({"labels": [["a/1.png", 1], ["2.png", 0]]}).encode()
GOOD_ZIP = zipped({"a/1.png": png_bytes(1), "2.png": png_bytes(2), "dataset.json": LABELS},
                  zipfile.ZIP_DEFLATED)
GOOD_REFERENCE = npz(mu=np.zeros(3), sigma=np.eye(3))
GOOD_IMAGES = npz(arr_0=np.zeros((2, 8, 8, 1), np.uint8), arr_1=np.arange(2))
GOOD_PAIRS = npy(np.zeros(2, [("z", np.float32, (1, 8, 8)), ("image", np.float16, (1, 8, 8)),
                              ("index", np.int64)]))
NAMES = st.sampled_from(["1.png", "a/2.PNG", "../3.png", "/4.png", "dataset.json", "b.txt", "c.jpg",
                         "d.webp", "é.png", "a\\5.png", "e/", " .png"])
FILES = st.dictionaries(NAMES, st.one_of(st.just(png_bytes(3)), st.just(png_bytes(4)),
                                         st.just(LABELS), damaged(png_bytes(5)),
                                         st.binary(max_size=40), PLAIN.map(
                                             lambda value: json.dumps(
                                                 {"labels": value}).encode())), max_size=6)


def all_images(path):
    images = real.open_images(str(path))
    pixels, labels = images.take(range(len(images)))
    assert len(pixels) == len(labels) == len(images) and pixels.dtype == torch.uint8
    return True


def check_folder(files):
    """Any files in a folder: what its reader gives, a zip of the same files gives as well."""
    with folder() as scratch, Watched(scratch) as watched:
        inside = Path(scratch) / "images"
        inside.mkdir()
        for name, content in files.items():
            if not name.startswith(("/", "..")) and not name.endswith("/"):
                (inside / name).parent.mkdir(exist_ok=True)
                (inside / name).write_bytes(content)
        before = sorted(inside.rglob("*"))
        try:
            all_images(inside)
        except UserError as error:
            assert "images" in str(error) and "\n" not in str(error)
        assert sorted(inside.rglob("*")) == before and not watched.outside


def check_reference(content):
    refused_or(fid.read_reference, "reference.npz", content)


def check_images_npz(content):
    def read(path):
        images = sets.open_npz(path)
        return images.take(range(len(images))) if len(images) else None

    refused_or(read, "images.npz", content)


def check_pairs(content, whole=GOOD_PAIRS):
    """A part of the pairs whose name holds the hash of `whole`: its own content, or refused."""
    def read(path):
        return kept.open_part(path.parent, range(2))

    name = f"0-1-{hashlib.sha256(whole).hexdigest()[:16]}.npy"
    opened = refused_or(read, name, content)
    assert (opened is None) or content == whole


def header_npz(header):
    """An npz whose array states any shape and type."""
    array = header_npy(header)
    return zipped({f"{name}.npy": array for name in ("mu", "sigma", "arr_0")})


def header_npy(header):
    text = repr(header).encode() + b" \n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + bytes(64)


HEADERS = st.fixed_dictionaries({
    "descr": st.sampled_from(["<f8", "|u1", "|O", "<U3", "<f2", "", "<i8", [("a", "<f8")], 5]),
    "fortran_order": st.booleans() | st.just(3),
    "shape": st.lists(st.integers(-2, 2 ** 62) | st.integers(0, 4), max_size=4).map(tuple)})


def check_header(header):
    content = header_npz(header)
    for check in (check_reference, check_images_npz):
        check(content)
    check_pairs(header_npy(header), whole=header_npy(header))       # its name fits


# ---- Command lines ----

WORDS = ["0", "1", "2", "3", "-1", "1e9", "nan", "inf", "1e-400", "9" * 30, "", "x", "é", "%s",
         "a\nb", "--", "0.17", "80", "digits", "cifar10", "imagenet64", "ffhq64", "pmdd",
         "dmd", "dmd2", "sid", "none", "dm", "longer", "random", "balanced", "bf16", "tf32", "cpu",
         "cuda", "0-3", "3-1", "1,1", "0-99999999999", "4x4", "0x0", "2x", "true", "\udcff"]
OUTPUTS = ["out/a.png", "out/b.zip", "out/c.npz", "out/d", "out/e.json", "out", "out/deep/er/f.png",
           "student.pt/g.png", "out/.hidden", "out/h.gif", "out/" + "x" * 300, ".", "..", "/", "",
           "/dev/null", "out/é\n.png", "empty", "images"]
PATHS = ["student.pt", "teacher.pt", "damaged.pt", "hostile.pkl", "hostile.pt", "good.pkl", "a.zip",
         "a.npz", "ref.npz", "images", "empty", "runs", "nowhere/file.pt", ".", "..", "/",
         "/proc/self/mem", "/dev/null", *OUTPUTS]
SMALL = ["1", "2", "3", "0", "-1", "x", "nan"]          # of what would take long: steps, images
LONG = {"--n", "--number", "--heun", "--repeats", "--steps"}
LEFT_OUT = {"--compile", "--cache", "-h", "--help"}


def flags_of(make_parser):
    return {flag: action for action in make_parser()._actions for flag in action.option_strings
            if flag not in LEFT_OUT}


def parser_of(module):
    """The parser that a module's parse() builds."""
    made = []

    class Caught(Exception):
        pass

    def parse_args(self, argv=None):
        made.append(self)
        raise Caught

    real = errors.Parser.parse_args
    errors.Parser.parse_args = parse_args
    try:
        with contextlib.suppress(Caught):
            getattr(module, "parse", module.main)()
    finally:
        errors.Parser.parse_args = real
    return made[0]


def command_line(flags, most=6):
    """Some of the flags, mostly with values that fit them; what would take long has small ones."""
    def with_values(flag):
        action, long = flags[flag], flag in LONG
        fit = (action.choices or (["1", "2", "3"] if long else ["1", "2", "4"])
               if action.choices or action.type is int else
               ["0.5", "1", "0.1", "2.5", "80"] if action.type is float else
               OUTPUTS if flag == "--out" else ["0-3", "4x4", "5,7", "2x1", *PATHS])
        fitting = st.lists(st.sampled_from(list(map(str, fit))), min_size=1,
                           max_size=3 if action.nargs == "+" else 1)
        some = SMALL if long else OUTPUTS if flag == "--out" else WORDS + 2 * PATHS
        any_ = st.lists(st.sampled_from(some), max_size=2)
        if action.nargs == 0:
            fitting = st.just([])
        return st.integers(0, 7).flatmap(lambda k: any_ if k == 0 else fitting).map(
            lambda values: [flag, *values])

    one = st.sampled_from(sorted(flags)).flatmap(with_values)
    return st.lists(one, max_size=most).map(lambda parts: list(itertools.chain(*parts)))


SAMPLE_FLAGS = flags_of(lambda: parser_of(sample))
EVALUATE_FLAGS = flags_of(lambda: parser_of(evaluate))
TRAIN_FLAGS = flags_of(options.parser)
FID_FLAGS = flags_of(lambda: parser_of(fid))


def playground():
    """A folder with every kind of file that a command may be pointed at."""
    base = Path(tempfile.mkdtemp(prefix="playground"))
    save_student(base / "student.pt", steps=2, model_channels=8, num_blocks=1)
    save_student(base / "teacher.pt", steps=0, model_channels=8, num_blocks=1)
    (base / "damaged.pt").write_bytes((base / "student.pt").read_bytes()[:-9])
    (base / "hostile.pkl").write_bytes(next(hostile_pickles.code(f"touch {base}/ran"))[1])
    faults.hostile_pickle(base / "hostile.pt")
    (base / "good.pkl").write_bytes(GOOD_PICKLE)
    (base / "a.zip").write_bytes(GOOD_ZIP)
    (base / "a.npz").write_bytes(GOOD_IMAGES)
    fid.write_reference(base / "ref.npz", np.zeros(64), np.eye(64))
    for name in ("images", "empty", "runs", "out"):
        (base / name).mkdir()
    (base / "images" / "1.png").write_bytes(png_bytes())
    (base / "images" / "2.png").write_bytes(png_bytes(9))
    return base


@functools.cache
def base():
    return playground()


def stamps():
    """When each file of the playground was written."""
    return {p.relative_to(base()): p.stat().st_mtime_ns for p in base().rglob("*") if p.is_file()}


def run_command(main, argv, allowed=("out", "cache", "runs"), default=False):
    """A command in a folder of its own: exit code 0 to 3, and nothing written but where it may.

    With `default` also its picture or record in the current folder, where no flag names another.
    """
    BASE = base()
    before = stamps()
    handlers = {number: signal.getsignal(number) for number in faults.SIGNALS.values()}
    kept = os.getcwd(), sys.argv, dict(os.environ)
    said, output = io.StringIO(), io.StringIO()
    paths = [BASE if default else BASE / "out", *(BASE / name for name in allowed)]
    os.chdir(BASE)
    os.environ |= {"PMDD_MIRROR": NOWHERE, "PMDD_CACHE": str(BASE / "cache"),
                   "NO_PROXY": "127.0.0.1", "TQDM_DISABLE": "1"}
    sys.argv = ["command", *argv]
    try:
        with Watched(*paths) as watched, contextlib.redirect_stderr(
                said), contextlib.redirect_stdout(output):
            try:
                errors.run(main)
            except SystemExit as left:
                code = left.code or 0
    finally:
        os.chdir(kept[0])
        sys.argv = kept[1]
        os.environ.clear()
        os.environ.update(kept[2])
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert code in (0, 1, 2, 3), (argv, code)
    lines = said.getvalue().splitlines()
    assert not code or [line for line in lines if line.startswith("error: ")] == lines[-1:], (
        argv, lines)
    assert not watched.outside, (argv, watched.outside)
    after = stamps()
    for path in before.keys() | after.keys():
        inside = path.parts[0] in (*allowed, "empty") or len(path.parts) == 1 and path.suffix in (
            ".png", ".json")
        assert inside or before.get(path) == after.get(path), (argv, path)
    assert not (BASE / "ran").exists() and not (BASE / "hostile.pt.exploded").exists(), argv
    return code


def check_train_dry_run(argv):
    run_command(train.main, [*argv, "--dry-run"], allowed=())


TINY = ["--iterations", "1", "--batch", "2", "--evaluate-images", "2", "--regression-pairs", "2",
        "--regression-steps", "1", "--save-every", "1", "--batch-per-gpu", "2"]


def check_train(argv):
    """A real run, of one iteration, whatever the other flags are."""
    run_command(train.main, ["--teacher", "teacher.pt", *argv, *TINY, "--dataset", "digits",
                             "--folder", "runs/fuzz", "--stage", "1", "--force"])


def check_sample(argv):
    default = ["--checkpoint", "student.pt", "--n", "2"]
    run_command(sample.main, [*default, *argv], default=True)


def check_evaluate(argv):
    default = ["--checkpoint", "student.pt", "--n", "2"]
    run_command(evaluate.main, [*default, *argv], default=True)


def check_export(argv):
    run_command(lambda: make_assets.main(["export", *argv]), argv)


def check_fid(argv):
    run_command(fid.main, ["--data", "images", "--out", "out/reference.npz", "--force", *argv])


def check_without_flags(argv):
    """readme.py takes none, and make_assets.py three words: whatever is given, they do nothing."""
    for main in (readme.main, lambda: make_assets.main(argv)):
        assert run_command(main, argv, allowed=()) == 2


EXPORTS = st.one_of(st.lists(st.sampled_from([*PATHS, *WORDS]), max_size=1),
                    st.lists(st.sampled_from([*PATHS, *WORDS]), min_size=3, max_size=4),
                    st.tuples(st.sampled_from(PATHS[:5]), st.sampled_from(
                        ["out/a.pt", "out/b.pt", "out/none/c.pt", "out/.pt", *OUTPUTS])
                              ).map(list))

FUZZED = {
    "pickles: damaged": (head_damaged(GOOD_PICKLE), check_pickle),
    "pickles: any opcodes": (opcodes(), check_pickle),
    "pickles: plain values": (PLAIN, check_plain_pickle),
    "checkpoints: damaged": (damaged(GOOD_CHECKPOINT), check_checkpoint),
    "checkpoints: any bytes": (st.binary(max_size=300), check_checkpoint),
    "checkpoints: right checksum": (st.one_of(
        st.dictionaries(st.sampled_from(sorted(checkpoint.KINDS)), PLAIN, max_size=3),
        NETWORK_CHANGES.map(lambda some: {"network": CONTENT["network"] | some})), check_signed),
    "weights: damaged": (damaged(GOOD_CHECKPOINT), check_weights),
    "zip: damaged": (damaged(GOOD_ZIP), lambda content: refused_or(all_images, "a.zip", content)),
    "zip: any files": (FILES.map(zipped),
                       lambda content: refused_or(all_images, "a.zip", content)),
    "folder: any files": (FILES, check_folder),
    "PNG: damaged": (damaged(png_bytes(6)), lambda content: check_folder({"1.png": content})),
    "tar: damaged": (st.one_of(damaged(GOOD_TAR), damaged(gzip.compress(GOOD_TAR, mtime=0))),
                     lambda content: refused_or(all_images, "a.tar.gz", content)),
    "reference: damaged": (damaged(GOOD_REFERENCE), check_reference),
    "images npz: damaged": (damaged(GOOD_IMAGES), check_images_npz),
    "pairs: damaged": (damaged(GOOD_PAIRS), check_pairs),
    "npz: any header": (HEADERS, check_header),
    "train.py --dry-run": (command_line(TRAIN_FLAGS), check_train_dry_run),
    "train.py": (command_line(TRAIN_FLAGS, most=3), check_train),
    "sample.py": (command_line(SAMPLE_FLAGS), check_sample),
    "evaluate.py": (command_line(EVALUATE_FLAGS), check_evaluate),
    "make_assets.py export": (EXPORTS, check_export),
    "fid.py": (command_line(FID_FLAGS, most=3), check_fid),
    "scripts without flags": (st.lists(st.sampled_from([*(set(WORDS) - {"--"}), *PATHS, "-x"]),
                                       min_size=1, max_size=3), check_without_flags),
}
# Cases of the bounded part: about as many as a second has room for.
CASES = {"train.py --dry-run": 6, "train.py": 5, "sample.py": 25, "evaluate.py": 20, "fid.py": 12,
         "checkpoints: right checksum": 15, "weights: damaged": 15}


def fuzz(name, cases, number=None):
    """The check of this many cases, the same each time or by a seed; returns how many there were"""
    strategy, check = FUZZED[name]
    done = []

    def one(value):
        done.append(None)
        check(value)

    test = settings(max_examples=cases, derandomize=number is None, database=None, deadline=None,
                    suppress_health_check=list(HealthCheck))(given(strategy)(one))
    (test if number is None else seed(number)(test))()
    return len(done)


@pytest.mark.parametrize("name", FUZZED)
def test_random_files_and_command_lines_end_as_the_readme_says(name):
    random.seed(0)
    assert fuzz(name, CASES.get(name, 40)) >= 1


def test_a_check_notices_a_traceback_a_wrong_code_and_a_file_outside(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0, [])
    with pytest.raises(AssertionError):
        run_command(lambda: 7, [])
    with pytest.raises(AssertionError):
        run_command(lambda: (tmp_path / "outside").write_text("") and 0, [])
    with pytest.raises(AssertionError):
        run_command(lambda: (print("error: one\nerror: two", file=sys.stderr), 2)[1], [])
    with pytest.raises(ValueError):
        refused_or(lambda path: int("x"), "file", b"")
    with pytest.raises(AssertionError):
        refused_or(lambda path: (_ for _ in ()).throw(UserError("no name")), "file", b"")


def test_a_full_disk_is_exit_code_1():
    def main():
        raise RunFailed("cannot write it")

    assert run_command(main, []) == 1
