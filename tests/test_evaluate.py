"""evaluate.py: figures equal to those computed by hand, their records, and what is refused."""

import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

import evaluate
import sample
from base import files
from base.errors import UserError
from helpers import call, in_ranks, save_student, small_network
from images.real import open_images
from metrics import evaluations, judge
from metrics.digits_classifier import load_digits_network
from models import sample_heun, sample_seeds, sample_student, to_uint8
from presets.datasets import PMDD_SIGMAS
from weights import checkpoint


@pytest.fixture
def student(tmp_path, monkeypatch):
    """A folder to work in, with student.pt and teacher.pt; returns the student's network."""
    monkeypatch.chdir(tmp_path)
    save_student(tmp_path / "teacher.pt", steps=0, seed=1)
    return save_student(tmp_path / "student.pt")


def entries(path="evaluation.json"):
    return json.loads(Path(path).read_text())["evaluations"]


def values(path="evaluation.json"):
    return [{name: f["values"] for name, f in entry["figures"].items()} for entry in entries(path)]


def by_hand(images, classes):
    """digits-FID and share of correct class of all images at once, by the textbook."""
    features, logits = load_digits_network()(images)
    features = features.double().numpy()
    with np.load(files.ASSETS / "digits-reference.npz") as file:
        mean, covariance = file["mu"], file["sigma"]
    own = np.cov(features, rowvar=False)
    root = scipy.linalg.sqrtm(own @ covariance).real
    fid = np.square(features.mean(0) - mean).sum() + np.trace(own + covariance - 2 * root)
    return fid, (logits.argmax(1) == classes).double().mean().item()


# ---- Figures ----

def test_figures_are_those_of_the_images_that_the_network_makes(student, monkeypatch):
    flags = ["--steps", 1, 3, "--heun", 3, "--teacher", "teacher.pt", "--n", 300]
    assert call(monkeypatch, evaluate, "--checkpoint", "student.pt", *flags) == 0
    teacher = small_network(seed=1)
    rows = [(student, partial(sample_student, sigmas=PMDD_SIGMAS[:1]), "1 step", 1),
            (student, partial(sample_student, sigmas=PMDD_SIGMAS), "3 steps", 3),
            (teacher, partial(sample_heun, steps=3), "Heun, 3 steps", 5)]
    for entry, (network, sampler, what, count) in zip(entries(), rows, strict=True):
        images, classes = sample_seeds(network, range(300), sampler)
        fid, share = by_hand(to_uint8(images), classes)
        assert (entry["what"], entry["evaluations"]) == (what, count)
        assert entry["figures"]["digits-FID"]["mean"] == pytest.approx(fid, rel=1e-4)
        assert entry["figures"]["right_class"]["mean"] == pytest.approx(share, abs=1 / 300)
        assert entry["figures"].keys() == {"digits-FID", "right_class"}


def test_churn_is_in_the_images_and_in_the_protocol(student, monkeypatch):
    flags = ["--checkpoint", "teacher.pt", "--teacher", "--heun", 3, "--n", 100]
    for churn in ([], ["--churn", 40, 0.05, 50, 1.003], ["--churn", 5]):
        assert call(monkeypatch, evaluate, *flags, *churn) == 0
    assert [entry["protocol"]["sampler"] for entry in entries()] == [
        "EDM Alg. 2, no churn",
        "EDM Alg. 2, S_churn, S_tmin, S_tmax, S_noise = [40.0, 0.05, 50.0, 1.003]",
        "EDM Alg. 2, S_churn, S_tmin, S_tmax, S_noise = [5.0]"]
    options = ({}, dict(churn=40, churn_min=0.05, churn_max=50, churn_noise=1.003), dict(churn=5))
    found = [entry["digits-FID"][0] for entry in values()]
    for value, how in zip(found, options, strict=True):
        images, classes = sample_seeds(small_network(seed=1), range(100),
                                       partial(sample_heun, steps=3, **how))
        assert value == pytest.approx(by_hand(to_uint8(images), classes)[0], rel=1e-4)
    assert len(set(found)) == 3


