"""A user's own teacher, images and loss, by the commands that the docs print, and from Python.

Everything is tiny, and random: images, teachers, and the weights of Inception and LPIPS.
"""

import json
import re
import shlex
import signal
import threading
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import fid
import models
import sample
import tiny_pipelines
import train
from base.errors import UserError
from edm_networks import EDMPrecond
from presets.datasets import CIFAR10
from experiments import bench, bench_files, compare, make_assets
from fid import read_reference, write_reference
from helpers import ROOT, call, save_student, torchrun
from hostile_pickles import network_pickle
from images.real import open_images
from metrics import judge, lpips
from metrics.evaluations import read_records
from metrics.inception import Inception
from training import cost, plan
from training.log import StopSignal
from training.options import parse
from training.roles import Roles, trainable
from training.run_folder import read_metrics
from weights import checkpoint
from weights.opening import open_network

CLASSES = ["cat", "dog", "fox"]
STAGE0 = ("--model-channels", 8, "--num-blocks", 1)
TINY = ("--batch", 4, "--iterations", 2)
SCORED = ("--evaluate-images", 4)
PAIRS = ("--regression-pairs", 4, "--regression-steps", 2)


def random_images(folder, sizes, labels=None, grey=False, **more):
    folder.mkdir()
    rng, names = np.random.default_rng(0), [f"{k:03d}.png" for k in range(len(sizes))]
    for name, (width, height) in zip(names, sizes):
        pixels = rng.integers(0, 256, (height, width) if grey else (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    if labels is not None:
        (folder / "dataset.json").write_text(json.dumps(
            {"labels": list(zip(names, labels)), **more}))
    return folder


def random_inception(path):
    torch.manual_seed(0)
    network = Inception()
    for parameter in network.parameters():
        if parameter.ndim > 1:                          # so that images of noise differ
            torch.nn.init.kaiming_normal_(parameter)
    torch.save(network.state_dict(), path)


class FewFeatures(torch.nn.Module):
    """In place of Inception where many figures are made: each pixel's mean over coarse squares."""

    name, metric, dimensions, share, sha256, logit_bias = "few", "FID", 12, None, "0", 0.0

    def forward(self, images):
        features = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        return features, torch.zeros(len(images), 1008)


def run_list(script, *argv):
    """From Python, with a list."""
    return script.main(list(map(str, argv)))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's folder: images as a folder and as a zip, grey ones, and an EDM pickle of 48x48."""
    home = tmp_path_factory.mktemp("home")
    folder = random_images(home / "my-images", [(16, 16)] * 200, [k % 3 for k in range(200)],
                           classes=CLASSES)
    with zipfile.ZipFile(home / "my-images.zip", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    random_images(home / "grey", [(28, 28)] * 8, grey=True)
    random_inception(home / "inception.pth")
    torch.manual_seed(0)
    teacher = EDMPrecond(img_resolution=48, img_channels=3, label_dim=5, model_channels=16,
                         model_type="DhariwalUNet", channel_mult=[1, 2], num_blocks=1,
                         attn_resolutions=[24], dropout=0.1)
    config = {k: v for k, v in teacher.config.items() if k != "label_dropout"}
    (home / "my-edm.pkl").write_bytes(network_pickle(config, teacher.state_dict(), 4))
    return home


@pytest.fixture(scope="module", autouse=True)
def at_home(home):
    patch = pytest.MonkeyPatch()
    patch.chdir(home)
    patch.setattr(lpips, "load_strictly", lambda network, weights, source: None)
    patch.setattr(lpips, "read_weights", lambda path: {})
    patch.setattr(lpips, "fetch", lambda name, cache: name)             # random weights
    yield
    patch.undo()


@pytest.fixture
def said(monkeypatch, capfd):
    """Runs a script as the shell would: exit code, what it said, its errors."""
    def called(script, *argv):
        code = call(monkeypatch, script, *argv)
        out = capfd.readouterr()
        return code, out.out, out.err
    return called


@pytest.fixture(scope="module")
def stage0(home):
    """Trained on the folder; later tests distil it."""
    run_list(train, "--stage", 0, "--data", "my-images", "--folder", "own", *STAGE0, *TINY)
    return home / "own" / "stage0" / "best.pt"


# ---- By the commands of docs/TEACHERS.md ----

def commands(heading):
    section = (ROOT / "docs/TEACHERS.md").read_text().partition(f"## {heading}\n")[2]
    block = re.search(r"```bash\n(.*?)```", section.partition("\n## ")[0], re.S)[1]
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


def made_tiny(script, argv):
    more = {train: (*TINY, *SCORED), evaluate: ("--n", 4), sample: ("--n", 3)}.get(script, ())
    if script is train and "0" in argv:
        more += STAGE0
    return [*argv, *more]


def module_of(words):
    if words[0] == "-m":
        return {"experiments.compare": compare, "experiments.make_assets": make_assets}[words[1]]
    return {"train.py": train, "sample.py": sample, "evaluate.py": evaluate, "fid.py": fid}[
        words[0]]


def kind(words):
    flags = [f"{flag} {value}" for flag, value in zip(words, words[1:])
             if flag in ("--stage", "--method", "--class")]
    return " ".join([words[1 if words[0] == "-m" else 0], *flags,
                     *[word for word in words if word == "--compare"]])


@pytest.fixture(scope="module")
def documented(at_home, home):
    """Runs the commands of "Your own images" in order; returns their kinds."""
    patch = pytest.MonkeyPatch()
    patch.setattr(judge, "load_inception", lambda *more: FewFeatures())
    listed = commands("Your own images")
    for words in listed:
        script = module_of(words)
        argv = words[2 if words[0] == "-m" else 1:]
        if "sid" in words:                              # "# or dmd"
            run_list(script, *made_tiny(script, ["dmd" if w == "sid" else w for w in argv]), *PAIRS)
        assert run_list(script, *made_tiny(script, argv)) in (0, None), words
    patch.undo()
    return [kind(words) for words in listed]


def test_the_docs_print_a_command_for_each_kind_of_work(documented):
    assert documented == [
        "fid.py", "train.py --stage 0", "train.py", "train.py --method sid",
        "train.py --method dmd2", "evaluate.py", "sample.py --class cat", "sample.py --compare",
        "experiments.compare", "experiments.make_assets"]


def test_what_the_documented_commands_made(documented, home):
    runs = home / "runs"
    for name, stages in (("pmdd", (0, 1, 2, 3)), ("dmd", (1,)), ("dmd2", (1,)), ("sid", (1,))):
        for stage in stages:
            folder = runs / f"my-images-{name}" / f"stage{stage}"
            saved = checkpoint.load(folder / "best.pt")
            assert saved["class_names"] == CLASSES and saved["dataset"] == "my-images"
            assert saved["network"]["img_resolution"] == 16 and saved["network"]["label_dim"] == 3
            if stage:
                assert saved["teacher"] == "runs/my-images-pmdd/stage0/best.pt"
            figures = {key for line in read_metrics(folder / "metrics.jsonl") for key in line}
            assert ("FID@" + str(stage or "heun") in figures) == (name != "dmd2")
            if name == "dmd2":
                assert {"gan", "discriminator"} <= figures
            if name == "dmd":
                assert "regression" in figures
    _, covariance = read_reference(home / "my-reference.npz", 12)
    # Each of the 12 features is a mean over 64 pixels, which are uniform: variance 1 / 12 / 64.
    assert np.trace(covariance) * 64 == pytest.approx(1, abs=0.2)
    record, = read_records(runs / "my-images-pmdd/stage3/evaluation.json")
    assert record["what"] == "3 steps" and record["figures"]["FID"]["mean"] > 0
    for picture in ("my-images-3-steps.png", "my-images-compare.png", "compare-runs.png"):
        assert Image.open(home / picture).width > 100


def test_an_exported_student_keeps_its_images_and_its_class_names(documented, home, said):
    mine, theirs = (sample.load(home / name)(n=2, seed=3) for name in (
        "my-student.pt", "runs/my-images-pmdd/stage3/best.pt"))
    assert torch.equal(mine, theirs)
    for asked in ("fox", "2"):
        assert said(sample, "--checkpoint", "my-student.pt", "--class", asked, "--n", 3,
                    "--out", f"{asked}.png")[0] == 0
    assert (home / "fox.png").read_bytes() == (home / "2.png").read_bytes()
    for asked in ("wolf", "3", "-1"):
        code, _, err = said(sample, "--checkpoint", "my-student.pt", "--class", asked, "--n", 3)
        assert code == 2 and err.count("\n") == 1
        assert f"--class {asked}: allowed: 0 to 2, or cat, dog, fox" in err


def test_a_folder_and_a_zip_of_the_same_images_train_to_the_same_bits(stage0):
    run_list(train, "--stage", 0, "--data", "my-images.zip", "--folder", "zipped", "--dataset",
             "my-images", *STAGE0, *TINY)
    folder, zipped = (checkpoint.load(f"{name}/stage0/best.pt")["ema"] for name in ("own",
                                                                                   "zipped"))
    assert all(map(torch.equal, folder.values(), zipped.values()))


def test_grey_images_without_classes_with_inceptions_own_network(home, said):
    inception = ("--inception", "inception.pth")
    assert said(fid, "--data", "grey", "--out", "grey.npz", *inception)[0] == 0
    assert said(train, "--stage", 0, "--data", "grey", *STAGE0, *TINY)[0] == 0
    code, out, _ = said(train, "--dataset", "grey", "--stage", 1, "--reference", "grey.npz",
                        *inception, *TINY, *SCORED)
    assert code == 0 and "FID@1" in out and "look at it: python sample.py" in out
    saved = checkpoint.load(home / "runs/grey-pmdd/stage1/best.pt")
    assert saved["network"]["img_channels"] == 1 and saved["network"]["label_dim"] == 0
    assert saved["network"]["img_resolution"] == 28 and saved["fid"]["1"]["FID"] > 0
    code, _, err = said(sample, "--dataset", "grey", "--class", "cat")
    assert code == 2 and "no classes" in err


def test_own_images_of_the_digits_size_are_no_digits(home, said):
    random_images(home / "small", [(8, 8)] * 4, grey=True)
    inception = ("--inception", "inception.pth")
    assert said(fid, "--data", "small", "--dataset", "small", "--out", "small.npz",
                *inception)[0] == 0
    assert said(fid, "--data", "small", "--out", "as-digits.npz")[0] == 0
    argv = ("--stage", 0, "--data", "small", *inception, *STAGE0, *TINY, *SCORED)
    code, _, err = said(train, *argv, "--reference", "as-digits.npz")
    assert code == 2 and "reference of 64 dimensions, need 2048" in err
    code, out, _ = said(train, *argv, "--reference", "small.npz")
    assert code == 0 and " FID@heun" in out


# ---- A teacher of one's own ----

def test_an_edm_pickle_of_48_pixels_is_distilled_and_evaluated_by_two_processes(home):
    write_reference(home / "eye.npz", np.zeros(2048), np.eye(2048))
    words = commands("Your own teacher")[0]
    assert words == ["train.py", "--teacher", "my-edm.pkl", "--reference", "my-reference.npz"]
    said = torchrun(2, "train.py", *words[1:3], "--stage", 1, *TINY, cwd=home)
    assert said.count("no FID") == 1
    assert "the nearest published row by resolution, of imagenet64: PMDD A.2" in said
    saved = checkpoint.load(home / "runs/my-edm-pmdd/stage1/best.pt")
    assert saved["network"]["model_type"] == "DhariwalUNet" and saved["network"]["label_dim"] == 5
    said = torchrun(2, "evaluate.py", "--dataset", "my-edm", "--reference", "eye.npz", "--number",
                    4, "--inception", "inception.pth", cwd=home)
    assert "FID" in said and "eye.npz" in said
    assert (home / "runs/my-edm-pmdd/stage1/evaluation.json").is_file()


def test_a_stage_takes_the_stage_0_of_its_folder_and_says_its_row_and_once_that_fid_is_off(
        stage0, home, said):
    code, out, _ = said(train, "--folder", "own", *TINY)                # stages 1, 2 and 3
    assert code == 0 and out.count("no FID") == 1
    assert "the nearest published row by resolution, of cifar10: PMDD A.1" in out
    for stage in (1, 2, 3):
        best, latest = (checkpoint.load(home / f"own/stage{stage}/{name}.pt") for name in (
            "best", "latest"))
        assert best["teacher"] == "own/stage0/best.pt" and best["iteration"] == 2
        assert all(map(torch.equal, best["ema"].values(), latest["ema"].values()))


def test_the_run_is_named_after_the_teachers_file(home):
    stage, = parse(["--teacher", "my-edm.pkl", "--stage", "1"])
    assert stage.config.dataset == "my-edm"
    assert str(stage.options.folder) == "runs/my-edm-pmdd/stage1"
    assert stage.options.network["img_resolution"] == 48
    assert stage.config.batch == 72                     # ImageNet-64's, above 32 pixels
    named, = parse(["--teacher", "my-edm.pkl", "--stage", "1", "--dataset", "mine"])
    assert named.config.dataset == "mine"


@pytest.mark.parametrize("name, dataset", [("edm-cifar10-32x32-uncond-vp", "cifar10"),
                                           ("edm-ffhq-64x64-uncond-vp", "ffhq64"),
                                           ("edm-imagenet-64x64-cond-adm", "imagenet64")])
def test_a_published_name_picks_its_data_set(name, dataset):
    stage, = parse(["--teacher", name, "--method", "sid"])
    assert (stage.config.dataset, stage.config.teacher) == (dataset, name)


def test_a_plain_state_dict_is_a_teacher_and_compare_finds_it(stage0, home, said):
    torch.save(checkpoint.load(stage0)["ema"], home / "plain.pt")
    assert said(train, "--teacher", "plain.pt", "--stage", 1, *TINY)[0] == 0
    code, out, _ = said(sample, "--dataset", "plain", "--compare", "--n", 2)
    assert code == 0 and "plain.pt (teacher)" in out
    code, out, _ = said(sample, "--dataset", "plain", "--heun", 2, "--n", 2)
    assert code == 0 and "plain.pt (teacher)" in out
    assert sample.load("plain.pt", teacher=True)(n=1, steps=2).shape == (1, 3, 16, 16)
    torch.save({name: value + 1 for name, value in checkpoint.load(stage0)["ema"].items()},
               home / "plain.pt")
    code, _, err = said(sample, "--dataset", "plain", "--compare", "--n", 2, "--force")
    assert code == 2 and "plain.pt holds other weights now: name the right file" in err
    assert said(sample, "--dataset", "plain", "--compare", "--n", 2, "--force", "--teacher",
                "plain.pt")[0] == 0


def test_a_name_that_only_holds_that_of_a_known_data_set_is_the_users_own(home):
    network = EDMPrecond(**CIFAR10.network | {"model_channels": 8, "num_blocks": 1,
                                              "label_dim": 100})
    torch.save(network.state_dict(), home / "cifar100-teacher.pth")
    for more, name in (([], "cifar100-teacher"), (["--dataset", "cifar100"], "cifar100")):
        stage, = parse(["--teacher", "cifar100-teacher.pth", "--stage", "1", *more])
        assert stage.config.dataset == name and stage.options.network["label_dim"] == 100
    network = EDMPrecond(**CIFAR10.network | {"model_channels": 8, "num_blocks": 1})
    torch.save(network.state_dict(), home / "my-cifar10.pth")
    stage, = parse(["--teacher", "my-cifar10.pth", "--stage", "1"])
    assert stage.config.dataset == "cifar10"


# ---- Augmentation, warm-up, ramp-up ----

def augmented(probability, labels):
    """A teacher's weights after one iteration, its images untouched."""
    stage, = parse(["--stage", "0", "--data", "my-images", *map(str, STAGE0), "--augment",
                    str(probability), "--batch", "4"])
    torch.manual_seed(0)
    student = EDMPrecond(**stage.options.network)
    with torch.no_grad():
        for parameter in student.parameters():          # the first last layer is 0
            parameter += 0.05 * torch.randn_like(parameter)
    before = student.model.map_augment.weight.clone()
    roles = Roles(trainable(student, augmented=probability > 0),
                  EDMPrecond(**stage.options.network))
    roles.wrap()
    optimizers = train.make_optimizers(stage.config, roles, torch.device("cpu"))
    rng = torch.Generator().manual_seed(0)
    images, eps = torch.randn(2, 4, 3, 16, 16, generator=rng)
    part = SimpleNamespace(real=images, eps=eps, sigma=torch.full((4, 1, 1, 1), 0.5), seen=0,
                           y_real=torch.eye(3)[[0, 1, 2, 0]], augment_labels=labels)
    torch.manual_seed(1)                                # of the dropout
    train.teacher_iteration(stage.config, roles, optimizers, [part], True)
    return student.state_dict(), student.model.map_augment.weight - before


def test_augmentation_labels_reach_the_network():
    _, moved = augmented(0.12, torch.eye(9)[:4])
    rate = 1e-3                                         # AdamW's first step: the rate, by sign
    assert moved[:, :4].abs().median().item() == pytest.approx(rate, rel=1e-2)
    assert (moved[:, 4:] == 0).all()                    # the labels that were 0


def test_without_augmentation_a_step_is_that_of_untouched_images_bit_for_bit():
    off, still = augmented(0.0, None)
    zero, _ = augmented(0.12, torch.zeros(4, 9))
    assert (still == 0).all() and all(map(torch.equal, off.values(), zero.values()))


RISING = ("--augment", 0.5, "--warm-up", 3, "--ema-rampup", 0.05, "--ema-halflife", 1)


def watched(folder, iterations, *more):
    """Runs stage 0; returns the rate of each iteration, and the average's share that stays."""
    rates, keeps, patch = [], [], pytest.MonkeyPatch()

    def update_ema(*args, real=train.update_ema, plain=torch.Tensor.lerp_):
        moved = []

        def lerp(average, weight, share):
            moved.append(1 - share)
            return plain(average, weight, share)

        patch.setattr(torch.Tensor, "lerp_", lerp)
        real(*args)
        patch.setattr(torch.Tensor, "lerp_", plain)
        share, = set(moved)                             # the same of every weight
        keeps.append(share)

    def set_rate(config, step, optimizers, real=train.set_rate):
        real(config, step, optimizers)
        rates.append(optimizers[0].param_groups[0]["lr"])

    patch.setattr(train, "set_rate", set_rate)
    patch.setattr(train, "update_ema", update_ema)
    run_list(train, "--stage", 0, "--data", "my-images", "--folder", folder, *STAGE0, "--batch", 4,
             "--iterations", iterations, "--evaluate-every", 0, *RISING, *more)
    patch.undo()
    return rates, keeps


def test_warm_up_and_ramp_up_have_the_values_of_their_iterations_and_resume_exactly(home):
    rates, keeps = watched("whole", 5, "--ema-halflife", 2)
    assert rates == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])
    # Half after 0.05 of the 0, 4, 8, .. images seen, at most 2: 0, 0.2, 0.4, 0.6, 0.8.
    assert keeps == pytest.approx([0, *[0.5 ** (4 / (0.2 * k)) for k in (1, 2, 3, 4)]])
    first = watched("halves", 2, "--ema-halflife", 2)
    second = watched("halves", 5, "--ema-halflife", 2, "--force")
    assert first[0] + second[0] == rates and first[1] + second[1] == keeps
    grids = sorted(path.name for path in (home / "halves/stage0/samples").iterdir())
    assert grids == ["000002.png", "000005.png"]        # at every save, where nothing is scored
    whole, halves = (checkpoint.load(home / f"{name}/stage0/latest.pt") for name in ("whole",
                                                                                    "halves"))
    for name in ("student", "ema"):
        assert all(map(torch.equal, whole[name].values(), halves[name].values()))


def test_the_ramp_up_ends_at_the_half_life():
    ema, student = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for seen, halflife in ((100, 5), (1000, 20), (10 ** 6, 20)):
        torch.nn.init.zeros_(ema.weight), torch.nn.init.ones_(student.weight)
        models.update_ema(ema, student, 4, 20, 0.05, seen)
        assert ema.weight.item() == pytest.approx(1 - 0.5 ** (4 / halflife))


# ---- A loss of one's own ----

def test_the_worked_example_of_a_loss_trains_and_is_planned(stage0, said):
    text = (ROOT / "docs/TRAINING.md").read_text().partition("## A loss of your own\n")[2]
    example = re.search(r"```python\n(.*?)```", text, re.S)[1]
    before = dict(models.LOSSES)
    try:
        exec(example, vars(models) | {"torch": torch})
        row = models.LOSSES["difference"]
        x0, teacher = torch.ones(2, 3, 1, 1), lambda x, sigma, y: x
        adapted = lambda x, sigma, y: x / 3                             # noqa: E731
        sigma = torch.full((2, 1, 1, 1), 0.5)
        value = row.of(None)(x0, sigma, torch.ones_like(x0), None, teacher=teacher,
                             adapted=adapted)
        assert value.item() == pytest.approx(1)                         # (1.5 - 0.5)^2
        common = ("--teacher", stage0, "--stage", 1, "--loss", "difference", *TINY)
        assert said(train, *common, "--folder", "difference")[0] == 0
        lines = read_metrics(stage0.parents[2] / "difference/stage1/metrics.jsonl")
        assert lines[0]["distill"] == 0                 # both are the teacher still
        code, out, _ = said(train, *common, "--dry-run")
        assert code == 0 and "loss: difference" in out
    finally:
        models.LOSSES.clear()
        models.LOSSES.update(before)
    code, _, err = said(train, *common)
    assert code == 2 and err.count("\n") == 1 and "invalid choice: 'difference'" in err


# ---- From Python ----

def test_a_command_takes_a_list_and_gives_the_signal_handlers_back(stage0, said):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    argv = ("--teacher", stage0, "--stage", 1, "--folder", "listed", *TINY)
    assert run_list(train, *argv) == 0
    codes, seen = [], []
    inside = threading.Thread(target=lambda: (
        codes.append(run_list(train, *argv, "--force", "--iterations", 3)),
        seen.append(signal.getsignal(signal.SIGTERM))))
    inside.start()
    inside.join()
    assert codes == [0] and seen == [handlers[signal.SIGTERM]]
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    assert run_list(sample, "--checkpoint", "listed/stage1/best.pt", "--n", 2) == 0


def test_a_signal_that_is_handled_outside_python_stays_so(monkeypatch):
    known, set_anew = signal.getsignal, []
    monkeypatch.setattr(signal, "getsignal", lambda number: (
        None if number == signal.SIGUSR1 else known(number)))
    monkeypatch.setattr(signal, "signal", lambda *pair: set_anew.append(pair) or known(pair[0]))
    StopSignal().restore()
    numbers = [number for number, _ in set_anew]
    assert numbers.count(signal.SIGTERM) == 2 and signal.SIGUSR1 not in numbers


def test_a_student_of_classes_is_a_callable(stage0, tmp_path):
    save_student(tmp_path / "best.pt", steps=1)
    student = sample.load(tmp_path / "best.pt")
    images = student(n=4, seed=5, asked=[0, 1, 2, 0])
    assert images.shape == (4, 1, 8, 8) and images.dtype == torch.uint8
    assert torch.equal(student(n=1, seed=7, asked=[2]), images[2:3])
    assert not torch.equal(student(n=1, seed=7, asked=[1]), images[2:3])
    with pytest.raises(UserError, match="--steps 2"):
        student(n=1, steps=2)
    teacher = sample.load(stage0)
    assert teacher(n=2, steps=2).shape == (2, 3, 16, 16)


def test_a_student_of_a_text_pipeline_is_a_callable(tmp_path):
    base = tiny_pipelines.save(tmp_path / "pipeline")
    network = open_network(base).network
    checkpoint.save(tmp_path / "best.pt", {
        "dataset": "sd15", "method": "pmdd", "stage": 1, "network": network.config,
        "sigmas": [network.levels.table[-1].item()], "pipeline": str(base),
        "ema": network.state_dict()})
    student = sample.load(tmp_path / "best.pt")
    images = student(n=2, seed=1, asked=["a fox", "a red car"])
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(student(n=1, seed=2, asked=["a red car"]), images[1:])


# ---- Plans and benchmarks ----

def test_a_plan_for_gpus_needs_none_and_says_size_time_and_space(stage0, said):
    code, out, _ = said(train, "--teacher", stage0, "--method", "dmd", "--device", "cuda",
                        "--dry-run", "--batch", 8, "--iterations", 100, "--regression-pairs", 1000)
    assert code == 0
    saved = checkpoint.load(stage0)
    parameters = sum(value.numel() for key, value in saved["ema"].items()
                     if "resample_filter" not in key)
    assert f"parameters of the network: {parameters:,}\n" in out
    flops, hours = map(float, re.search(
        rf"FLOPs of all iterations: (\S+); at {cost.TERAFLOPS} TFLOP/s a GPU, without evaluations: "
        r"(\S+) hours", out).groups())
    assert hours == pytest.approx(flops / 40e12 / 3600, rel=1e-2)
    assert "images forward through a network to score: 0\n" in out     # without a reference
    pairs = 1000 * (16 * 16 * 3 * (4 + 2) + 8) / 2 ** 20
    assert f"disk space, noise-image pairs: {pairs:,.0f} MiB" in out


def test_the_disk_space_of_checkpoints_is_that_of_a_run(stage0, home, said):
    argv = ("--teacher", stage0, "--method", "sid", "--folder", "space", *TINY)
    assert said(train, *argv)[0] == 0
    stage, = parse(list(map(str, argv)))
    sizes = plan.memory(train.iteration, stage.config, stage.options.network, 4)
    planned = plan.disk(stage.config, sizes, (3, 16, 16))["checkpoints"]
    names = ("latest", "latest", "latest", "best")      # the third while it is being saved
    files = [home / "space/stage1" / f"{name}.pt" for name in names]
    taken = sum(path.stat().st_size for path in files)
    tensors = sum(len(zipfile.ZipFile(path).namelist()) for path in files)
    assert planned < taken < planned + 1024 * tensors           # zip's headers


@pytest.mark.parametrize("data, more", [("my-images", ()), ("grey", ("--method", "dmd2"))])
def test_a_benchmark_knows_a_run_of_ones_own(home, tmp_path, said, data, more):
    teacher = tmp_path / "mine.pt"
    if data == "my-images":
        argv = ("--stage", 0, "--data", data, *STAGE0)
    else:
        network = EDMPrecond(img_resolution=28, img_channels=1, label_dim=0, model_channels=8,
                             model_type="SongUNet", channel_mult=[1], num_blocks=1)
        torch.save(network.state_dict(), teacher)
        argv = ("--teacher", teacher, *more)
    stage, = parse(list(map(str, [*argv, "--batch", 2])))
    job = bench_files.make_job(tmp_path, 0, stage, torch.device("cpu"))
    assert job.network["img_resolution"] == (16 if data == "my-images" else 28)
    loop = bench.Loop(job, 1)
    loop.run(0)
    loop.log.bar.close()
    if more:
        assert open_images(tmp_path / "images").shape == (1, 28, 28)


# ---- What is refused ----

@pytest.fixture(scope="module")
def wrong(home):
    """Image sets that no teacher can be trained on, or not this one."""
    random_images(home / "wide", [(16, 12)] * 4)
    random_images(home / "sizes", [(16, 16)] * 20 + [(12, 12)], [k % 3 for k in range(21)])
    random_images(home / "dots", [(2, 2)] * 4)
    random_images(home / "five", [(16, 16)] * 5, range(5))
    random_images(home / "unlabelled", [(16, 16)] * 5)
    write_reference(home / "few.npz", np.zeros(12), np.eye(12))
    write_reference(home / "clean.npz", np.zeros(2048), np.eye(2048), resize="clean")
    write_reference(home / "large.npz", np.zeros(2048), np.eye(2048), resize="tf1", side=32)


TEACHER = ("--teacher", "own/stage0/best.pt", *TINY)
REFUSED = [
    (("--stage", 0, "--data", "wide"), "--data wide: images of 16x12; wanted: square ones"),
    (("--stage", 0, "--data", "sizes", *STAGE0), "020.png is 12x12"),
    (("--stage", 0, "--data", "dots"), "--data dots: images of 2x2; wanted: square ones of at "
                                       "least 4 pixels"),
    (("--stage", 0, "--data", "my-images", "--channel-mult", 1, 1, 1, 1, 1, 1),
     "--channel-mult: no network of my-images's images: img_resolution is 16"),
    (("--stage", 0, "--data", "my-images", "--model-channels", 7), "--model-channels"),
    (("--stage", 0, "--data", "my-images", "--dropout", 1.5), "--dropout is 1.5; allowed"),
    (("--stage", 0, "--data", "my-images", "--augment", 2), "--augment is 2.0; allowed: 0 to 1"),
    (("--stage", 0, "--data", "my-images", "--ema-rampup", -1), "--ema-rampup is -1.0"),
    (("--method", "dmd2", "--data", "five", *TEACHER), "class 4, out of range: the teacher knows"),
    (("--method", "dmd2", "--data", "unlabelled", *TEACHER), "has no classes"),
    (("--method", "dmd2", "--data", "sizes", *TEACHER), "020.png is 12x12"),
    (("--method", "dmd2", "--data", "grey", *TEACHER),
     "[1, 28, 28], the teacher makes [3, 16, 16]"),
    (("--stage", 1, "--reference", ROOT / "assets/digits-reference.npz", "--inception",
      "inception.pth", *TEACHER), "reference of 64 dimensions, need 2048"),
    (("--stage", 1, "--reference", "clean.npz", "--inception", "inception.pth", *TEACHER),
     "clean.npz was made with --resize clean"),
    (("--stage", 1, "--reference", "large.npz", "--inception", "inception.pth", *TEACHER),
     "large.npz was made with --side 32, these figures are of --side 16"),
    (("--stage", 1, "--dataset", "digits", "--reference", "few.npz"),
     "reference of 12 dimensions, need 64"),
    (("--teacher", "nowhere.pt", "--stage", 1), "--teacher nowhere.pt: no such file and no publi"),
    (("--dataset", "unheard-of"), "--teacher FILE, or make one: --stage 0 --data FOLDER")]


@pytest.mark.parametrize("argv, message", REFUSED)
def test_what_cannot_be_is_one_line_and_leaves_nothing(stage0, home, wrong, said, argv, message):
    code, _, err = said(train, *argv, "--folder", "refused")
    lines = [line for line in err.replace("\r", "\n").splitlines() if "it/s" not in line
             and line.strip()]
    assert code == 2 and len(lines) == 1 and message in lines[0], err
    assert not (home / "refused").exists()
