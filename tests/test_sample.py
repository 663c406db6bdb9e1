"""sample.py: what is drawn, from what, into which files, and what is refused."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from base import distributed
from base.errors import UserError
from faults import until
from helpers import GOLDEN, ROOT, call, in_ranks, save_student, small_network, torchrun
from images import from_seeds, sets
from images.real import open_images
from models import sample_heun, sample_seeds, sample_student, to_uint8
from presets.datasets import PMDD_SIGMAS
from weights import checkpoint, opening
from weights.pretrained import load_network

CPU = torch.device("cpu")


@pytest.fixture
def student(tmp_path, monkeypatch):
    """A folder to work in, with student.pt and teacher.pt; returns the student's network."""
    monkeypatch.chdir(tmp_path)
    save_student(tmp_path / "teacher.pt", steps=0, seed=1)
    return save_student(tmp_path / "student.pt")


def direct(network, seeds, sigmas=PMDD_SIGMAS, classes=None):
    """The images [N,C,H,W] and classes that the models' own functions give."""
    sampler = partial(sample_student, sigmas=sigmas)
    images, classes = sample_seeds(network, list(seeds), sampler, classes)
    return to_uint8(images).numpy(), classes


def nearly_equal(images, expected):
    """Equal but for rounding: batches of another size may sum in another order."""
    gap = np.abs(images.astype(int) - expected.astype(int))
    return gap.max() <= 1 and (gap > 0).mean() < 1e-3


def read_npz(path):
    with np.load(path, allow_pickle=False) as file:
        return file["arr_0"].transpose(0, 3, 1, 2), file["arr_1"]


# ---- An image depends on its seed and on nothing else ----