def test_repeats_are_blocks_of_seeds(student, monkeypatch):
    assert call(monkeypatch, evaluate, "--checkpoint", "student.pt", "--n", 200, "--repeats", 3,
                "--steps", 2) == 0
    figure = entries()[0]["figures"]["digits-FID"]
    for block, value in enumerate(figure["values"]):
        images, classes = sample_seeds(student, range(200 * block, 200 * (block + 1)),
                                       partial(sample_student, sigmas=PMDD_SIGMAS[:2]))
        assert value == pytest.approx(by_hand(to_uint8(images), classes)[0], rel=1e-4)
    assert figure["mean"] == np.mean(figure["values"]) and figure["least"] == min(figure["values"])
    assert figure["spread"] == max(figure["values"]) - min(figure["values"])
    assert entries()[0]["protocol"]["seeds"] == ["0-199", "200-399", "400-599"]


def test_real_digits_are_at_distance_nought(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, evaluate, "--images", "digits", "--precision-recall") == 0
    figure, = values()
    assert figure["digits-FID"][0] < 1e-6 and figure["right_class"][0] > 0.97
    assert figure["precision"] == figure["recall"] == [1.0]


def test_folder_zip_and_npz_score_as_the_student_that_made_them(student, monkeypatch):
    flags = ["--checkpoint", "student.pt", "--n", 200]
    assert call(monkeypatch, evaluate, *flags, "--steps", 3, "--out", "student.json") == 0
    for name in ("a", "a.zip", "a.npz"):
        assert call(monkeypatch, sample, *flags, "--out", name) == 0
        assert call(monkeypatch, evaluate, "--images", name) == 0
    expected, = values("student.json")
    for found in values():
        assert found["right_class"] == expected["right_class"]
        assert found["digits-FID"] == pytest.approx(expected["digits-FID"], rel=1e-9)
    assert len(values()) == 3


class SmallFeatures(torch.nn.Module):
    """In Inception's place: a few features of RGB images, and 1008 logits."""

    name, metric, share, dimensions, sha256 = "small", "FID", None, 6, "0" * 64
    logit_bias = torch.linspace(0, 9, 1008)

    def forward(self, images):
        means = images.float().reshape(len(images), 6, -1).mean(2)
        return means, torch.nn.functional.pad(means / 20, (0, 1002)) + self.logit_bias


def test_colour_images_get_fid_and_inception_score_against_a_reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(judge, "feature_network", lambda *args: SmallFeatures())
    network = save_student(tmp_path / "student.pt", dataset="cifar10", img_channels=3)
    np.savez("reference.npz", mu=np.full(6, 100.0), sigma=np.eye(6))
    assert call(monkeypatch, evaluate, "--checkpoint", "student.pt", "--n", 100, "--steps", 1,
                "--reference", "reference.npz") == 0
    images, _ = sample_seeds(network, range(100), partial(sample_student, sigmas=PMDD_SIGMAS[:1]))
    features, logits = SmallFeatures()(to_uint8(images))
    own = np.cov(features.double().numpy(), rowvar=False)
    trace = np.trace(own + np.eye(6) - 2 * scipy.linalg.sqrtm(own).real)
    fid = (features.double().mean(0) - 100).square().sum().item() + trace
    p = (logits - SmallFeatures.logit_bias).double().softmax(1).reshape(10, 10, -1)
    score = (p * (p / p.mean(1, keepdim=True)).log()).nansum(2).mean(1).exp().mean().item()
    found, = values()
    assert found["FID"][0] == pytest.approx(fid, rel=1e-3)
    assert found["inception_score"][0] == pytest.approx(score, rel=1e-3)
    assert found.keys() == {"FID", "inception_score"}


def test_precision_and_recall_hold_no_more_features_than_their_bound(student, monkeypatch):
    monkeypatch.setattr(judge, "MANIFOLD", 70)
    held = []
    monkeypatch.setattr(judge, "precision_recall",
                        lambda real, fake, k: held.append((len(real), len(fake))) or (0.5, 0.25))
    assert call(monkeypatch, evaluate, "--checkpoint", "student.pt", "--n", 200, "--steps", 1,
                "--precision-recall") == 0
    assert held == [(70, 70)] and values()[0]["recall"] == [0.25]
    assert "70 of 1797" in entries()[0]["protocol"]["precision_recall"]


# ---- The same figures every time ----

def test_a_second_evaluation_gives_the_same_record_and_does_not_pile_up(student, monkeypatch):
    flags = ["--checkpoint", "student.pt", "--n", 150]
    assert call(monkeypatch, evaluate, *flags) == 0
    first = values()
    assert call(monkeypatch, evaluate, *flags) == 0
    assert values() == first and len(first) == 3


