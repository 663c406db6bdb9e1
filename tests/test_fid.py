import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist

import fid
from base.errors import RunFailed, UserError
from experiments import make_assets
from experiments.make_assets import held_out
from fid import (FeatureStatistics, InceptionScore, frechet_distance, precision_recall,
                 read_reference, reference_statistics, write_reference)
from helpers import golden_weights
from images.real import load_digits
from metrics import inception
from metrics.digits_classifier import DigitsNetwork, load_digits_network
from metrics.inception import Inception, in_chunks, load_inception, resize_matrix

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = np.load(ROOT / "tests" / "golden" / "inception.npz", allow_pickle=False)


def scaled(key, r):
    if key.endswith("conv.weight"):
        return r * np.sqrt(2 / np.prod(r.shape[1:]))
    if key.endswith("bn.weight"):
        return 1 + 0.1 * r
    if key.endswith("bn.running_var"):
        return 1 + 0.1 * abs(r)
    return r * (np.sqrt(1 / r.shape[1]) if key == "fc.weight" else 0.1)


@pytest.fixture(scope="module")
def state():
    return golden_weights(GOLDEN, scaled)


@pytest.fixture(scope="module")
def network(state):
    network = Inception()
    network.load_state_dict(state)
    return network.fold()


@pytest.fixture(scope="module")
def digits():
    return load_digits_network()


def random_images(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# The Inception network


def test_golden_features_and_logits_with_and_without_folded_batch_norm(state, network):
    unfolded = Inception()
    unfolded.load_state_dict(state)
    for net in (unfolded, network):
        for size in (32, 64):
            features, logits = net(torch.from_numpy(GOLDEN[f"images_{size}"]))
            assert relative(features, GOLDEN[f"features_{size}"]) < 1e-5
            assert relative(logits, GOLDEN[f"logits_{size}"]) < 1e-5


def test_parameters_are_the_published_ones(state):
    network = Inception()
    names = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    assert names == list(state)
    assert sum(p.numel() for p in network.parameters()) == 23_850_960


def slow_resize(image, target=299):
    """TensorFlow 1's bilinear resize of a float [H,W], pixel by pixel."""
    out = np.empty((target, target))
    height, width = image.shape
    for i in range(target):
        y, fy = divmod(i * height, target)
        for j in range(target):
            x, fx = divmod(j * width, target)
            y1, x1 = min(y + 1, height - 1), min(x + 1, width - 1)
            top = image[y, x] + (image[y, x1] - image[y, x]) * fx / target
            bottom = image[y1, x] + (image[y1, x1] - image[y1, x]) * fx / target
            out[i, j] = top + (bottom - top) * fy / target
    return out


@pytest.mark.parametrize("height, width", [(1, 1), (8, 8), (17, 23), (299, 299), (320, 301)])
def test_resize_equals_the_pixel_by_pixel_rule(network, height, width):
    images = random_images(1, 1, height, width)
    seen = []
    handle = network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, x: seen.append(x[0][0]))
    try:
        network(images)
    finally:
        handle.remove()
    wanted = (slow_resize(images[0, 0].double().numpy()) - 128) / 128
    for channel in seen[0]:
        assert abs(channel.numpy() - wanted).max() < 1e-6


def test_resize_shares_sum_to_one():
    for size in (1, 2, 31, 299, 640):
        assert torch.allclose(resize_matrix(size).sum(1), torch.ones(299, dtype=torch.float64))


def test_grey_is_grey_repeated(network):
    grey = random_images(2, 1, 20, 30)
    for one, three in zip(network(grey), network(grey.repeat(1, 3, 1, 1))):
        assert relative(one, three) < 1e-6


def test_only_uint8_images_of_one_or_three_channels(network, digits):
    with pytest.raises(ValueError, match="float32"):
        network(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="float64"):
        digits(torch.zeros(2, 1, 8, 8).double())
    for shape in [(2, 4, 32, 32), (3, 32, 32)]:
        with pytest.raises(ValueError, match="1 or 3"):
            network(random_images(*shape))
    with pytest.raises(ValueError, match="8,8"):
        digits(random_images(2, 1, 9, 8))


