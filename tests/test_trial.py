"""What a hard trial found: every way in which a command once misled its user, and what it does now.

In groups: images, files, references and scores, streams and memory, checkpoints, image folders,
stopping, the progress bar, what commands say, pictures, small differences to the published code.
"""

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

import evaluate
import sample
import train
from base import progress
from base.errors import RunFailed, UserError, explained, run
from base.files import hidden_beside, write_atomically
from edm_networks import UNetBlock
from fid import InceptionScore, read_reference, write_reference
from helpers import small_network
from images import sets
from images.captioned import open_captioned
from images.pictures import comparison
from images.real import open_images
from metrics.inception import read_weights
from models import SeededNoise
from presets.config import Config
from presets.datasets import PMDD_SIGMAS
from training import log, roles
from training.run_folder import Metrics
from weights import checkpoint
from weights.opening import open_network
from weights.pretrained import load_network

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ("--stage", 1, "--batch", 8, "--folder", "run", "--evaluate-every", 0)


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Runs a script in an empty folder as the shell would: exit code, what it said, its errors."""
    monkeypatch.chdir(tmp_path)

    def called(script, *args):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            run(script.main)
        said = capfd.readouterr()
        return stopped.value.code or 0, said.out, said.err

    return called


def payload(steps=3, **changes):
    """What a checkpoint of a student holds, or with steps=0 of a teacher."""
    network = small_network(**changes)
    return {"dataset": "digits", "method": "pmdd", "stage": steps, "iteration": 10, "fid": {},
            "sigmas": list(PMDD_SIGMAS[:steps]), "network": network.config,
            "ema": network.state_dict()}


def last_line(text):
    """The only line that says "error", which is the last."""
    lines = text.strip().splitlines()
    assert [line for line in lines if "error" in line] == lines[-1:], text
    return lines[-1]


# ---- Images that are not finite ----

@pytest.mark.parametrize("steps", [0, 2])
def test_weights_that_are_not_finite_give_no_images_and_no_record(command, steps):
    broken = payload(steps)
    broken["ema"]["model.map_layer0.bias"][0] = torch.nan
    checkpoint.save("broken.pt", broken)
    for flags in ((sample, "--out", "a.png"), (sample, "--out", "a.zip"), (sample, "--out", "a"),
                  (evaluate,)):
        code, _, err = command(*flags, "--checkpoint", "broken.pt", "--n", 20)
        assert code == 2 and "seeds 0 to 1" in last_line(err) and "not finite" in last_line(err)
    assert [path.name for path in Path().iterdir()] == ["broken.pt"]


# ---- Files: what may be replaced, and what a kill leaves ----

@pytest.fixture
def drawn(command):
    """A folder "images" with four samples of student.pt, and the command that replaces it."""
    checkpoint.save("student.pt", payload())
    draw = partial(command, sample, "--checkpoint", "student.pt", "--n", 4, "--out", "images")
    assert draw()[0] == 0
    return draw


def test_force_replaces_what_sample_wrote_itself(drawn):
    before = {path.name: path.stat().st_mtime_ns for path in Path("images").iterdir()}
    assert drawn()[0] == 2 and drawn("--force", "--seeds", "2-3", "--steps", 1)[0] == 2
    assert drawn("--force")[0] == 0
    after = {path.name: path.stat().st_mtime_ns for path in Path("images").iterdir()}
    assert before.keys() == after.keys() and all(after[name] > before[name] for name in before)


@pytest.mark.parametrize("name", ["holiday.png", "000009.png", "notes.txt", ".hidden"])
def test_force_deletes_nothing_that_sample_did_not_write(drawn, name):
    (Path("images") / name).write_bytes(b"mine")
    before = {path.name: path.read_bytes() for path in Path("images").iterdir()}
    code, _, err = drawn("--force")
    assert code == 2 and f"holds {name}, which sample.py did not write" in last_line(err)
    assert {path.name: path.read_bytes() for path in Path("images").iterdir()} == before


def test_force_leaves_a_data_set_alone_whose_dataset_json_lists_its_images(drawn):
    shutil.rmtree("images")
    Path("images").mkdir()
    Path("images/000000.png").write_bytes(b"mine")
    Path("images/dataset.json").write_text('{"labels": [["000000.png", 1]]}')
    assert drawn("--force")[0] == 2 and Path("images/000000.png").read_bytes() == b"mine"


def test_a_folder_that_is_a_link_stays_one(drawn):
    Path("images").rename("elsewhere")
    Path("images").symlink_to("elsewhere")
    assert drawn("--force", "--n", 3)[0] == 0 and Path("images").is_symlink()
    assert sorted(path.name for path in Path("elsewhere").iterdir()) == [
        *(f"{k:06d}.png" for k in range(3)), "dataset.json"]


def test_a_folder_that_is_a_whole_disk_is_refused_before_anything_is_drawn(drawn, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path.name == "elsewhere")
    Path("images").rename("elsewhere")
    Path("images").symlink_to("elsewhere")
    code, _, err = drawn("--force")
    assert code == 2 and "images is the top of a disk; name a folder in it" in last_line(err)


def test_what_came_into_the_folder_meanwhile_and_what_lies_outside_it_survive(drawn):
    def blocks():
        Path("images/late.png").write_bytes(b"mine")
        yield [0], [np.zeros((1, 1, 8, 8), np.uint8)], None

    Path("outside.png").write_bytes(b"mine")
    listed = json.loads(Path("images/dataset.json").read_text())
    listed["sampled"].append("../outside.png")
    Path("images/dataset.json").write_text(json.dumps(listed))
    sets.write_folder(Path("images"), blocks())
    assert Path("images/late.png").read_bytes() == Path("outside.png").read_bytes() == b"mine"
    assert sorted(path.name for path in Path("images").iterdir()) == [
        "000000.png", "dataset.json", "late.png"]
    assert not list(Path().glob(".images*"))


@pytest.mark.parametrize("out", ["a.zip", "a.npz", "a", "a.png"])
def test_a_command_clears_away_what_a_killed_one_was_writing_there(command, out):
    checkpoint.save("student.pt", payload())
    (Path() / f".{out}.4194304.tmp").mkdir()
    (Path() / f".{out}.4194304.tmp" / "000000.png").write_bytes(b"half")
    (Path() / f".{out}.77.tmp").write_bytes(b"half")
    for other in (".b.zip.77.tmp", f".{out}.tmp", f"{out}.77.tmp"):     # another's
        (Path() / other).write_bytes(b"")
    assert command(sample, "--checkpoint", "student.pt", "--n", 2, "--out", out)[0] == 0
    assert sorted(path.name for path in Path().iterdir()) == sorted(
        [out, "student.pt", ".b.zip.77.tmp", f".{out}.tmp", f"{out}.77.tmp"])


@pytest.mark.parametrize("folder", [False, True])
def test_what_another_process_is_writing_stays(tmp_path, folder):
    other = tmp_path / ".a.77.tmp"
    other.mkdir() if folder else other.touch()
    handle = os.open(other, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    write_atomically(tmp_path / "a", lambda temporary: temporary.write_text("new"))
    assert other.exists()
    os.close(handle)
    write_atomically(tmp_path / "a", lambda temporary: temporary.write_text("newer"))
    assert not other.exists() and (tmp_path / "a").read_text() == "newer"


KILLED = """
import os, signal, sys
from pathlib import Path
from base.files import hidden_beside
with hidden_beside(Path(sys.argv[1]), folder=True) as temporary:
    (temporary / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_real_kill_leaves_a_folder_that_the_next_clears(tmp_path):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL and len(list(tmp_path.rglob("half"))) == 1
    with hidden_beside(out, folder=True) as temporary:
        assert list(tmp_path.iterdir()) == [temporary]
    assert list(tmp_path.iterdir()) == []


def test_a_run_clears_temporary_files_in_the_folders_below_it_too(command):
    for name in (".best.pt.7.tmp", "pairs/.0-9-ab.npy.7.tmp", "samples/.000001.png.7.tmp"):
        path = Path("run/stage1") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    assert command(train, *TRAIN, "--iterations", 1)[0] == 0
    assert list(Path().rglob(".*.tmp")) == []


# ---- References and scores ----

def test_a_reference_whose_sigma_is_no_covariance_is_refused(tmp_path):
    path = tmp_path / "reference.npz"
    write_reference(path, np.zeros(3), np.diag([1.0, 2.0, -0.1]))
    with pytest.raises(UserError, match="no covariance: it has the eigenvalue -0.1, below 0"):
        read_reference(path)
    write_reference(path, np.zeros(2), [[1.0, 2.0], [2.0, 1.0]])        # eigenvalues 3 and -1
    with pytest.raises(UserError, match="the eigenvalue -1, below 0"):
        read_reference(path)


def test_a_reference_of_fewer_images_than_features_is_one_though_it_rounds_below_zero(tmp_path):
    features = np.random.default_rng(0).standard_normal((20, 50))
    covariance = np.cov(features, rowvar=False)
    path = tmp_path / "reference.npz"
    for sigma in (covariance, covariance.astype(np.float32)):
        assert np.linalg.eigvalsh(sigma.astype(np.float64))[0] < 0
        write_reference(path, features.mean(0), sigma)
        assert np.array_equal(read_reference(path)[1], sigma.astype(np.float64))


@pytest.mark.parametrize("images", [25, 99, 101, 1000])
def test_the_inception_scores_parts_are_those_of_its_first_code(images):
    """preds[(i * N // splits):((i + 1) * N // splits)] of arXiv:1606.03498."""
    logits = torch.randn(images, 7, generator=torch.Generator().manual_seed(images))
    p, N, expected = logits.double().softmax(1), images, []
    for i in range(10):
        part = p[i * N // 10:(i + 1) * N // 10]
        divergence = part * (part.log() - part.mean(0, keepdim=True).log())
        expected.append(divergence.sum(1).mean().exp())
    score = InceptionScore(images, classes=7)
    for batch in torch.randperm(images).split(8):
        score.add(batch, logits[batch])
    assert score.n.tolist() == [(i + 1) * N // 10 - i * N // 10 for i in range(10)]
    assert score.value()[0] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-12)


def test_a_class_that_the_scoring_network_does_not_know_is_refused(command):
    Path("images").mkdir()
    for k in range(12):
        Image.fromarray(np.full((8, 8), 20 * k, np.uint8)).save(f"images/{k}.png")
    labels = [[f"{k}.png", k % 11] for k in range(12)]
    Path("images/dataset.json").write_text(json.dumps({"labels": labels}))
    code, _, err = command(evaluate, "--images", "images")
    assert code == 2 and "images has class 10, out of range: digits-features knows 0 to 9" in err
    assert not Path("evaluation.json").exists()
    labels[10][1] = 9
    Path("images/dataset.json").write_text(json.dumps({"labels": labels}))
    assert command(evaluate, "--images", "images")[0] == 0


# ---- Streams and memory ----

def script(body):
    return ("import signal, sys, os\nfrom base.errors import UserError, run\n"
            f"def main():\n    {body}\n    return 0\nrun(main)")


@pytest.mark.parametrize("body", ["print('done', flush=True)", "print('done')",
                                  "raise UserError('wrong')", "sys.exit(0)"])
@pytest.mark.parametrize("streams", ["> /dev/full", "2> /dev/full", "> /dev/full 2>&1", ">&-",
                                     "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_full_or_closed_stream_is_no_traceback(body, streams):
    python = f"exec {sys.executable} -c \"$BODY\" {streams}"
    done = subprocess.run(["bash", "-c", python], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"BODY": script(body)})
    full = "print" in body and streams.startswith(">") and "full" in streams
    assert done.returncode == (2 if "wrong" in body else 1 if full else 0)
    shown = "" if "2>" in streams else (
        "error: cannot write: No space left on device\n" if full else
        "error: wrong\n" if "wrong" in body else "")
    assert done.stderr == shown


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    body = f"file = open('{tmp_path}/file', 'w'); os.write(2, b'a warning')"
    done = subprocess.run(["bash", "-c", f"exec {sys.executable} -c \"$BODY\" <&- >&- 2>&-"],
                          cwd=ROOT, env=os.environ | {"BODY": script(body)})
    assert done.returncode == 0 and (tmp_path / "file").read_text() == ""


def test_a_full_log_does_not_stop_the_work(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert list(progress.progress(range(3))) == [0, 1, 2]
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())        # else its close complains


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_an_error_begins_a_line_of_its_own_below_the_progress_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def main():
        bar = tqdm(total=5, file=terminal, mininterval=0)
        bar.update(3)
        raise UserError("wrong")

    with pytest.raises(SystemExit):
        run(main)
    assert "3/5" in terminal.getvalue() and terminal.getvalue().endswith("\nerror: wrong\n")


def test_a_batch_beyond_the_memory_is_one_line_and_leaves_no_folder(command):
    for batch in (10 ** 13, 10 ** 18):
        code, _, err = command(train, *TRAIN[:2], "--folder", "run", "--batch", batch)
        assert code == 1 and "--batch-per-gpu" in last_line(err) and "memory is full" in err
        assert list(Path().iterdir()) == []


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                                   np.linalg.LinAlgError])
def test_every_kind_of_full_memory_is_told_as_one(error):
    if error is np.linalg.LinAlgError:
        assert explained(error("not of memory")) is None
    else:
        assert explained(error)[0] == 1 and "--batch-per-gpu" in explained(error)[1]


@pytest.mark.parametrize("error", [
    shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]),
    SafetensorError("I/O error: No space left on device (os error 28)")])
