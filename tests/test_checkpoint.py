"""What crashes, full disks and hostile files can do to a checkpoint: nothing unnoticed."""

import errno
import hashlib
import io
import itertools
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import zipfile
from functools import partial

import numpy as np
import pytest
import torch

from base import files
from base.errors import RunFailed, UserError
from experiments import make_assets
from helpers import small_network
from images import sets
from weights import checkpoint
from weights.checkpoint import DamagedCheckpoint, load, load_latest, save, save_latest

NUMBERS = {"iteration": 3, "sigmas": [80.0, 2.515], "best_fid": float("inf"),
           "fid": {"1": {"FID": 2.5}}, "dataset": "digits", "nothing": None, "flag": True}


def payload(seed=0):
    """As a run's: weights of several types, an optimizer's state, numbers and words."""
    torch.manual_seed(seed)
    weights = torch.nn.Linear(7, 3)
    optimizer = torch.optim.AdamW(weights.parameters())
    weights(torch.randn(2, 7)).sum().backward()
    optimizer.step()
    return NUMBERS | {"iteration": seed, "ema": {
        "half": torch.randn(5).half(), "brain": torch.randn(5).bfloat16(),
        "double": torch.randn(2, 3).double(), "empty": torch.zeros(0),
        "strided": torch.randn(4, 3).T, "scalar": torch.tensor(7.0),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])},
        "others": {"bytes": torch.arange(9).byte(), "whole": torch.tensor(7)},
        "student": weights.state_dict(), "optimizers": [optimizer.state_dict()]}


def same(a, b):
    """Equal to the bit, in types and in shapes."""
    if isinstance(a, torch.Tensor):
        return (isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
                and bits(a) == bits(b))
    if isinstance(a, dict):
        return isinstance(b, dict) and [*a] == [*b] and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- What is written is what is read ----

def test_a_checkpoint_comes_back_to_the_bit_and_plain_torch_reads_it_too(tmp_path):
    path = tmp_path / "latest.pt"
    save(path, payload())
    expected = {"format": checkpoint.FORMAT, **payload()}
    assert same(expected, load(path))
    assert same(expected, torch.load(path, weights_only=True))
    assert names(tmp_path) == ["latest.pt"]
    with zipfile.ZipFile(path) as file:                         # a whole zip with a comment
        assert file.testzip() is None
        body = path.read_bytes()[:-checkpoint.DIGEST]
        assert file.comment.decode() == hashlib.sha256(body).hexdigest()


def test_a_network_comes_back_with_the_weights_that_were_asked_for(tmp_path):
    ema, student = small_network(0, model_channels=8), small_network(1, model_channels=8)
    save(tmp_path / "best.pt", {"network": ema.config, "ema": ema.state_dict(),
                                "student": student.state_dict()})
    saved = load(tmp_path / "best.pt")
    for network, weights in ((ema, "ema"), (student, "student")):
        again = checkpoint.network_from(saved, weights)
        assert not again.training and again.config == network.config
        assert same(dict(network.state_dict()), dict(again.state_dict()))


def test_two_equal_payloads_make_equal_files(tmp_path):
    save(tmp_path / "latest.pt", payload())
    (tmp_path / "other").mkdir()
    save(tmp_path / "other" / "latest.pt", payload())
    first, second = tmp_path / "latest.pt", tmp_path / "other" / "latest.pt"
    assert same(load(first), load(second)) and first.stat().st_size == second.stat().st_size


# ---- What is damaged is never taken for good ----

def damaged(path, content):
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpoint) as caught:
        load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "latest.pt"
    save(path, {"weights": torch.arange(64.0), "iteration": 3})
    return path.read_bytes()


def test_a_flipped_byte_anywhere_is_found(tmp_path, whole):
    random_, length = random.Random(0), len(whole)
    ends = [*range(40), *range(length - 100, length)]           # among them all of the checksum
    for position in ends + random_.sample(range(40, length - 100), 300):
        flipped = bytearray(whole)
        flipped[position] ^= random_.randrange(1, 256)
        damaged(tmp_path / "latest.pt", flipped)


def test_a_file_cut_off_or_grown_at_any_length_is_found(tmp_path, whole):
    lengths = random.Random(1).sample(range(len(whole)), 50)
    for length in [0, 1, 63, 64, 65, len(whole) - 1, len(whole) - 64, *lengths]:
        damaged(tmp_path / "latest.pt", whole[:length])
        damaged(tmp_path / "latest.pt", whole[:length] + bytes(len(whole) - length))
    for more in (b"\0", b"\n", whole):
        damaged(tmp_path / "latest.pt", whole + more)


