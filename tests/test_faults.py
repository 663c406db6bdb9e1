"""What a crash, a full disk, a damaged or hostile file does to a user's run: the fast part.

`make soak` is the long part. What the parts of a run do by themselves is tested where they are:
test_checkpoint.py, test_options.py, test_download.py, test_pretrained.py, test_data.py.
"""

import gc
import hashlib
import io
import math
import os
import random
import re
import shutil
import stat
import tarfile
import threading
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import faults
import fid
import hostile_pickles
from base.errors import UserError
from experiments import readme
from faults import (GAN, ROOT, STAGE_1, Command, SmallDisk, Watched, differences, ended, finished,
                    flags, lost, one_line, outcome, until)
from helpers import save_student
from images import real, sets
from test_download import Server
from training import kept
from weights import checkpoint, pretrained


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return faults.make_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pt")


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    """What a run comes to that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    finished("train", *flags(teacher, folder / "run", *STAGE_1), log=folder / "log")
    return outcome(folder / "run")


@pytest.fixture(scope="module")
def half(teacher, tmp_path_factory):
    """A run that was killed after its second checkpoint: latest.pt of iteration 4, previous of 2"""
    folder = tmp_path_factory.mktemp("half")
    command = Command("train", *flags(teacher, folder / "run", *STAGE_1), log=folder / "log",
                      faults=[("die_after_saving", 4)])
    assert command.wait() == -9
    return folder / "run"


def copied(half, folder):
    shutil.copytree(half, folder)
    return folder / "stage1"


# ---- A run that is killed or stopped ----

@pytest.mark.parametrize("more, iterations", [(GAN, 6), ((), 2)])   # the second: stages 1, 2, 3
def test_a_run_killed_while_it_writes_a_checkpoint_loses_none_and_ends_the_same(
        teacher, tmp_path, more, iterations):
    argv = flags(teacher, tmp_path / "killed", *more, iterations=iterations)
    finished("train", *flags(teacher, tmp_path / "whole", *more, iterations=iterations),
             log=tmp_path / "whole.log")
    for kill in range(2):
        command = Command("train", *argv, log=tmp_path / "killed.log", faults=[
            ("slow_writes", 0.25), ("note_saves", tmp_path / "notes")])
        saves = len((tmp_path / "notes").read_text().splitlines()) if kill else 0

        def writing(saves=saves):
            noted = tmp_path / "notes"
            return len(noted.read_text().splitlines()) > saves if noted.exists() else False

        until(writing)                                  # it gets on by one checkpoint each time
        until(lambda: list((tmp_path / "killed").rglob(".*.pt.*.tmp")))
        command.send(9)
        assert command.wait() == -9 and not lost(tmp_path / "killed", tmp_path / "notes")
    said = finished("train", *argv, log=tmp_path / "last.log")
    assert ended(said)
    assert not differences(outcome(tmp_path / "whole"), outcome(tmp_path / "killed"))


@pytest.mark.parametrize("when", ["made", "written"])
def test_a_run_killed_in_an_evaluation_goes_on_from_it_and_tells_its_figures_once(
        teacher, whole, tmp_path, when):
    argv = flags(teacher, tmp_path / "run", *STAGE_1)
    command = Command("train", *argv, log=tmp_path / "killed", faults=[("die_at_scores", when)])
    assert command.wait() == -9
    said = finished("train", *argv, log=tmp_path / "resumed")
    assert ended(said) == 4
    assert not differences(whole, outcome(tmp_path / "run"))


@pytest.mark.parametrize("name", faults.SIGNALS)
def test_a_stopped_run_saves_says_so_with_code_3_and_goes_on_exactly(
        teacher, whole, tmp_path, name):
    argv, stage = flags(teacher, tmp_path / "run", *STAGE_1), tmp_path / "run" / "stage1"
    command = Command("train", *argv, log=tmp_path / "stopped")
    until(lambda: faults.iterations_done(stage))
    command.send(faults.SIGNALS[name])
    assert command.wait() == 3, command.said()
    saved = int(re.search(rf"{name}: saved after (\d+) iterations", command.said())[1])
    assert checkpoint.load(stage / "latest.pt")["iteration"] == saved < 6
    assert ended(finished("train", *argv, log=tmp_path / "resumed")) == saved
    assert not differences(whole, outcome(tmp_path / "run"))


def test_a_second_ctrl_c_ends_the_run_at_once_with_what_was_saved(teacher, whole, tmp_path):
    argv = flags(teacher, tmp_path / "run", *STAGE_1)
    command = Command("train", *argv, log=tmp_path / "log", faults=[("slow_writes", 20)])
    until(lambda: list((tmp_path / "run").rglob(".*.pt.*.tmp")))
    for _ in range(2):
        command.send(faults.SIGNALS["SIGINT"])
        time.sleep(0.3)
    assert command.wait(10) == 130 and "interrupted\n" in command.said()
    finished("train", *argv, log=tmp_path / "resumed")
    assert not differences(whole, outcome(tmp_path / "run"))


def test_a_second_process_is_refused_until_the_first_is_dead(teacher, tmp_path):
    argv = flags(teacher, tmp_path / "run", *STAGE_1)
    first = Command("train", *argv, log=tmp_path / "first", faults=[("slow_writes", 60)])
    until(lambda: list((tmp_path / "run").rglob(".*.pt.*.tmp")))
    said = finished("train", *argv, log=tmp_path / "second", code=2)
    assert "another process is training in" in one_line(said) and first.running()
    first.send(9)
    first.wait()
    assert "iteration 6" in finished("train", *argv, log=tmp_path / "third")


def test_a_dead_rank_ends_the_others_who_say_why_and_a_restart_resumes_exactly(teacher, tmp_path):
    """Rank 1 dies twice: torchrun starts the run again once, and ends it the second time."""
    argv = [*flags(teacher, tmp_path / "run", *STAGE_1, iterations=14)]
    stage, log = tmp_path / "run" / "stage1", tmp_path / "log"
    run = faults.torchrun(2, *argv, log=log, restarts=1)
    try:
        until(lambda: (stage / "latest.pt").exists())
        os.kill(faults.workers(run.pid)[1], 9)
        until(lambda: "resuming" in log.read_text())
        assert "error in process 0: another process of this run is gone" in log.read_text()
        os.kill(faults.workers(run.pid)[1], 9)
        start = time.monotonic()
        assert run.wait(60) != 0 and time.monotonic() - start < 60
    finally:
        run.kill()
    assert log.read_text().count("another process of this run is gone") == 2
    together(tmp_path / "run", tmp_path / "resumed", argv)
    argv[argv.index("--folder") + 1] = str(tmp_path / "whole")
    together(tmp_path / "whole", tmp_path / "whole.log", argv)
    assert not differences(outcome(tmp_path / "whole"), outcome(tmp_path / "run"))


def together(folder, log, argv):
    """Two processes of one run, as torchrun starts them."""
    folder.mkdir(exist_ok=True)
    port = str(random.SystemRandom().randrange(20_000, 30_000))
    ranks = [Command("train", *argv, log=f"{log}.{rank}", faults=[
        ("note_saves", f"{log}.{rank}.notes")], env={
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0], "".join(rank.said() for rank in ranks)
    assert os.path.exists(f"{log}.0.notes") and not os.path.exists(f"{log}.1.notes")


# ---- A disk without room ----

@pytest.mark.parametrize("what", ["checkpoint", "sample", "metrics"])
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_it_goes_on_once_there_is_room(
        teacher, whole, tmp_path, what):
    with SmallDisk(tmp_path / "disk", "16m") as disk:
        folder, room = disk.folder / "run", disk.folder / "room"
        argv = flags(teacher, folder, *STAGE_1)
        said = finished("train", *argv, log=tmp_path / "full", code=1, faults=[
            ("full_disk", what, str(room)), ("note_saves", tmp_path / "notes")])
        assert re.search(r"error: cannot write .*(No space left|File too large|inline_container)",
                         one_line(said)), said
        assert not lost(folder, tmp_path / "notes") and not list(folder.rglob(".*.tmp"))
        room.unlink()
        assert ended(finished("train", *argv, log=tmp_path / "room.log"))
        assert not differences(whole, outcome(folder))


# ---- A run's files, damaged ----

def test_a_damaged_latest_is_never_loaded_nor_run_and_the_one_before_is_used(
        teacher, whole, half, tmp_path):
    good = (half / "stage1" / "latest.pt").read_bytes()
    kinds = list(faults.damages(good, random.Random(0), truncated=1, flipped=1))
    for number, (what, content) in enumerate([*kinds, ("code", None)]):
        stage = copied(half, tmp_path / f"run{number}")
        if content is None:
            faults.hostile_pickle(stage / "latest.pt")
        else:
            (stage / "latest.pt").write_bytes(content)
        argv = flags(teacher, stage.parent, *STAGE_1)
        said = finished("train", *argv, log=tmp_path / f"log{number}")
        assert said.count("warning: ") == 1 and ended(said) == 2, what
        assert re.search(r"warning: .*latest\.pt (is damaged|is not|holds no)", said), said
        assert not differences(whole, outcome(stage.parent)), what
        assert not list(stage.glob("*.exploded"))
    for name in ("latest.pt", "previous.pt"):
        (stage / name).write_bytes(b"")
    said = finished("train", *argv, log=tmp_path / "none", code=2)
    assert "no undamaged checkpoint in" in one_line(said)


def test_a_damaged_latest_takes_the_place_of_no_good_previous(tmp_path):
    for k in (1, 2):
        checkpoint.save_latest(tmp_path, {"iteration": k})
    (tmp_path / "latest.pt").write_bytes(b"damaged")
    (tmp_path / "newest.pt").write_bytes(b"damaged as well")        # of a crash between two renames
    checkpoint.save_latest(tmp_path, {"iteration": 3})
    assert [checkpoint.load(tmp_path / f"{name}.pt")["iteration"]
            for name in ("previous", "latest")] == [1, 3]
    assert not (tmp_path / "newest.pt").exists()


def test_half_a_line_of_metrics_a_moved_folder_and_a_clock_set_back_change_nothing(
        teacher, whole, half, tmp_path):
    stage = copied(half, tmp_path / "elsewhere" / "run")
    with open(stage / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "denoi')
    future = time.time() + 365 * 86400
    for path in stage.rglob("*"):
        os.utime(path, (future, future))
    said = finished("train", *flags(teacher, stage.parent, *STAGE_1), log=tmp_path / "log",
                    faults=[("clock_set_back",)])
    assert ended(said) == 4 and not differences(whole, outcome(stage.parent))


def test_best_is_replaced_by_a_better_one_or_where_it_is_damaged_and_never_by_a_worse(
        teacher, half, tmp_path):
    better = checkpoint.load(half / "stage1" / "best.pt") | {"best_fid": 1e-3}
    for name, forget in (("resumed", ()), ("begun again", ("latest.pt", "previous.pt"))):
        stage = copied(half, tmp_path / name)
        checkpoint.save(stage / "best.pt", better)
        before = (stage / "best.pt").read_bytes()
        for file in forget:
            (stage / file).unlink()
        finished("train", *flags(teacher, stage.parent, *STAGE_1), log=tmp_path / "log")
        assert (stage / "best.pt").read_bytes() == before
    judged_by = better["judged_by"]
    assert checkpoint.best_fid(stage, judged_by) == 1e-3
    (stage / "best.pt").write_bytes(before[:-1])
    assert checkpoint.best_fid(stage, judged_by) == math.inf == checkpoint.best_fid(
        tmp_path, judged_by)
    finished("train", *flags(teacher, stage.parent, *STAGE_1, iterations=8), "--force",
             log=tmp_path / "log")
    assert checkpoint.load(stage / "best.pt")["iteration"] == 8


@pytest.mark.parametrize("script, where", [("sample", "--checkpoint"), ("train", "--teacher"),
                                           ("evaluate", "--checkpoint")])
def test_a_checkpoint_with_a_right_checksum_and_wrong_content_is_one_line(
        teacher, tmp_path, script, where):
    good, path = checkpoint.load(teacher), tmp_path / "odd.pt"
    changes = [{"sigmas": ["80"]}, {"network": {}},
               {"network": good["network"] | {"model_channels": 2 ** 60}}, {"dataset": 5},
               {"network": good["network"] | {"channel_mult": [1] * 40}}, {"ema": {"a": 5}},
               {"ema": {}}, {"sigmas": None}, {"without": "sigmas"}, {"without": "ema"}]
    for change in changes:
        content = {k: v for k, v in (good | change).items() if k != change.get("without")}
        checkpoint.save(path, content)
        more = ["--n", 2] if script != "train" else ["--stage", 1]
        said = finished(script, where, path, *more, log=tmp_path / "log", code=2)
        assert "odd.pt" in one_line(said), change
        (tmp_path / "log").unlink()


# ---- Files from the net, through the command line ----

@pytest.fixture
def server(monkeypatch):
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()


def test_hostile_pickles_end_every_command_with_code_2_and_one_line_and_run_nothing(tmp_path):
    ran, path = tmp_path / "ran", tmp_path / "hostile.pkl"
    commands = [("sample", "--checkpoint", path), ("train", "--stage", 1, "--teacher", path),
                ("evaluate", "--checkpoint", path, "--n", 2)]
    for number, (name, content) in enumerate(hostile_pickles.code(f"touch {ran}")):
        path.write_bytes(content)
        script, *argv = commands[number % 3]
        said = finished(script, *argv, log=tmp_path / "log", code=2)
        assert "hostile.pkl: " in one_line(said), name
        assert not ran.exists(), name
        (tmp_path / "log").unlink()
    assert {p.name for p in tmp_path.iterdir()} == {"hostile.pkl"}


def test_a_server_that_answers_wrongly_ends_a_command_with_one_line_and_leaves_no_file(
        server, tmp_path):
    ran, name = tmp_path / "ran", "edm-cifar10-32x32-cond-vp"
    env = {"PMDD_MIRROR": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1"}
    argv = ["--checkpoint", name, "--n", 1, "--cache", tmp_path / "cache"]
    hostile = next(hostile_pickles.code(f"touch {ran}"))[1]
    for status, body, cut in ((404, b"", None), (200, b"<html>", None), (200, b"x" * 999, None),
                              (200, hostile, 50), (200, hostile, None)):
        server.status, server.body, server.cut = status, body, cut
        said = finished("sample", *argv, log=tmp_path / "log", code=2, env=env)
        assert name in one_line(said) and not ran.exists()
        (tmp_path / "log").unlink()
    assert not (tmp_path / "cache" / "converted").exists()
    for stale in (tmp_path / "cache").iterdir():        # as the line says: delete the record
        stale.unlink()
    server.body = (ROOT / "tests" / "golden" / "ddpmpp-cond-8.pkl").read_bytes()
    said = finished("sample", *argv, "--heun", 2, "--out", tmp_path / "a.png",
                    log=tmp_path / "log", env=env)
    assert "wrote" in said


# ---- The sources ----

CAUGHT = ["import pickle", "import pickle as p", "from pickle import loads", "import marshal",
          "import yaml\nyaml.load(x)", "import shelve", "from _pickle import load", "eval('1')",
          "exec('1')", "compile('1', '', 'eval')", "__import__('os')", "torch.load(path)",
          "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)",
          "import torch as t\nt.load(p)", "from torch import load\nload(p)",
          "from torch import load as read\nread(p, weights_only=0)", "np.load(p)",
          "np.load(p, allow_pickle=True)", "np.load(p, 'r', True)",
          "from numpy import load\nload(p)", "import numpy\nnumpy.load(p, allow_pickle=x)",
          "archive.extractall()",
          "archive.extract('a')", "tarfile.open(p).extractall(d)", "shutil.unpack_archive(p)",
          "os.system('ls')", "subprocess.run('ls', shell=True)",
          "import builtins\nbuiltins.eval(x)",
          "np.lib.format.read_array(f)", "zipfile.ZipFile(p).extract(n)"]
PASSED = ["import pickletools", "torch.load(p, map_location='cpu', weights_only=True)",
          "np.load(p, allow_pickle=False)", "network.eval()", "network.compile()",
          "archive.extractfile(m)", "file.load(p)", "json.load(f)", "subprocess.run(['ls'])",
          "import numpy\nnumpy.load(p, allow_pickle=False)", "re.compile('a')", "parser.exec_()"]


def test_the_scan_of_the_sources_finds_what_it_is_for():
    for source in CAUGHT:
        assert faults.violations(source), source
    for source in PASSED:
        assert not faults.violations(source), source


def test_no_source_reads_a_pickle_or_unpacks_an_archive_but_by_the_safe_ways():
    sources = [path for room in ("", *readme.ROOMS) for path in (ROOT / room).glob("*.py")]
    assert {"checkpoint.py", "pretrained.py", "real.py", "fid.py", "measure_fid_speed.py"} <= {
        path.name for path in sources}
    found = [line for path in sources
             for line in faults.violations(path.read_text(), str(path.relative_to(ROOT)))]
    assert not found
    assert sum("weights_only=True" in path.read_text() for path in sources) >= 3


# ---- Archives that point outside themselves ----

def image_bytes():
    content = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(content, format="PNG")
    return content.getvalue()


def array_bytes(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def hostile_zip(path, members, outside):
    """These members, and the same ones under names and as links that lead outside."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
            for lead in ("../../escaped-", "/absolute-escaped-", "..\\..\\escaped-", "a/../../up-"):
                archive.writestr(f"{lead}{name}", content)
        for name in ("link.png", "link.npy", "link/inside.png"):
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, str(outside))
    return path