def test_a_full_disk_is_told_as_that_by_whoever_finds_it(error):
    assert explained(error) == (1, "error: cannot write: No space left on device")


@pytest.mark.parametrize("out", ["a.zip", "a.npz", "a", "a.png"])
def test_a_memory_that_fills_while_sampling_is_told_as_that(command, monkeypatch, out):
    def full(*args):
        torch.empty(10 ** 15)

    checkpoint.save("student.pt", payload())
    monkeypatch.setattr(sample, "sample_block", full)
    code, _, err = command(sample, "--checkpoint", "student.pt", "--n", 2, "--out", out)
    assert code == 1 and "the memory is full" in last_line(err)
    assert [path.name for path in Path().iterdir()] == ["student.pt"]


# ---- Checkpoints and weights ----

WEIGHT = "model.map_layer0.weight"
NO_WEIGHTS = {
    "sparse": lambda weight: weight.to_sparse(), "csr": lambda weight: weight.to_sparse_csr(),
    "int8": lambda weight: (weight * 9).to(torch.int8), "bool": lambda weight: weight > 0,
    "complex": lambda weight: weight.to(torch.complex64),
    "one number for all": lambda weight: weight[:1, :1].clone().expand_as(weight),
    "no tensor": lambda weight: weight.tolist()}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_weights_that_are_no_dense_floats_are_refused(command, kind):
    broken = payload()
    broken["ema"][WEIGHT] = NO_WEIGHTS[kind](broken["ema"][WEIGHT])
    checkpoint.save("broken.pt", broken)
    with pytest.raises(checkpoint.DamagedCheckpoint, match="no dense floating-point numbers"):
        checkpoint.load("broken.pt", needs=checkpoint.SAMPLED)
    torch.save({name.removeprefix("model."): w for name, w in broken["ema"].items()}, "broken.bin")
    for name in ("broken.pt", "broken.bin"):
        code, _, err = command(sample, "--checkpoint", name, "--n", 1, "--out", "a.png")
        assert code == 2 and name in last_line(err) and not Path("a.png").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_any_width_are_taken(tmp_path, dtype):
    good = payload()
    good["ema"] = {name: weight.to(dtype) for name, weight in good["ema"].items()}
    checkpoint.save(tmp_path / "good.pt", good)
    network = open_network(tmp_path / "good.pt").network
    assert torch.equal(network.state_dict()[WEIGHT], good["ema"][WEIGHT].float())