def explosive(folder):
    class Explodes:
        def __reduce__(self):
            return open, (str(folder / "exploded"), "w")

    return Explodes()


def signed(body):
    """With the checksum that anyone can compute."""
    return body + hashlib.sha256(body).hexdigest().encode()


def test_a_file_that_is_no_checkpoint_is_refused_and_nothing_in_it_is_run(tmp_path, whole):
    bomb = pickle.dumps(explosive(tmp_path), 2)
    old, new, other_zip = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"format": 1, "weights": explosive(tmp_path)}, new)
    torch.save({"format": 1, "w": explosive(tmp_path)}, old, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(other_zip, "w") as file:
        file.writestr("dataset.json", "{}")
    plain = []
    for value in ([1, 2], torch.zeros(3), {"no": "format"}, {"format": 2}, {"format": "1"},
                  {"format": torch.ones(2)}):
        content = io.BytesIO()
        torch.save(value, content)
        plain.append(content.getvalue())
    bodies = [b"", b"text", bytes(1000), bomb, old.getvalue(), new.getvalue(), other_zip.getvalue(),
              *plain]
    for body in bodies:
        for content in (body, signed(body)):
            damaged(tmp_path / "latest.pt", content)
    assert not (tmp_path / "exploded").exists()


def test_a_place_without_a_readable_file_is_named(tmp_path, whole):
    (tmp_path / "folder.pt").mkdir()
    for path in (tmp_path / "folder.pt", tmp_path / "missing.pt", tmp_path / "no" / "folder.pt"):
        with pytest.raises(UserError, match="no checkpoint at") as caught:
            load(path)
        assert str(path) in str(caught.value)
    path = tmp_path / "locked.pt"
    path.write_bytes(whole)
    path.chmod(0)
    try:
        path.read_bytes()
    except PermissionError:                                     # root may read everything
        with pytest.raises(UserError, match="cannot read .*locked.pt: Permission denied"):
            load(path)
    path.chmod(0o600)
    assert load(path)["iteration"] == 3


def test_a_disk_that_cannot_be_read_is_not_called_a_damaged_file(tmp_path, whole, monkeypatch):
    (tmp_path / "latest.pt").write_bytes(whole)

    def fail(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint.torch, "load", fail)
    with pytest.raises(UserError, match="cannot read .*latest.pt: Input/output error") as caught:
        load(tmp_path / "latest.pt")
    assert not isinstance(caught.value, DamagedCheckpoint)

    def full(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("device memory")

    monkeypatch.setattr(checkpoint.torch, "load", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):            # nor is a device without room
        load(tmp_path / "latest.pt")


# ---- The last two ----

def iteration_of(folder, say=lambda text: None):
    return load_latest(folder, say=say)["iteration"]


def test_the_last_two_checkpoints_are_kept(tmp_path):
    assert load_latest(tmp_path) is None
    for k in range(1, 5):
        save_latest(tmp_path, payload(k))
        assert load(tmp_path / "latest.pt")["iteration"] == k
        if k > 1:
            assert load(tmp_path / "previous.pt")["iteration"] == k - 1
        assert names(tmp_path) == ["latest.pt", "previous.pt"][:k] and iteration_of(tmp_path) == k


def test_a_damaged_latest_falls_back_to_the_one_before_and_says_so(tmp_path, capsys):
    save_latest(tmp_path, payload(1))
    save_latest(tmp_path, payload(2))
    content = (tmp_path / "latest.pt").read_bytes()
    (tmp_path / "latest.pt").write_bytes(content[:-1])
    assert load_latest(tmp_path)["iteration"] == 1
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("warning: ") and "latest.pt is damaged" in said
    # The run goes on from there, and its next checkpoint is the newest good one.
    save_latest(tmp_path, payload(3))
    assert iteration_of(tmp_path) == 3
    for name in ("latest.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"")
    told = []
    with pytest.raises(UserError, match="no undamaged checkpoint in .* move the folder away"):
        iteration_of(tmp_path, told.append)
    assert len(told) == 2


def test_every_file_is_flushed_before_it_takes_its_name_and_the_folder_after(tmp_path, monkeypatch):
    calls, real_replace, real_fsync = [], os.replace, os.fsync

    def replace(source, target):
        calls.append(("rename", os.path.basename(target)))
        real_replace(source, target)

    def fsync(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        calls.append(("flush", os.path.basename(path).split(".")[1:2]))
        real_fsync(handle)

    save_latest(tmp_path, payload(1))
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "fsync", fsync)
    save_latest(tmp_path, payload(2))
    file, folder = ("flush", ["newest"]), ("flush", [])
    assert calls == [file, ("rename", "newest.pt"), folder,
                     ("rename", "previous.pt"), ("rename", "latest.pt"), folder]


# ---- A crash ----

def crash_points(action):
    """Fork; in the child die without a word at the n-th line of what writes a checkpoint, n = 1, 2,
    ... until the action is over. Yields after each death."""
    n, code = 0, 1
    while code:
        n += 1
        pid = os.fork()
        if not pid:
            left = [n]

            def trace(frame, event, argument, left=left):
                if frame.f_code.co_filename not in (checkpoint.__file__, files.__file__):
                    return None
                left[0] -= event == "line"
                if left[0] <= 0:
                    os._exit(1)
                return trace

            try:
                sys.settrace(trace)
                action()
                os._exit(0)
            finally:
                os._exit(2)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 1)
        yield n


def start_with(folder, kept):
    """A run folder with this many checkpoints, the newest of iteration 2."""
    folder.mkdir()
    for k in range(3 - kept, 3):
        save_latest(folder, {"iteration": k})


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_crash_at_any_line_leaves_the_new_checkpoint_or_the_one_before(tmp_path, kept):
    found = []
    start_with(tmp_path / "0", kept)
    for n in crash_points(lambda: save_latest(tmp_path / str(len(found)), {"iteration": 3})):
        folder, told = tmp_path / str(n - 1), []
        loaded = load_latest(folder, say=told.append)
        found.append(loaded and loaded["iteration"])
        assert found[-1] in ({2, 3} if kept else {None, 3}) and not told
        # Whatever the crash has left, the next save keeps the checkpoint that was found as well.
        save_latest(folder, {"iteration": 4})
        assert iteration_of(folder) == 4 and not (folder / "newest.pt").exists()
        if found[-1]:
            assert load(folder / "previous.pt")["iteration"] == found[-1]
        start_with(tmp_path / str(n), kept)
    assert len(found) > 40 and found == sorted(found, key=lambda k: k or 0)     # old, then new
    assert {found[0], found[-1]} == {2 if kept else None, 3}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_crash_in_the_middle_of_a_write_leaves_the_one_before(tmp_path, share):
    start_with(tmp_path / "run", 2)
    pid = os.fork()
    if not pid:
        def half(content, path):
            whole = io.BytesIO()
            real(content, whole)
            with open(path, "wb") as file:
                file.write(whole.getvalue()[:int(share * whole.tell())])
            os._exit(9)

        real, torch.save = torch.save, half
        try:
            save_latest(tmp_path / "run", {"iteration": 3})
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert iteration_of(tmp_path / "run") == 2
    save_latest(tmp_path / "run", {"iteration": 3})
    assert iteration_of(tmp_path / "run") == 3


# ---- A full disk ----

def intact(folder, before):
    """Every file is what it was, and there is no other."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} == before


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


FULL = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Quota exceeded")
ZIP_WRITER = RuntimeError("[enforce fail at inline_container.cc:664] . x\ny"), RuntimeError()


@pytest.mark.parametrize("name, error", [
    *itertools.product(("torch.save", "os.fsync", "os.replace"), FULL),
    *(("torch.save", error) for error in ZIP_WRITER)])
def test_a_write_that_fails_ends_the_run_with_the_old_files_intact(
        tmp_path, monkeypatch, name, error):
    save_latest(tmp_path, payload(1))
    save_latest(tmp_path, payload(2))
    before = contents(tmp_path)

    def fail(*args):
        if name == "torch.save":                                # half of it is on the disk
            args[1].write_bytes(bytes(1000))
        raise error

    with monkeypatch.context() as patched:
        patched.setattr({"torch": torch, "os": os}[name.split(".")[0]], name.split(".")[1], fail)
        with pytest.raises(RunFailed, match="cannot write .*newest.pt: .* is intact") as caught:
            save_latest(tmp_path, payload(3))
    assert "\n" not in str(caught.value) and intact(tmp_path, before)
    save_latest(tmp_path, payload(3))
    assert iteration_of(tmp_path) == 3


def test_an_error_of_what_is_drawn_is_not_the_disks(tmp_path):
    def blocks():
        yield [0], [np.zeros((1, 1, 8, 8), np.uint8)], None
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for name, write in (("a.zip", sets.write_zip), ("a.npz", partial(sets.write_npz, count=2)),
                        ("a", sets.write_folder)):
        with pytest.raises(RuntimeError, match="^CUDA error"):
            write(tmp_path / name, blocks())
    assert not list(tmp_path.iterdir())


def test_a_rename_that_fails_leaves_the_new_checkpoint_where_a_resumed_run_finds_it(
        tmp_path, monkeypatch):
    save_latest(tmp_path, payload(1))
    save_latest(tmp_path, payload(2))
    real = os.replace
    for failing in ("previous.pt", "latest.pt"):
        def fail(source, target, failing=failing):
            if os.path.basename(target) == failing:
                raise OSError(errno.EIO, "Input/output error")
            real(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", fail)
            with pytest.raises(RunFailed, match="a resumed run starts from it"):
                save_latest(tmp_path, payload(3))
        assert iteration_of(tmp_path) == 3


def test_a_folder_that_is_gone_or_cannot_be_written_fails_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(RunFailed, match="cannot write .*a.pt: No such file or directory"):
        files.write_atomically(tmp_path / "gone" / "a.pt", lambda path: path.write_text(""))

    # On a disk that has become read-only even the removal of the temporary file fails.
    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(checkpoint.Path, "unlink", read_only)
    with pytest.raises(RunFailed, match="Read-only file system"):
        files.write_atomically(tmp_path / "latest.pt", read_only)


def test_what_is_no_fault_of_the_disk_is_not_hidden_and_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        files.write_atomically(tmp_path / "a", lambda path: path.write_text(str(1 / 0)))
    assert names(tmp_path) == []


LARGE = {"iteration": 3, "weights": torch.arange(100_000.0)}    # 400 kB


def test_a_write_that_the_system_cuts_off_at_any_size_leaves_the_old_files_intact(tmp_path):
    save_latest(tmp_path, {"iteration": 1})
    save_latest(tmp_path, {"iteration": 2})
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)      # a real short write, then an error
    for size in (0, 1, 5000, 100_000, 399_999, 401_000):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            with pytest.raises(RunFailed, match="cannot write .*newest.pt"):
                save_latest(tmp_path, LARGE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert intact(tmp_path, before)
    save_latest(tmp_path, LARGE)
    assert same(load_latest(tmp_path)["weights"], LARGE["weights"])


def test_a_disk_that_fills_up_leaves_the_old_files_intact_and_goes_on_once_there_is_room(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    try:
        small = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        small = False
    if not small:               # who may not mount has the limit of the test above in its place
        return
    try:
        for k in (1, 2):
            save_latest(tmp_path, LARGE | {"iteration": k})
        before = contents(tmp_path)
        with pytest.raises(RunFailed, match="cannot write .*newest.pt"):
            save_latest(tmp_path, LARGE)                        # a third one has no room
        assert intact(tmp_path, before) and iteration_of(tmp_path) == 2
        (tmp_path / "previous.pt").unlink()
        save_latest(tmp_path, LARGE)
        assert iteration_of(tmp_path) == 3
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_the_length_of_the_zips_comment_is_under_the_checksum(whole):
    body = whole[:-checkpoint.DIGEST]
    assert struct.unpack("<H", body[-2:]) == (checkpoint.DIGEST,) and whole == signed(body)


def test_a_student_alone_is_what_sampling_needs_of_a_runs_best(tmp_path):
    network = small_network(model_channels=8)
    kept = {"dataset": "digits", "method": "pmdd", "stage": 2, "sigmas": [80.0, 2.5],
            "network": network.config, "iteration": 9, "fid": {}, "ema": network.state_dict()}
    save(tmp_path / "best.pt", kept | {"adapted": network.state_dict(), "best_fid": 1.0})
    make_assets.main(["export", str(tmp_path / "best.pt"), str(tmp_path / "student.pt")])
    assert same(load(tmp_path / "student.pt"), {"format": checkpoint.FORMAT, **kept})
    for wrong in ([], ["export", "best.pt"], ["digits", "best.pt"], ["nothing"]):
        with pytest.raises(UserError, match="usage"):
            make_assets.main(wrong)
    with pytest.raises(UserError, match="cannot write .*student.txt"):
        make_assets.main(["export", str(tmp_path / "best.pt"), str(tmp_path / "student.txt")])
    save(tmp_path / "text.pt", kept | {"pipeline": "a-pipeline"})
    with pytest.raises(UserError, match="from text: python text_to_image.py export .*text.pt"):
        make_assets.main(["export", str(tmp_path / "text.pt"), str(tmp_path / "other.pt")])
    assert not (tmp_path / "other.pt").exists()
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match="in a run's folder"):
        make_assets.main(["export", str(tmp_path / "best.pt"), str(tmp_path / "best.pt")])