def test_processes_agree_with_one(student, monkeypatch, tmp_path):
    flags = ["--checkpoint", "student.pt", "--number", 150, "--precision-recall"]
    in_ranks(2, evaluate, *flags, "--out", "two.json", cwd=tmp_path)
    assert call(monkeypatch, evaluate, *flags, "--out", "one.json") == 0
    for two, one in zip(values("two.json"), values("one.json"), strict=True):
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=1e-9, abs=1e-12)


# ---- Records ----

def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_a_record_names_every_file_that_the_figure_depends_on(student, monkeypatch):
    assert call(monkeypatch, evaluate, "--checkpoint", "student.pt", "--n", 100, "--labels",
                "balanced") == 0
    entry = entries()[0]
    protocol = entry["protocol"]
    assert protocol["source"] == {"file": "student.pt", "sha256": digest("student.pt")}
    assert protocol["reference"]["sha256"] == digest(files.ASSETS / "digits-reference.npz")
    assert protocol["features"]["sha256"] == digest(files.ASSETS / "digits-features.pt")
    assert protocol["seeds"] == ["0-99"] and protocol["labels"].startswith("balanced")
    assert "truncated" in protocol["rounding"] and protocol["precision"] == "fp32"
    assert entry["environment"]["torch"] == torch.__version__
    assert entry["environment"]["device"] == "cpu"
    images, classes = sample_seeds(student, range(100), partial(
        sample_student, sigmas=PMDD_SIGMAS[:1]), [k % 10 for k in range(100)])
    fid, share = by_hand(to_uint8(images), classes)
    assert entry["figures"]["digits-FID"]["mean"] == pytest.approx(fid, rel=1e-4)
    assert entry["figures"]["right_class"]["mean"] == pytest.approx(share, abs=0.01)


def test_new_weights_replace_the_figures_and_another_protocol_joins_them(student, monkeypatch):
    flags = ["--checkpoint", "student.pt", "--steps", 1, "--n"]
    assert call(monkeypatch, evaluate, *flags, 100) == 0
    old = values()
    save_student(Path("student.pt"), seed=5)
    assert call(monkeypatch, evaluate, *flags, 120) == 0
    assert values()[0] == old[0] and len(values()) == 2
    assert call(monkeypatch, evaluate, *flags, 100) == 0
    assert len(values()) == 2 and old[0] not in values()


def test_a_run_keeps_its_record_beside_its_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = Path("runs/digits-pmdd/stage2/best.pt")
    save_student(path, steps=2)
    path.with_name("config.json").write_text(json.dumps(
        {"config": {"dataset": "digits", "sigmas": PMDD_SIGMAS[:2]}}))
    assert call(monkeypatch, evaluate, "--n", 100) == 0
    assert "runs/digits-pmdd/stage2/best.pt (the newest student" in capsys.readouterr().out
    assert [e["what"] for e in entries(path.with_name("evaluation.json"))] == ["1 step", "2 steps"]


def figure(*found):
    return evaluate.summary(list(found))


def test_the_table_shows_the_records_and_their_protocols(tmp_path, monkeypatch, capsys):
    protocol = {"images": 50000, "seeds": ["0-49999"], "labels": "random", "rounding": "truncated",
                "precision": "fp32", "reference": {"file": "r.npz", "sha256": "ab" * 32},
                "features": {"network": "small", "sha256": "cd" * 32}}
    rows = [((2.5,), {}), ((3.0, 3.5), {"right_class": figure(.991, .993)})]
    for k, (fid, extra) in enumerate(rows):
        entry = {"what": f"{k + 1} steps", "evaluations": k + 1,
                 "figures": {"digits-FID": figure(*fid)} | extra,
                 "protocol": protocol | {"source": {"file": f"{k}.pt", "sha256": "ef" * 32}},
                 "environment": {"torch": "2.6", "device": "cpu"}}
        folder = tmp_path / "results" / str(k)
        folder.mkdir(parents=True)
        evaluations.record(folder / "evaluation.json", [entry], force=False)
    assert call(monkeypatch, evaluate, "--table", tmp_path / "results") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "| | evaluations | digits-FID | right class | protocol |",
        "|---|---|---|---|---|",
        "| 0.pt, 1 steps | 1 | 2.500 | - | 1 |",
        "| 1.pt, 2 steps | 2 | 3.250 (3.000 to 3.500) | 99.20% (99.10% to 99.30%) | 1 |"]
    assert lines[-1].startswith("Protocol 1: 50,000 images; seeds 0-49999; labels: random; trunc")