def test_features_have_the_same_bits_in_any_batch_and_on_any_number_of_threads(network, digits):
    threads = torch.get_num_threads()
    try:
        for net, images, sizes in ((network, random_images(5, 3, 32, 32), (2, 5)),
                                   (digits, load_digits()[0][:150], (1, 37, 150))):
            torch.set_num_threads(1)
            whole = net(images)
            for count, size in zip((2, 1, 2), sizes):
                torch.set_num_threads(count)
                parts = [net(batch) for batch in images.split(size)]
                for output, part in zip(whole, zip(*parts)):
                    assert torch.equal(output, torch.cat(part))
    finally:
        torch.set_num_threads(threads)


def test_caller_precision_settings_do_not_reach_the_features(digits):
    images = random_images(3, 1, 8, 8)
    wanted = digits(images)[0]
    before = torch.backends.cudnn.allow_tf32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(digits(images)[0], wanted)
    assert torch.backends.cudnn.allow_tf32 == before


def test_chunks_refuse_an_empty_batch():
    with pytest.raises(ValueError, match="no images"):
        in_chunks(lambda x: (x,), random_images(0, 1, 8, 8), 4)


def test_the_published_file_format_loads_and_folds(state, tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    extra = {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(7)}
    torch.save({**state, **extra}, path, _use_new_zipfile_serialization=False)
    monkeypatch.setattr(inception, "fetch", lambda name, cache: path)
    network = load_inception()
    features, _ = network(torch.from_numpy(GOLDEN["images_32"][:1]))
    assert relative(features, GOLDEN["features_32"][:1]) < 1e-5
    assert len(network.sha256) == 64

    torch.save({k: v for k, v in state.items() if k != "fc.bias"}, path)
    with pytest.raises(UserError, match=r"weights\.pth.*fc\.bias"):
        load_inception()
    path.write_bytes(b"not weights")
    with pytest.raises(UserError, match=r"weights\.pth"):
        load_inception()


# Statistics


def test_statistics_of_any_batches_equal_numpys():
    x = np.random.default_rng(0).normal(3, 2, (1000, 20))
    for sizes in ([1000], [1] * 1000, [7, 493, 500]):
        statistics = FeatureStatistics(20)
        for batch in torch.from_numpy(x).split(sizes):
            statistics.add(batch)
        assert relative(statistics.mean(), x.mean(0)) < 1e-12
        assert relative(statistics.covariance(), np.cov(x.T)) < 1e-12


def test_statistics_need_two_images_and_features_of_their_width():
    statistics = FeatureStatistics(4)
    statistics.add(torch.ones(1, 4))
    for figure in (statistics.mean, statistics.covariance):
        with pytest.raises(UserError, match="at least 2 images, got 1"):
            figure()
    with pytest.raises(ValueError, match=r"\[B,4\]"):
        statistics.add(torch.ones(2, 5))


def _rank(rank, ranks, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    network, images = load_digits_network(), load_digits()[0][:301]
    statistics = reference_statistics(network, images[rank::ranks].split(17))
    score = InceptionScore(301, classes=10)
    mine = torch.arange(301)[rank::ranks]
    score.add(mine, network(images[mine])[1])
    statistics.all_reduce()
    score.all_reduce()
    if rank == ranks - 1:
        np.savez(out, mean=statistics.mean(), covariance=statistics.covariance(),
                 score=score.value())
    dist.destroy_process_group()


def test_one_two_and_three_processes_give_the_same_statistics(digits, tmp_path):
    whole = reference_statistics(digits, load_digits()[0][:301].split(301))
    score = InceptionScore(301, classes=10)
    score.add(range(301), digits(load_digits()[0][:301])[1])
    for ranks in (1, 2, 3):
        out = tmp_path / f"{ranks}.npz"
        torch.multiprocessing.start_processes(_rank, (ranks, tmp_path / f"store{ranks}", out),
                                              ranks, start_method="fork")
        with np.load(out) as file:
            assert relative(file["mean"], whole.mean()) < 1e-9
            assert relative(file["covariance"], whole.covariance()) < 1e-9
            assert relative(file["score"], score.value()) < 1e-9


# The Frechet distance


def random_covariance(rng, dimensions, images):
    x = rng.standard_normal((images, dimensions)) * np.logspace(0, -1.5, dimensions)
    return np.cov(x.T)


def trace_of_root(cov1, cov2):
    """By the principal square root of one argument: slower, and independent of the code."""
    values, vectors = np.linalg.eigh(cov1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    return np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(0)).sum()


def test_distance_of_commuting_covariances_is_the_closed_form():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((50, 50)))[0]
    a, b = rng.uniform(0.1, 5, 50), rng.uniform(0.1, 5, 50)
    b[10:30] = 0  # singular as well
    m1, m2 = rng.standard_normal((2, 50))
    wanted = ((m1 - m2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    cov1, cov2 = basis * a @ basis.T, basis * b @ basis.T
    assert frechet_distance(m1, cov1, m2, cov2) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(m2, cov2, m1, cov1) == pytest.approx(wanted, rel=1e-9)


def test_distance_equals_the_matrix_square_root_route():
    rng = np.random.default_rng(1)
    cov1, cov2 = (random_covariance(rng, 300, n) for n in (800, 600))
    m1, m2 = 0.1 * rng.standard_normal((2, 300))
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    wanted = ((m1 - m2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)
    assert frechet_distance(m1, cov1, m2, cov2) == pytest.approx(wanted, rel=1e-8)


def test_distance_with_300_images_against_a_full_reference():
    rng = np.random.default_rng(2)
    full = random_covariance(rng, 2048, 2500)
    x = rng.standard_normal((300, 2048)) * np.logspace(0, -1.5, 2048)
    x -= x.mean(0)
    few, zero = x.T @ x / 299, np.zeros(2048)
    # The non-zero eigenvalues of full @ few are those of the 300 x 300 matrix x full x^T / 299
    root = np.sqrt(np.linalg.eigvalsh(x @ full @ x.T / 299).clip(0)).sum()
    wanted = np.trace(full) + np.trace(few) - 2 * root
    assert frechet_distance(zero, full, zero, few) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(zero, few, zero, full) == pytest.approx(wanted, rel=1e-9)


def test_distance_of_two_singular_covariances():
    rng = np.random.default_rng(3)
    cov1, cov2 = random_covariance(rng, 120, 40), random_covariance(rng, 120, 60)
    zero = np.zeros(120)
    wanted = np.trace(cov1) + np.trace(cov2) - 2 * trace_of_root(cov1, cov2)
    assert frechet_distance(zero, cov1, zero, cov2) == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(zero, 0 * cov1, zero, cov2) == pytest.approx(np.trace(cov2), rel=1e-12)
    assert frechet_distance(zero, 0 * cov1, zero + 1, 0 * cov2) == pytest.approx(120, rel=1e-12)


@pytest.mark.parametrize("images", [40, 500])
def test_distance_is_symmetric_and_zero_for_equal_arguments(images):
    rng = np.random.default_rng(4)
    cov1, cov2 = random_covariance(rng, 100, images), random_covariance(rng, 100, 300)
    m1, m2 = rng.standard_normal((2, 100))
    one, other = frechet_distance(m1, cov1, m2, cov2), frechet_distance(m2, cov2, m1, cov1)
    assert one == pytest.approx(other, rel=1e-10)
    assert 0 <= frechet_distance(m1, cov1, m1, cov1) < 1e-7 * np.trace(cov1)


def test_distance_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="3.*4"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match="dimensions"):
        frechet_distance(np.zeros(3), np.eye(4), np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(np.zeros(3), np.eye(3) * np.nan, np.zeros(3), np.eye(3))


# References


def test_a_reference_comes_back_as_written(tmp_path):
    mean, cov = np.arange(5.0), np.cov(np.random.default_rng(0).standard_normal((5, 9)))
    write_reference(tmp_path / "ref.npz", mean, cov)
    with np.load(tmp_path / "ref.npz", allow_pickle=False) as file:
        assert sorted(file) == ["mu", "sigma"]
    for got, wanted in zip(read_reference(tmp_path / "ref.npz", 5), (mean, cov)):
        assert got.dtype == np.float64 and np.array_equal(got, wanted)


def test_a_failed_write_leaves_the_old_reference_and_no_rubbish(tmp_path, monkeypatch):
    write_reference(tmp_path / "ref.npz", np.zeros(2), np.eye(2))

    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fid.np, "savez", full_disk)
    with pytest.raises(RunFailed, match="No space left"):
        write_reference(tmp_path / "ref.npz", np.ones(2), np.eye(2))
    assert [p.name for p in tmp_path.iterdir()] == ["ref.npz"]
    assert read_reference(tmp_path / "ref.npz")[0].sum() == 0


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


def huge_member(path):
    """A few hundred bytes that claim an array of 10^12 numbers."""
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
    header += b" " * (118 - 1 - len(header)) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        for key in ("mu", "sigma"):
            archive.writestr(f"{key}.npy", b"\x93NUMPY\x01\x00" + b"\x76\x00" + header)


def hostile_references():
    def arrays(**kwargs):
        return lambda path: np.savez(path, **kwargs)

    eye, zero = np.eye(3), np.zeros(3)
    skew = eye.copy()
    skew[0, 1] = 0.5
    return {
        "missing": lambda path: None,
        "text": lambda path: path.write_text("<html>not found</html>"),
        "empty": lambda path: path.write_bytes(b""),
        "pickle": lambda path: path.write_bytes(pickle.dumps(Bomb())),
        "pickled array": arrays(mu=np.array([Bomb()], dtype=object), sigma=eye),
        "no sigma": arrays(mu=zero),
        "one array": lambda path: np.save(path.open("wb"), eye),
        "shapes": arrays(mu=np.zeros(4), sigma=eye),
        "not square": arrays(mu=zero, sigma=np.zeros((3, 4))),
        "whole numbers": arrays(mu=zero, sigma=np.eye(3, dtype=int)),
        "text arrays": arrays(mu=np.array(["a"] * 3), sigma=eye),
        "not finite": arrays(mu=zero * np.nan, sigma=eye),
        "skew": arrays(mu=zero, sigma=skew),
        "huge": huge_member,
        "bomb": lambda path: np.savez_compressed(path, mu=zero, sigma=np.zeros(2 ** 27 + 1)),
    }


@pytest.mark.parametrize("kind", hostile_references())
def test_hostile_references_give_one_clear_error_and_run_nothing(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ref.npz"
    hostile_references()[kind](path)
    with pytest.raises(UserError, match=r"ref\.npz"):
        read_reference(path)
    assert not (tmp_path / "bomb").exists()


def test_truncated_references_are_refused(tmp_path):
    write_reference(tmp_path / "ref.npz", np.zeros(30), np.eye(30))
    content = (tmp_path / "ref.npz").read_bytes()
    for tenth in range(10):
        (tmp_path / "cut.npz").write_bytes(content[:len(content) * tenth // 10])
        with pytest.raises(UserError, match=r"cut\.npz"):
            read_reference(tmp_path / "cut.npz")


def test_a_reference_of_another_network_is_refused(tmp_path):
    write_reference(tmp_path / "ref.npz", np.zeros(64), np.eye(64))
    with pytest.raises(UserError, match=r"ref\.npz.*64 dimensions, need 2048"):
        read_reference(tmp_path / "ref.npz", 2048)


# Companions


def test_inception_score_of_certain_and_balanced_predictions_is_the_number_of_classes():
    labels = torch.arange(700) % 7
    score = InceptionScore(700, classes=7)
    score.add(range(700), 1000.0 * torch.eye(7)[labels])
    assert score.value() == pytest.approx((7, 0), abs=1e-9)
    alike = InceptionScore(50, classes=7)
    alike.add(range(50), torch.randn(7).expand(50, 7))
    assert alike.value() == pytest.approx((1, 0), abs=1e-9)


def test_inception_score_equals_its_definition_in_any_order():
    logits = 3 * torch.randn(205, 12, generator=torch.Generator().manual_seed(0)).double()
    order = torch.randperm(205)
    score = InceptionScore(205, classes=12)
    for part in order.split(50):
        score.add(part, logits[part])
    p, scores = logits.softmax(1).numpy(), []
    for k in range(10):
        part = p[k * 205 // 10:(k + 1) * 205 // 10]         # as the score's own code cuts
        scores.append(np.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    assert score.value() == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


def test_inception_score_needs_an_image_in_every_split():
    score = InceptionScore(9, classes=3)
    score.add(range(9), torch.zeros(9, 3))
    with pytest.raises(UserError, match="at least 10 images, got 9"):
        score.value()


def brute_force(real, fake, k):
    def distance(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(2))

    def covered(points, centres):
        radii = np.sort(distance(centres, centres), axis=1)[:, k]
        return (distance(points, centres) <= radii).any(1).mean()

    return covered(fake, real), covered(real, fake)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_brute_force(k, monkeypatch):
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((101, 5)), 0.3 + 0.7 * rng.standard_normal((83, 5))
    for block in (2, 17, 2048):
        monkeypatch.setattr(fid, "BLOCK", block)
        got = precision_recall(torch.from_numpy(real), torch.from_numpy(fake), k)
        assert got == pytest.approx(brute_force(real, fake, k), abs=1e-12)


def test_precision_and_recall_at_their_ends():
    # Whole numbers: a point's distance to itself is nought, not a rounding error.
    x = torch.randint(-50, 50, (40, 6), generator=torch.Generator().manual_seed(0)).float()
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 1000) == (0, 0)
    assert precision_recall(x, x[:1].repeat(5, 1)) == (1, 1 / 40)  # one image over and over
    with pytest.raises(UserError, match="more than 3 images, got 3 generated"):
        precision_recall(x, x[:3])


# The digits network


def test_digits_network_reproduces_its_recorded_accuracy(digits):
    images, labels = load_digits()
    test = held_out(labels)
    counts = torch.bincount(labels[test], minlength=10)
    assert torch.equal(counts, torch.bincount(labels, minlength=10) // 5)
    accuracy = make_assets.accuracy(digits, images[test], labels[test])
    assert accuracy == digits.test_accuracy >= 0.985


def test_digits_reference_in_assets_is_what_the_network_gives(digits):
    statistics = reference_statistics(digits, load_digits()[0].split(100))
    mean, cov = read_reference(ROOT / "assets" / "digits-reference.npz", digits.dimensions)
    assert relative(statistics.mean(), mean) < 1e-6
    assert relative(statistics.covariance(), cov) < 1e-6
    assert np.linalg.matrix_rank(cov) == 64


def test_digits_distance_grows_with_noise_blur_and_missing_classes(digits):
    images, labels = load_digits()
    reference = read_reference(ROOT / "assets" / "digits-reference.npz")

    def distance(images):
        statistics = reference_statistics(digits, [images])
        return frechet_distance(statistics.mean(), statistics.covariance(), *reference)

    noise = 255 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = [distance((images + s * noise).clamp(0, 255).byte()) for s in (0, 0.02, 0.05, 0.1, 0.2)]
    assert noisy == sorted(noisy) and noisy[0] < 1e-3 < 0.5 < noisy[-1]
    assert distance(images[labels != 9]) > 5
    blurred = torch.nn.functional.avg_pool2d(images.float(), 3, 1, 1).byte()
    assert distance(blurred) > 5


def test_training_gives_the_same_weights_on_every_call():
    images, labels = load_digits()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, second = (make_assets.train(images, labels, steps=3).state_dict()
                         for _ in "ab")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_digits_perceptual_distance_is_zero_for_equal_images_and_differentiable(digits):
    a = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    b = a.roll(1, 3).requires_grad_()
    assert torch.equal(digits.perceptual_distance(a, a), torch.zeros(4))
    distance = digits.perceptual_distance(a, b)
    assert distance.shape == (4,) and (distance > 0.01).all()
    assert torch.allclose(distance, digits.perceptual_distance(b, a))
    distance.sum().backward()
    assert b.grad.isfinite().all() and b.grad.abs().sum() > 0
    assert all(p.grad is None for p in digits.parameters())
    assert [tuple(x.shape[1:]) for x in DigitsNetwork().layers(a)][-1] == (64, 1, 1)


def test_damaged_digits_weights_are_refused(tmp_path):
    path = tmp_path / "weights.pt"
    for content in ({"test_accuracy": 1.0}, {}, [1, 2]):
        torch.save(content, path)
        with pytest.raises(UserError, match=r"weights\.pt"):
            load_digits_network(path)
    path.write_bytes(b"PK half a file")
    with pytest.raises(UserError, match=r"weights\.pt"):
        load_digits_network(path)


# Command line


def command(*arguments):
    return subprocess.run([sys.executable, ROOT / "fid.py", *arguments], capture_output=True,
                          text=True, timeout=60)


def test_the_command_line_makes_a_reference_and_keeps_an_old_one(tmp_path):
    out = tmp_path / "ref.npz"
    done = command("--data", "digits", "--out", out)
    assert done.returncode == 0, done.stderr
    asset = read_reference(ROOT / "assets" / "digits-reference.npz")
    for got, wanted in zip(read_reference(out, 64), asset):
        assert relative(got, wanted) < 1e-6
    again = command("--data", "digits", "--out", out)
    assert again.returncode == 2 and "--force" in again.stderr
    assert len(again.stderr.splitlines()) == 1