def test_moments_of_adam_that_are_no_dense_floats_are_refused(tmp_path):
    moment = torch.eye(3)
    for broken in (moment.to_sparse(), moment.to(torch.int64), moment.to(torch.complex64)):
        content = payload() | {"optimizers": [{"state": {0: {"exp_avg": broken}},
                                               "param_groups": []}]}
        checkpoint.save(tmp_path / "latest.pt", content)
        with pytest.raises(checkpoint.DamagedCheckpoint, match="no dense floating-point numbers"):
            checkpoint.load(tmp_path / "latest.pt", needs=["optimizers"])


@pytest.mark.parametrize("sigmas", [[torch.nan], [80.0, torch.nan], [torch.inf], [1.0, 1.0], [-1.0],
                                    [0.0], [1.0, 2.0]])
def test_sigmas_that_no_student_can_have_are_refused(tmp_path, sigmas):
    checkpoint.save(tmp_path / "a.pt", payload() | {"sigmas": sigmas})
    with pytest.raises(checkpoint.DamagedCheckpoint, match="sigmas that are no numbers which fall"):
        checkpoint.load(tmp_path / "a.pt")


@pytest.mark.parametrize("read", [load_network, checkpoint.load, read_weights])
def test_a_file_that_would_grow_is_refused_before_it_does(tmp_path, monkeypatch, read):
    plain, bomb = tmp_path / "plain.pt", tmp_path / "bomb.pt"
    torch.save({WEIGHT: torch.zeros(1 << 22)}, plain)
    with zipfile.ZipFile(plain) as whole, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as small:
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    assert bomb.stat().st_size < 1 << 15
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("it was read"))
    monkeypatch.setattr(checkpoint, "undamaged", lambda path: True)
    with pytest.raises(UserError, match="bomb.pt.*(unpacks to 16,|is not a checkpoint)"):
        read(bomb)