FAMILIES = {
    "digits": {},
    "32x32 with attention": dict(img_resolution=32, img_channels=3, attn_resolutions=[16]),
    "fourier": dict(embedding_type="fourier", encoder_type="residual", channel_mult_noise=2,
                    resample_filter=[1, 3, 3, 1]),
    "adm": dict(model_type="DhariwalUNet", model_channels=64, attn_resolutions=[4]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_of_an_image_do_not_depend_on_its_company_or_on_threads(family):
    network = small_network(**FAMILIES[family])
    network.pixels = lambda x0: x0                      # rounding would hide small changes

    def sampler(*inputs):
        return [sample_student(*inputs, sigmas=PMDD_SIGMAS[:2])]

    seeds = list(range(70 if network.shape[1] == 8 else 6))

    def draw(groups, threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            task = partial(from_seeds.sample_block, network, sampler=sampler, asked=None,
                           device=CPU)
            blocks = distributed.in_parallel(task, groups, CPU)
            return torch.cat([images for (images,), _ in blocks])
        finally:
            torch.set_num_threads(before)

    whole = draw([seeds], threads=1)
    assert torch.equal(draw([seeds[:1], seeds[1:4], seeds[4:]], threads=2), whole)
    assert torch.equal(draw([seeds[::-1]], threads=3).flip(0), whole)
    assert torch.equal(draw([[seed] for seed in seeds[-3:]], threads=1), whole[-3:])


def test_processes_share_the_work_and_write_the_same_file(student, tmp_path):
    flags = ["--checkpoint", "student.pt", "--number", 150]
    torchrun(2, "sample.py", *flags, "--out", "two.zip", cwd=tmp_path)
    in_ranks(1, sample, *flags, "--out", "one.zip", cwd=tmp_path)
    assert Path("one.zip").read_bytes() == Path("two.zip").read_bytes()
    assert len(open_images("one.zip")) == 150


def test_threads_take_blocks_in_turn_and_hand_on_an_error():
    def task(number):
        if number == 30:
            raise RuntimeError("thirty")
        return number

    assert list(distributed.in_parallel(task, range(20), CPU)) == list(range(20))
    with pytest.raises(RuntimeError, match="thirty"):
        list(distributed.in_parallel(task, range(40), CPU))


# ---- The images are the network's own ----

def test_npz_zip_and_folder_hold_the_images_of_the_network_called_directly(student, monkeypatch):
    flags = ["--checkpoint", "student.pt", "--seeds", "5-24"]
    expected, classes = direct(student, range(5, 25))
    for out in ("a.npz", "a.zip", "a"):
        assert call(monkeypatch, sample, *flags, "--out", out) == 0
    images, labels = read_npz("a.npz")
    assert nearly_equal(images, expected) and np.array_equal(labels, classes)
    for source in ("a.zip", "a"):
        pixels, drawn = open_images(source).take(range(20))
        assert np.array_equal(pixels, images) and np.array_equal(drawn, classes)
    assert sorted(os.listdir("a"))[:2] == ["000005.png", "000006.png"]
    assert json.loads(Path("a/dataset.json").read_text())["labels"][0][0] == "000005.png"


def test_from_python_each_image_is_asked_for_something_or_none_is(student):
    images = sample.load("student.pt")
    assert nearly_equal(images(3, asked=[7, 1, 0]).numpy(),
                        direct(student, range(3), classes=[7, 1, 0])[0])
    for asked in (torch.tensor([7, 1, 0]), np.array([7, 1, 0]), ["7", "1", "0"]):
        assert torch.equal(images(3, asked=asked), images(3, asked=[7, 1, 0]))
    for wrong, message in ((dict(n=3, asked=[7, 1]), "asked for 2 things, n is 3"),
                           (dict(n=1, asked="7"), "a list, one for each image"),
                           (dict(n=2, asked=[7, 10]), "class 10: allowed: 0 to 9"),
                           (dict(n=0), "n is 0"), (dict(steps=0), "steps is 0")):
        with pytest.raises(UserError, match=message):
            images(**wrong)


def test_bf16_draws_nearly_the_same_images(student, monkeypatch):
    for how in ("fp32", "bf16"):
        assert call(monkeypatch, sample, "--checkpoint", "student.pt", "--n", 16, "--precision",
                    how, "--out", f"{how}.npz") == 0
    gap = np.abs(np.subtract(*(read_npz(f"{how}.npz")[0] for how in ("fp32", "bf16")), dtype=int))
    assert 0 < gap.max() and gap.mean() < 3


@pytest.mark.parametrize("steps", [1, 2])
def test_fewer_steps_use_the_first_noise_levels(student, monkeypatch, steps):
    assert call(monkeypatch, sample, "--checkpoint", "student.pt", "--steps", steps, "--n", 16,
                "--out", "a.npz") == 0
    assert nearly_equal(read_npz("a.npz")[0], direct(student, range(16), PMDD_SIGMAS[:steps])[0])


def test_one_class_or_balanced_classes_leave_the_noise_as_it_is(student, monkeypatch):
    flags = ["--checkpoint", "student.pt", "--n", 16, "--out"]
    assert call(monkeypatch, sample, *flags, "a.npz", "--class", 0) == 0
    assert call(monkeypatch, sample, *flags, "b.npz", "--labels", "balanced") == 0
    one, balanced = read_npz("a.npz"), read_npz("b.npz")
    assert nearly_equal(one[0], direct(student, range(16), classes=[0] * 16)[0])
    assert one[1].tolist() == [0] * 16 and balanced[1].tolist() == [i % 10 for i in range(16)]
    assert np.array_equal(one[0][[0, 10]], balanced[0][[0, 10]])        # seeds 0 and 10: class 0


@pytest.mark.parametrize("flags, sigma", [([], 2.5), (["--sigmas", "1.5"], 1.5)])
def test_a_published_pickle_is_a_one_step_student(tmp_path, monkeypatch, flags, sigma):
    monkeypatch.chdir(tmp_path)
    source, cache = GOLDEN / "ddpmpp-cond-8.pkl", ["--cache", tmp_path / "cache"]
    assert call(monkeypatch, sample, "--checkpoint", source, "--n", 16, "--out", "a.npz", *flags,
                *cache) == 0
    network = load_network(source, tmp_path / "cache")
    assert nearly_equal(read_npz("a.npz")[0], direct(network, range(16), [sigma])[0])


def test_a_published_teacher_is_sampled_by_heun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, cache = GOLDEN / "adm-small.pkl", ["--cache", tmp_path / "cache"]
    assert call(monkeypatch, sample, "--checkpoint", source, "--teacher", "--heun", 3, "--n", 16,
                "--out", "a.npz", *cache) == 0
    images, _ = sample_seeds(load_network(source, tmp_path / "cache"), range(16),
                             partial(sample_heun, steps=3))
    assert nearly_equal(read_npz("a.npz")[0], to_uint8(images).numpy())


@pytest.mark.parametrize("given, options", [
    ([5], dict(churn=5)),
    ([40, 0.05, 50, 1.003], dict(churn=40, churn_min=0.05, churn_max=50, churn_noise=1.003))])
def test_churn_is_that_of_the_teachers_sampler(student, monkeypatch, given, options):
    flags = ["--checkpoint", "teacher.pt", "--teacher", "--heun", 4, "--n", 16, "--out"]
    assert call(monkeypatch, sample, *flags, "a.npz", "--churn", *given) == 0
    assert call(monkeypatch, sample, *flags, "without.npz") == 0
    images, _ = sample_seeds(small_network(seed=1), range(16),
                             partial(sample_heun, steps=4, **options))
    assert nearly_equal(read_npz("a.npz")[0], to_uint8(images).numpy())
    assert not nearly_equal(read_npz("a.npz")[0], read_npz("without.npz")[0])


def test_dmd2_weights_start_from_sigma_80(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = load_network(GOLDEN / "adm-small.pkl", tmp_path)
    torch.save({name.removeprefix("model."): w for name, w in network.state_dict().items()},
               "pytorch_model.bin")
    assert call(monkeypatch, sample, "--checkpoint", "pytorch_model.bin", "--n", 16, "--out",
                "a.npz") == 0
    assert nearly_equal(read_npz("a.npz")[0], direct(network, range(16), [80.0])[0])


# ---- Which network ----

def run_folder(name, steps, age, dataset="digits"):
    path = Path("runs") / name / f"stage{steps}" / "best.pt"
    save_student(path, steps, dataset)
    path.with_name("config.json").write_text(json.dumps(
        {"config": {"dataset": dataset, "sigmas": PMDD_SIGMAS[:steps]}}))
    os.utime(path, (1000 - age, 1000 - age))
    return path


def test_the_newest_run_with_enough_steps_and_the_right_data_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old, new = run_folder("old", 3, age=9), run_folder("new", 1, age=1)
    other = run_folder("other", 2, age=5, dataset="cifar10")
    (Path("runs") / "broken" / "stage1").mkdir(parents=True)
    (Path("runs") / "broken" / "stage1" / "config.json").write_text("[")

    def chosen(steps, dataset):
        return opening.default_student(steps, dataset, "runs")[0]

    assert chosen(None, None) == chosen(1, "digits") == new
    assert chosen(2, None) == chosen(2, "cifar10") == other
    assert chosen(3, None) == chosen(2, "digits") == old
    assert chosen(4, None).name == "digits-student.pt"


def test_a_fresh_clone_draws_a_grid_of_the_embedded_student_and_says_so(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, sample, "--steps", 3) == 0
    assert "digits-student.pt (the embedded student)" in capsys.readouterr().out
    assert Image.open("digits-3-steps.png").mode == "L"
    assert call(monkeypatch, sample, "--compare", "--n", 3) == 0
    assert Path("digits-compare.png").is_file()


# ---- Pictures ----

def test_a_grid_has_a_row_for_each_class_and_enlarges_by_whole_pixels(student, monkeypatch):
    call(monkeypatch, sample, "--checkpoint", "student.pt", "--n", 40)
    call(monkeypatch, sample, "--checkpoint", "student.pt", "--n", 40, "--labels", "balanced",
         "--out", "a.npz")
    images, labels = read_npz("a.npz")
    picture = np.array(Image.open("digits-3-steps.png"))
    cells = picture[:, -(4 * 49 + 1):]                          # to the right of the row labels
    for row in range(10):
        of_class = images[labels == row][:, 0]
        for column in range(4):
            cell = cells[1 + 49 * row:, 1 + 49 * column:][:48, :48]
            assert np.array_equal(cell, of_class[column].repeat(6, 0).repeat(6, 1))


def test_compare_shows_the_teacher_and_every_number_of_steps_of_one_noise(student, monkeypatch):
    flags = ["--checkpoint", "student.pt", "--labels", "random", "--n", 5]
    assert call(monkeypatch, sample, *flags, "--compare", "--teacher", "teacher.pt") == 0
    picture = np.array(Image.open("digits-compare.png"))
    cells = picture[1::49, -(5 * 49 + 1):][:4, 1::49][:, :5]    # a corner pixel of each image
    sources = [["--teacher", "teacher.pt"]] + [
        ["--checkpoint", "student.pt", "--steps", k] for k in (1, 2, 3)]
    for row, source in enumerate(sources):
        assert call(monkeypatch, sample, *source, "--n", 5, "--out", f"{row}.npz") == 0
        assert np.array_equal(cells[row], read_npz(f"{row}.npz")[0][:, 0, 0, 0])


# ---- What is refused ----

BAD = ["--checkpoint none.pt", "--checkpoint student.pt --steps 4",
       "--checkpoint teacher.pt --steps 1", "--checkpoint student.pt --teacher",
       "--checkpoint student.pt --class 10", "--checkpoint student.pt --sigmas 3",
       "--checkpoint teacher.pt --compare", "--dataset cifar10",
       "--checkpoint student.pt --dataset cifar10", "--checkpoint damaged.pt",
       "--checkpoint student.pt --out here.zip", "--checkpoint student.pt --out taken",
       "--out taken --force", "--out a.jpg", "--out here.zip/a.png", "--n 0", "--n many",
       "--n 9999", "--seeds 5-2", "--seeds 1,1", "--seeds x", "--n 3 --seeds 0-2", "--grid 3y",
       "--grid 2x", "--grid 2x2 --n 5", "--compare --out a.npz", "--compare --steps 2",
       "--teacher --steps 2", "--sigmas 1 2", "--class 1 --labels random", "--unknown",
       "--heun 0", "--checkpoint student.pt --heun 2", "--compare --grid 3", "--grid 5000",
       "--n 100000001 --out a.zip", "--checkpoint none.pt --out new/folder/a.png",
       "--checkpoint student.pt --class 10 --out new/folder", "--checkpoint taken",
       "--churn -1", "--churn 40 0.05", "--churn 1 2 3 4 5", "--churn nan", "--churn inf",
       "--churn 40 0.05 50 -1", "--churn", "--guidance -1", "--guidance nan",
       "--checkpoint student.pt --churn 5", "--checkpoint teacher.pt --teacher --sigmas 2",
       "--out . --force", "--grid 2x2 --prompt a b",
       "--checkpoint student.pt --teacher teacher.pt", "--teacher --base pipeline",
       "--checkpoint moved.pt --compare"]


@pytest.mark.parametrize("flags", BAD)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(student, monkeypatch, capfd, flags):
    damaged = bytearray(Path("student.pt").read_bytes())
    damaged[5000] ^= 1
    Path("damaged.pt").write_bytes(damaged)
    moved = checkpoint.load("student.pt") | {"teacher": "moved/teacher.pt"}
    checkpoint.save(Path("moved.pt"), moved)
    Path("here.zip").write_bytes(b"kept")
    Path("taken").mkdir()
    Path("taken/letter.txt").write_text("kept")
    before = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    assert call(monkeypatch, sample, *flags.split()) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")} == before


@pytest.mark.parametrize("out", ["new/a.zip", "new/a"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_nothing_half_made(student, out, name):
    command = subprocess.Popen([sys.executable, ROOT / "sample.py", "--n", "50000", "--out", out,
                                "--checkpoint", "student.pt"], stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"},
                               preexec_fn=partial(      # the tests themselves may run under nohup
                                   signal.signal, signal.Signals[name], signal.SIG_DFL))
    until(lambda: list(Path("new").glob(".a*.tmp")))
    command.send_signal(signal.Signals[name])
    assert command.communicate(timeout=30)[1].endswith("interrupted\n")
    assert command.returncode == 130 and list(Path("new").iterdir()) == []


@pytest.mark.parametrize("out", ["a.zip", "a.npz", "a", "a.png"])
def test_a_failure_half_way_leaves_what_was_there_before(student, monkeypatch, out):
    flags = ["--checkpoint", "student.pt", "--n", 100, "--out", out]
    assert call(monkeypatch, sample, *flags) == 0
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert call(monkeypatch, sample, *flags) == 2                       # exists

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sets, "png", full)
    monkeypatch.setattr(np.lib.format, "write_array", full)
    monkeypatch.setattr(Image.Image, "save", full)
    assert call(monkeypatch, sample, *flags, "--force") == 1
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