def hostile_tar(path, members, outside):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            for lead in ("", "../../", "/", "a/../../../"):
                info = tarfile.TarInfo(f"{lead}{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            for target in (str(outside), "../../../" + outside.name):
                info = tarfile.TarInfo("data_batch_9.bin")
                info.type, info.linkname = kind, target
                archive.addfile(info)
    return path


def read_images(path):
    images = real.open_images(str(path))
    return images.take(range(len(images)))


READERS = {
    "images in a zip": (hostile_zip, "a.zip", {"a.png": image_bytes()}, read_images),
    "CIFAR-10's archive": (hostile_tar, "a.tar.gz", {"data_batch_1.bin": bytes(3073)},
                           read_images),
    "reference npz": (hostile_zip, "a.npz", {"mu.npy": array_bytes(np.zeros(3)),
                                             "sigma.npy": array_bytes(np.eye(3))},
                      fid.read_reference),
    "images in an npz": (hostile_zip, "a.npz", {"arr_0.npy": array_bytes(
        np.zeros((2, 8, 8, 1), np.uint8))}, lambda path: sets.open_npz(path).take([0, 1])),
}


@pytest.mark.parametrize("reader", READERS)
def test_no_member_of_an_archive_leaves_its_folder_when_it_is_read(reader, tmp_path):
    make, name, members, read = READERS[reader]
    folder, outside = tmp_path / "deep" / "folder", tmp_path / "secret"
    folder.mkdir(parents=True)
    outside.write_bytes(bytes(3073))
    path = make(folder / name, members, outside)
    before = sorted(tmp_path.rglob("*"))
    with Watched() as watched:
        try:
            assert read(path) is not None
        except UserError as error:                      # a link is no image
            assert "link" in str(error)
    assert not watched.outside and sorted(tmp_path.rglob("*")) == before
    assert str(outside) not in map(str, watched.read)
    assert any(str(opened) == str(path) for opened in watched.read)


@pytest.mark.parametrize("kind", ["checkpoint", "weights"])
def test_no_record_of_a_torch_file_leaves_its_folder_when_it_is_read(kind, tmp_path):
    whole, path = io.BytesIO(), tmp_path / "deep" / "a.pt"
    path.parent.mkdir()
    torch.save({"format": 1, "weights": torch.ones(3)}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
            new.writestr(f"../../escaped/{name}", old.read(name))
            new.writestr(f"/absolute/{name}", old.read(name))
    with Watched() as watched, pytest.raises(UserError, match="a.pt"):
        checkpoint.load(path) if kind == "checkpoint" else pretrained.load_network(path)
    assert not watched.outside and [p.name for p in tmp_path.rglob("*")] == ["deep", "a.pt"]


def test_watching_notices_what_is_written_outside(tmp_path):
    (tmp_path / "allowed").mkdir()
    with Watched(tmp_path / "allowed") as watched:
        (tmp_path / "allowed" / "a").write_text("x")
        assert not watched.outside
        (tmp_path / "b").write_text("x")
        (tmp_path / "b").rename(tmp_path / "c")
        (tmp_path / "allowed" / ".." / "d").mkdir()
    assert [os.path.basename(path) for _, path in watched.outside] == ["b", "b", "c", "d"]


# ---- Noise-image pairs ----

def test_pairs_cost_the_memory_of_one_part_to_check_and_none_to_hold(tmp_path):
    count, size = 16, 2048
    parts = [range(k * size, (k + 1) * size) for k in range(count)]
    for number, part in enumerate(parts):
        rows = np.zeros(size, [("z", np.float32, (1, 8, 8)), ("image", np.float16, (1, 8, 8)),
                               ("index", np.int64)])
        rows["z"] = np.random.default_rng(number).standard_normal((size, 1, 8, 8))
        rows["image"], rows["index"] = rows["z"], np.arange(size) + number
        content = array_bytes(rows)
        digest = hashlib.sha256(content).hexdigest()[:16]
        (tmp_path / f"{part[0]}-{part[-1]}-{digest}.npy").write_bytes(content)
    tracemalloc.start()
    try:
        pairs = kept.Rows([kept.open_part(tmp_path, part) for part in parts], size)
        opening = tracemalloc.get_traced_memory()[1]
        gc.collect()                                # what numpy's reading of the headers leaves
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        z, image, classes = pairs.take(range(0, count * size, size))
        taking = tracemalloc.get_traced_memory()[1] - held
    finally:
        tracemalloc.stop()
    assert len(pairs) == count * size and all(isinstance(p, np.memmap) for p in pairs.parts)
    assert opening < 1.5 * rows.nbytes and held < rows.nbytes / 10 and taking < rows.nbytes / 10
    assert torch.equal(classes, torch.arange(count))
    assert torch.equal(image, z.half()) and z.std() > 0.9
    for array in (z, image, classes):               # the file is only read
        array.zero_()
    assert pairs.take([1])[0].any()


def test_the_embedded_digits_say_how_to_bring_them_back(tmp_path, monkeypatch):
    for content in (b"", b"PK", real.DIGITS.read_bytes()[:-99]):
        (tmp_path / "digits.npz").write_bytes(content)
        monkeypatch.setattr(real, "DIGITS", tmp_path / "digits.npz")
        with pytest.raises(UserError, match="digits.npz is damaged .* git checkout") as caught:
            real.open_images("digits")
        assert "\n" not in str(caught.value)


def test_a_student_can_be_drawn_from_a_folder_that_was_moved(tmp_path):
    save_student(tmp_path / "before" / "run" / "stage3" / "best.pt", model_channels=8)
    (tmp_path / "before").rename(tmp_path / "after")
    finished("sample", "--checkpoint", tmp_path / "after" / "run" / "stage3" / "best.pt", "--n", 1,
             "--out", tmp_path / "a.png", log=tmp_path / "log")