# ---- Folders of images ----

def png(pixels, mode=None):
    content = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels, mode)
    image.save(content, format="PNG")
    return content.getvalue()


def folder_of(path, files, labels=None):
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    if labels is not None:
        (path / "dataset.json").write_text(json.dumps({"labels": labels}))
    return path


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3


@pytest.mark.parametrize("labels, told", [
    ([["a.png", 0], ["b.png", 1], ["c.png", 0]], "names c.png, which is no image there"),
    ([["a.png", 0], ["b.png", 1], ["a.png", 1]], "names a.png, twice"),
    ([["a.png", 0], ["b.png", 1], ["a.png", 0]], "names a.png, twice")])
def test_a_dataset_json_names_what_is_there_and_once(tmp_path, labels, told):
    folder = folder_of(tmp_path / "set", {"a.png": png(GREY), "b.png": png(GREY)}, labels)
    shutil.make_archive(str(folder), "zip", folder)
    for source in (folder, tmp_path / "set.zip"):
        for opened in (open_images, partial(open_captioned, size=8)):
            with pytest.raises(UserError, match=told):
                opened(source)


def test_palettes_and_alpha_that_show_greys_are_grey_among_grey_images(tmp_path):
    palette = Image.fromarray(GREY).convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    shown = np.array(palette.convert("RGB"))
    assert (shown == shown[..., :1]).all() and len(np.unique(shown)) == 64
    rgba = np.dstack([GREY, GREY, GREY, np.full_like(GREY, 255)])
    images = open_images(folder_of(tmp_path / "set", {
        "a.png": png(GREY), "b.png": png(palette), "c.png": png(rgba),
        "d.png": png(rgba[..., :3])}))
    assert images.shape == (1, 8, 8)
    pixels = images.take(range(4))[0].numpy()
    assert np.array_equal(pixels[[0, 2, 3], 0], np.stack([GREY] * 3))
    assert np.array_equal(pixels[1, 0], shown[..., 0])