def test_a_figure_around_another_pipeline_replaces_none():
    protocol = {"source": {"file": "lora.safetensors", "sha256": "ef" * 32}}
    kept, other = ({"what": "1 step", "protocol": protocol | {"source": protocol["source"] | base}}
                   for base in ({}, {"base": "another"}))
    assert evaluations.identity(kept) != evaluations.identity(other)


# ---- What is refused ----

def test_a_published_reference_is_held_against_figures_that_are_made_as_it_was():
    for how in ({"resize": "clean"}, {"side": 64}, {"side": 64, "resize": "tf1"}):
        with pytest.raises(UserError, match="leave out --side and --resize, or give --reference"):
            judge.Judge("cifar10", "cpu", **how)
    with pytest.raises(UserError, match="of cifar10 is of other images than these, of 64 pixels"):
        judge.Judge("cifar10", "cpu", size=64)


BAD = ["--checkpoint none.pt", "--checkpoint student.pt --steps 4",
       "--checkpoint student.pt --heun 2", "--checkpoint teacher.pt --steps 1",
       "--checkpoint student.pt --n 1", "--repeats 0",
       "--checkpoint student.pt --reference none.npz",
       "--checkpoint student.pt --reference small.npz",
       "--checkpoint student.pt --reference pickled.npz", "--checkpoint student.pt --data digits",
       "--checkpoint student.pt --out foreign.json",
       "--checkpoint student.pt --out no/where.json", "--checkpoint colour.pt",
       "--images none.zip", "--images pickled.npz", "--images small.npz", "--images one",
       "--images mixed", "--images unreadable", "--images good --n 4",
       "--images good --repeats 2", "--images good --steps 1", "--images colour",
       "--table none.json", "--table foreign.json", "--table good", "--n many", "--unknown",
       "--checkpoint student.pt --precision-recall --data colour",
       "--images colour --dataset digits", "--checkpoint student.pt --out good",
       "--checkpoint student.pt --out good --force", "--n 100000001",
       "--churn -1", "--churn 40 0.05", "--churn nan", "--images good --sigmas 3",
       "--images good --churn 40", "--images good --labels balanced", "--images good --compile",
       "--images good --precision bf16", "--images good --base pipeline",
       "--images good.npz --dataset digits --clip", "--checkpoint student.pt --patch-fid patch.npz",
       "--checkpoint student.pt --teacher teacher.pt", "--checkpoint moved.pt --steps 1 --heun 2"]


def fill(folder, *images):
    """A folder of PNGs, from (height, width, 3 or nothing) or from bytes."""
    from PIL import Image
    Path(folder).mkdir()
    for k, image in enumerate(images):
        path = Path(folder) / f"{k}.png"
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            Image.fromarray(np.zeros(image, np.uint8)).save(path)


@pytest.mark.parametrize("flags", BAD)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(student, monkeypatch, capfd, flags):
    save_student(Path("colour.pt"), img_channels=3, dataset="unheard-of")
    np.savez("small.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez("pickled.npz", arr_0=np.array([{}], dtype=object), mu=np.array([{}], dtype=object))
    np.savez("patch.npz", mu=np.zeros(128), sigma=np.eye(128))
    np.savez("good.npz", arr_0=np.zeros((3, 8, 8, 1), np.uint8))
    moved = checkpoint.load("student.pt") | {"teacher": "moved/teacher.pt"}
    checkpoint.save(Path("moved.pt"), moved)
    Path("foreign.json").write_text("{}")
    fill("one", (8, 8))
    fill("good", *[(8, 8)] * 3)
    fill("mixed", (8, 8), (8, 9), (8, 8))
    fill("unreadable", (8, 8), b"no image", (8, 8))
    fill("colour", *[(8, 8, 3)] * 3)
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert call(monkeypatch, evaluate, *flags.split()) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["mixed", "unreadable"])
def test_the_image_at_fault_is_named(tmp_path, name):
    fill(tmp_path / name, (8, 8), (9, 9) if name == "mixed" else b"no image")
    with pytest.raises(evaluate.UserError, match=r"1\.png"):
        open_images(str(tmp_path / name)).take(range(2))


def test_force_replaces_a_file_that_is_no_record(student, monkeypatch):
    Path("foreign.json").write_text("{}")
    flags = ["--checkpoint", "student.pt", "--n", 100, "--out", "foreign.json"]
    assert call(monkeypatch, evaluate, *flags, "--force") == 0
    assert len(values("foreign.json")) == 3
    assert call(monkeypatch, evaluate, *flags, "--steps", 1, "--force") == 0
    assert len(values("foreign.json")) == 3                     # a record keeps what it has
