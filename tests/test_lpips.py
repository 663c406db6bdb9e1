from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from base.errors import UserError
from helpers import golden_weights
from metrics import lpips
from metrics.lpips import LPIPS, load_lpips

GOLDEN = np.load(Path(__file__).parent / "golden" / "lpips.npz", allow_pickle=False)
A, B = (torch.from_numpy(GOLDEN[key]) for key in ("a", "b"))


def scaled(key, r):
    if key.startswith("lin"):
        return abs(r)
    return r * (np.sqrt(2 / np.prod(r.shape[1:])) if key.endswith(".weight") else 0.1)


@pytest.fixture(scope="module")
def state():
    return golden_weights(GOLDEN, scaled)


@pytest.fixture(scope="module")
def network(state):
    network = LPIPS(resize=None)
    network.load_state_dict(state)
    return network


def test_golden_distances_at_native_size(network):
    assert np.abs(network(A, B).numpy() / GOLDEN["distance"] - 1).max() < 1e-5


def test_names_and_shapes_are_the_published_ones(state):
    ours = {name: tuple(weight.shape) for name, weight in LPIPS().state_dict().items()}
    assert ours == {name: tuple(weight.shape) for name, weight in state.items()}


def test_images_are_brought_to_224_first(network, state):
    resizing = LPIPS()
    resizing.load_state_dict(state)
    a, b = A[:1], B[:1]
    big = [F.interpolate(x, (224, 224), mode="bilinear", align_corners=False) for x in (a, b)]
    assert torch.allclose(resizing(a, b), network(*big), rtol=1e-6)
    assert not torch.allclose(resizing(a, b), network(a, b), rtol=1e-2)


def test_grey_is_grey_repeated(network):
    a, b = A[:, :1, :32, :32], B[:, :1, :32, :32]
    wanted = network(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1))
    assert torch.allclose(network(a, b), wanted, rtol=1e-6)


def test_distance_is_zero_for_equal_images_and_symmetric(network):
    a, b = A[..., :32, :32], B[..., :32, :32]
    assert torch.equal(network(a, a), torch.zeros(3))
    assert torch.allclose(network(a, b), network(b, a), rtol=1e-6)


def test_gradient_reaches_both_images_and_no_weight(network):
    a, b = (x[:2, :, :32, :32].clone().requires_grad_() for x in (A, B))
    network(a, b).sum().backward()
    for x in (a, b):
        assert x.grad.isfinite().all() and (x.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_gradient_equals_finite_differences(state):
    network = LPIPS(resize=None).double()
    network.load_state_dict(state)
    a, b = (x[:1, :, :16, :16].double() for x in (A, B))
    rng = torch.Generator().manual_seed(0)
    direction = torch.randn(a.shape, dtype=torch.float64, generator=rng)
    x = a.clone().requires_grad_()
    network(x, b).sum().backward()
    step = 1e-6
    slope = (network(a + step * direction, b) - network(a - step * direction, b)) / (2 * step)
    assert (x.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-4)


def test_a_blank_image_has_a_finite_gradient():
    network = LPIPS(resize=None)
    torch.nn.init.zeros_(network.features[0].weight)  # every feature is zero
    torch.nn.init.zeros_(network.features[0].bias)
    a = torch.zeros(1, 3, 16, 16, requires_grad=True)
    network(a, torch.ones(1, 3, 16, 16)).sum().backward()
    assert a.grad.isfinite().all()


def test_shapes_that_differ_are_refused(network):
    for a, b in ((A, B[:2]), (A[:, :2], B[:, :2]), (A[0], B[0])):
        with pytest.raises(ValueError, match="one shape"):
            network(a, b)


def test_published_files_load_strictly(state, network, tmp_path, monkeypatch):
    vgg = {k: v for k, v in state.items() if k.startswith("features.")}
    vgg |= {"classifier.0.weight": torch.zeros(2, 2), "classifier.0.bias": torch.zeros(2)}
    linear = {k: v for k, v in state.items() if k.startswith("lin")}
    torch.save(vgg, tmp_path / "vgg16")
    torch.save(linear, tmp_path / "lpips-vgg")
    monkeypatch.setattr(lpips, "fetch", lambda name, cache: tmp_path / name)
    a, b = A[:1, :, :32, :32], B[:1, :, :32, :32]
    assert torch.allclose(load_lpips(resize=None)(a, b), network(a, b), rtol=1e-5)
    assert load_lpips().resize == 224

    del linear["lin3.model.1.weight"]
    torch.save(linear, tmp_path / "lpips-vgg")
    with pytest.raises(UserError, match=r"lpips-vgg.*lin3"):
        load_lpips()
    torch.save([1], tmp_path / "vgg16")
    with pytest.raises(UserError, match="vgg16"):
        load_lpips()