def test_an_image_in_colour_among_grey_ones_is_told_as_that(tmp_path):
    colour = np.dstack([GREY, GREY, GREY[::-1]])
    for name, image in (("rgb", colour), ("palette", Image.fromarray(colour).quantize(8))):
        images = open_images(folder_of(tmp_path / name, {"a.png": png(GREY), "b.png": png(image)}))
        with pytest.raises(UserError) as caught:
            images.take([1])
        assert ("b.png is 8x8 with 3 channel(s), but a.png is 8x8 with 1 channel(s); all images "
                "must have one size, and be grey or in colour") in str(caught.value)


# ---- Stopping ----

def signalled(number, at):
    """train.iteration, with a signal that arrives in the iteration numbered `at`."""
    real, count = train.iteration, iter(range(100))

    def iterate(*args):
        if next(count) == at:
            os.kill(os.getpid(), number)
        return real(*args)

    return iterate


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_batch_systems_signal_saves_and_leaves_and_the_same_command_goes_on(
        command, monkeypatch, name):
    with monkeypatch.context() as patched:
        patched.setattr(train, "iteration", signalled(signal.Signals[name], at=1))
        code, out, _ = command(train, *TRAIN, "--iterations", 4)
    assert code == 3 and f"{name}: saved after 2 iterations" in out
    assert checkpoint.load("run/stage1/latest.pt")["iteration"] == 2
    assert command(train, *TRAIN, "--iterations", 4)[0] == 0
    assert checkpoint.load("run/stage1/latest.pt")["iteration"] == 4


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGHUP"])
def test_a_signal_where_there_is_nothing_to_save_cleans_up(name):
    body = f"os.kill(os.getpid(), signal.{name})"
    done = subprocess.run([sys.executable, "-c", f"import signal\nsignal.signal(signal.{name}, "
                           f"signal.SIG_DFL)\n{script(body)}"], cwd=ROOT, capture_output=True,
                          text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_run_folder_deleted_meanwhile_is_not_called_intact(command, monkeypatch):
    real, count = train.iteration, iter(range(100))

    def iterate(*args):
        if next(count) == 1:
            shutil.rmtree("run")
        return real(*args)

    monkeypatch.setattr(train, "iteration", iterate)
    code, _, err = command(train, *TRAIN, "--iterations", 4)        # saves at its end
    assert code == 1 and "run/stage1 is gone" in last_line(err) and "intact" not in err


def test_what_is_left_is_told_as_it_is(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.path.unlink()
    metrics.path.mkdir()                                        # so that no line can be written
    with pytest.raises(RunFailed, match="there is no checkpoint yet"):
        metrics.write(iteration=0)
    (tmp_path / "latest.pt").touch()
    with pytest.raises(RunFailed, match="the last checkpoint is intact"):
        metrics.write(iteration=0)
    shutil.rmtree(tmp_path)
    with pytest.raises(RunFailed, match="is gone, and what was saved in it"):
        metrics.write(iteration=0)


def test_a_teacher_that_is_not_finite_is_told_of_no_checkpoint(command):
    teacher = payload(0)
    teacher["ema"]["model.map_layer0.bias"][0] = torch.nan
    checkpoint.save("teacher.pt", teacher)
    code, _, err = command(train, *TRAIN, "--iterations", 2, "--teacher", "teacher.pt")
    said = last_line(err)
    assert code == 1 and "iteration 0" in said and "there is no checkpoint yet" in said
    assert "the teacher or the images may not be finite" in said and "--force" not in said
    assert [path.name for path in Path().iterdir()] == ["teacher.pt"]


def test_compiling_is_said_and_a_signal_that_reaches_the_compiler_ends_as_a_signal(
        command, monkeypatch):
    monkeypatch.setattr(roles, "compile_network", lambda network: None)
    flags = (*TRAIN, "--iterations", 2, "--compile")
    code, out, _ = command(train, *flags)
    assert code == 0 and "compiling the networks" in out
    assert "compiling" not in command(train, *flags[:-1])[1]

    def interrupted(*args):                                     # a process group's signal
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("CppCompileError: C++ compile error")

    monkeypatch.setattr(train, "iteration", interrupted)
    code, out, err = command(train, *flags[:-1], "--iterations", 3, "--compile", "--force")
    assert code == 3 and "Traceback" not in err
    assert "SIGTERM stopped torch.compile too; the last checkpoint is intact" in out
    code, out, _ = command(train, *flags, "--folder", "new")
    assert code == 3 and "there is no checkpoint yet" in out and not Path("new").exists()
    for other in (SystemExit(3), KeyboardInterrupt(), MemoryError()):   # not the compiler's
        def ended(*args, other=other):
            os.kill(os.getpid(), signal.SIGTERM)
            raise other

        monkeypatch.setattr(train, "iteration", ended)
        with pytest.raises(type(other)):
            train.main([*map(str, flags[:-1]), "--iterations", "3", "--compile", "--force"])
    monkeypatch.setattr(train, "iteration", lambda *args: 1 / 0)        # and a mistake as a mistake
    with pytest.raises(ZeroDivisionError):
        train.main([*map(str, flags[:-1]), "--iterations", "3", "--compile", "--force"])


# ---- The progress bar ----

class Bar:
    """What a run shows, update by update."""

    def __init__(self, **how):
        self.n, self.shown = 0, []

    def update(self, n):
        self.n += n

    def set_postfix(self, shown, refresh=True):
        self.shown.append(dict(shown))

    def write(self, text):
        pass

    close = write_line = lambda self: None


def bar_of(command, monkeypatch, *flags):
    bars = []
    monkeypatch.setattr(log, "progress", lambda **how: bars.append(Bar()) or bars[-1])
    assert command(train, *TRAIN[:-2], *flags)[0] == 0
    return bars[0].shown


def test_the_bar_shows_one_loss_throughout_and_the_best_once_there_is_one(command, monkeypatch):
    shown = bar_of(command, monkeypatch, "--iterations", 12, "--ttur", 2, "--evaluate-every", 12,
                   "--evaluate-images", 20)
    lines = [json.loads(line) for line in Path("run/stage1/metrics.jsonl").read_text().splitlines()]
    losses = [line["distill"] for line in lines if "distill" in line]
    assert [line["iteration"] for line in lines] == [0, 10, 11, 11]
    # Iteration 11 is not the student's turn: the loss of 10 stays, and no other takes its name.
    assert [one["distill"] for one in shown] == [f"{loss:.3g}" for loss in
                                                 (*losses, losses[-1], losses[-1])]
    assert not any("denoising" in one or "loss" in one for one in shown)
    assert ["best" in one for one in shown] == [False, False, False, True]
    assert shown[-1]["best"] == f"{lines[-1]['digits-FID@1']:.4g}"


def test_without_a_distillation_loss_the_bar_names_the_one_that_it_shows(command, monkeypatch):
    shown = bar_of(command, monkeypatch, "--method", "dmd2", "--loss", "none", "--evaluate-every",
                   0, "--iterations", 2)
    assert shown and all(set(one) == {"denoising", "brightness"} for one in shown)


# ---- What commands say ----

def test_data_that_nothing_reads_is_said(command):
    assert "--data mine.zip: nothing reads it" in command(
        train, *TRAIN, "--iterations", 1, "--data", "mine.zip")[1]
    assert "nothing reads" not in command(train, *TRAIN, "--iterations", 1, "--force")[1]
    code, out, err = command(train, "--method", "dmd2", *TRAIN, "--data", "mine.zip", "--folder",
                             "other")
    assert code == 2 and "no images at mine.zip" in err and "nothing reads" not in out


@pytest.mark.parametrize("seeds", ["4294967296", "0-4294967296", "5," + "9" * 30, "0-100000000",
                                   "0-60000000,70000000-130000000"])
def test_the_limits_of_seeds_are_named(seeds):
    with pytest.raises(UserError, match="100,000,000 seeds from 0 to 4,294,967,295, as larger ones "
                                        "draw no other images"):
        sample.parse_seeds(seeds)


def test_the_largest_seed_is_the_last_that_draws_an_image_of_its_own():
    def first(seed):
        return torch.randn(4, generator=torch.Generator().manual_seed(seed)).tolist()

    last, = sample.parse_seeds("4294967295")
    assert first(last) != first(0) and first(last + 1) == first(0)
    SeededNoise([0, last], (1, 2, 2), "cpu")
    for seeds in ([0, last + 1], [-1]):
        with pytest.raises(ValueError, match="allowed are 0 to 4294967295"):
            SeededNoise(seeds, (1, 2, 2), "cpu")
    with pytest.raises(UserError, match="--repeats 43: its seeds go beyond 4,294,967,295"):
        evaluate.parse(["--repeats", "43", "--n", "100000000"])
    assert evaluate.parse(["--repeats", "42", "--n", "100000000"]).repeats == 42


@pytest.mark.parametrize("flags, said", [
    ({}, "taken for a one-step student, as of SiD, at sigma 2.5; of a teacher say --teacher"),
    ({"teacher": True}, ""), ({"sigmas": [3.0]}, "")])
def test_a_pickle_that_does_not_say_what_it_is_is_said_to_be_taken_for_a_student(
        tmp_path, capsys, flags, said):
    opened = open_network(ROOT / "tests/golden/ddpmpp-cond-8.pkl", cache=tmp_path, **flags)
    assert opened.sigmas == tuple([] if "teacher" in flags else flags.get("sigmas", [2.5]))
    out = capsys.readouterr().out
    assert said in out and bool(said) == bool(out)


# ---- Pictures ----

@pytest.mark.parametrize("count, blocks, columns", [(3, 1, 3), (10, 1, 10), (12, 2, 6), (30, 3, 10),
                                                    (25, 3, 9)])
def test_a_comparison_wraps_into_blocks_of_at_most_ten_columns(count, blocks, columns):
    variants = [np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1) + 100 * k for k in range(2)]
    picture = np.array(comparison(variants, ["teacher", "1 step"]))
    cells = picture[25::49, -(columns * 49 + 1):][:, 25::49]        # the middle of each image
    assert cells.shape == (2 * blocks, columns)
    for block in range(blocks):
        for row in range(2):
            numbers = range(block * columns, (block + 1) * columns)
            assert cells[2 * block + row].tolist() == [
                number + 100 * row if number < count else 255 for number in numbers]
    assert picture.shape[1] - (columns * 49 + 1) < 100 and picture.shape[0] == 2 * blocks * 49 + 1


def test_a_picture_of_one_class_has_its_name_beside_it(command):
    checkpoint.save("student.pt", payload())
    flags = ("--checkpoint", "student.pt", "--n", 20, "--steps", 1)
    for out, labels in (("one", ("--class", 3)), ("other", ("--class", 8))):
        assert command(sample, *flags, *labels, "--out", f"{out}.png")[0] == 0
    one, other = (np.array(Image.open(f"{name}.png")) for name in ("one", "other"))
    assert one.shape == (2 * 49 + 1, 10 * 49 + 1 + one.shape[1] - 491) and one.shape[1] > 491
    margin = one[:, :-491]
    assert (margin < 100).any() and not np.array_equal(margin, other[:, :-491])


# ---- Small differences to the published code ----

@pytest.mark.parametrize("width, heads", [(32, 1), (48, 1), (64, 1), (96, 1), (128, 2), (160, 2)])
def test_adm_attends_with_a_64th_of_its_width_heads_and_with_one_where_that_is_none(width, heads):
    torch.manual_seed(0)
    block = UNetBlock(width, width, emb_width=8, adm=True, attention=True).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, width, 3, 3, dtype=torch.float64)
    q, k, v = block.qkv(x).reshape(2, heads, width // heads, 3, 9).unbind(3)
    weights = torch.einsum("bhcq,bhck->bhqk", q, k).div((width // heads) ** 0.5).softmax(-1)
    attended = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(2, width, 3, 3)
    assert torch.allclose(block.attend(x), block.proj(attended), rtol=1e-9, atol=1e-12)


def test_adm_networks_of_any_width_that_their_heads_can_share_are_built():
    for width in (32, 40, 96, 160):
        network = small_network(model_type="DhariwalUNet", model_channels=width, channel_mult=[1])
        assert network(torch.randn(1, 1, 8, 8), torch.ones(1)).isfinite().all()
    with pytest.raises(ValueError, match="model_channels is 224.*the width // 64 heads of "
                                         "attention, which is 3 for a width of 224"):
        small_network(model_type="DhariwalUNet", model_channels=224, channel_mult=[1])


def rates(config, steps):
    optimizer = SimpleNamespace(param_groups=[{}, {}])
    found = []
    for step in steps:
        train.set_rate(config, step, [optimizer])
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert first == second
        found.append(first)
    return found


def test_the_rate_rises_linearly_over_the_warm_up_and_then_falls_as_ever():
    config = Config(iterations=100, learning_rate=0.5, warm_up=8)
    assert rates(config, (0, 1, 4, 8, 50)) == [0, 0.5 / 8, 0.25, 0.5, 0.5]
    falling = Config(iterations=100, learning_rate=1.0, final_rate=0.2, warm_up=8)
    assert rates(falling, (0, 4, 8, 50)) == pytest.approx([0, 0.5 * 0.968, 0.936, 0.6])
    before = [0.3 * (1 - (1 - 0.05) * (step / 7)) for step in range(7)]
    assert rates(Config(iterations=7, learning_rate=0.3, final_rate=0.05), range(7)) == before


def test_at_a_rate_of_zero_the_first_update_moves_nothing(command):
    assert command(train, *TRAIN, "--iterations", 1, "--warm-up", 4)[0] == 0
    still = checkpoint.load("run/stage1/latest.pt")["student"]
    assert command(train, *TRAIN, "--iterations", 1, "--folder", "other")[0] == 0
    moved = checkpoint.load("other/stage1/latest.pt")["adapted"]
    teacher = checkpoint.load(ROOT / "assets/digits-teacher.pt")["ema"]
    assert all(torch.equal(still[name], teacher[name]) for name in teacher)
    assert not all(torch.equal(moved[name], teacher[name]) for name in teacher)
    code, _, err = command(train, *TRAIN, "--warm-up", -1)
    assert code == 2 and "--warm-up is -1; allowed: 0 or more" in err
