"""The networks against values from the published implementations (tests/golden)."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from edm_networks import EDMPrecond, UNetBlock
from models import KARRAS, to_uint8
from presets.datasets import CIFAR10, IMAGENET64

GOLDEN = Path(__file__).parent / "golden"
NETWORKS = ["adm-3level", "adm-small", "ddpmpp-cond-8", "ddpmpp-cond-aug-16", "ddpmpp-wide-aug",
            "ncsnpp-3level-aug", "ncsnpp-uncond-16"]


def golden(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        values = {k: file[k] for k in file.files}
    config = json.loads(str(values.pop("config")))
    shapes = json.loads(str(values.pop("state_dict_shapes")))
    return config, shapes, {k: torch.from_numpy(v) for k, v in values.items()}


def recipe_weight(name, shape):
    """Weights from names alone, so that reference values need no weights."""
    r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("freqs"):
        r = 16 * r
    elif len(shape) > 1:
        r = 0.6 * r / np.sqrt(np.prod(shape[1:]))
    elif "norm" in name.split(".")[-2] and name.endswith(".weight"):
        r = 1 + 0.2 * r
    else:
        r = 0.2 * r
    return torch.from_numpy(np.asarray(r, np.float32))


def by_recipe(config):
    network = EDMPrecond(**config)
    network.load_state_dict({
        name: value if name.endswith("resample_filter") else recipe_weight(name, tuple(value.shape))
        for name, value in network.state_dict().items()}, strict=True)
    return network.eval()


def relative(actual, expected):
    return ((actual.detach().double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_names_and_shapes_are_the_published_ones(name):
    config, shapes, _ = golden(name)
    assert {k: list(v.shape) for k, v in EDMPrecond(**config).state_dict().items()} == shapes


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_input_gradients_equal_the_published_networks(name):
    """In float64: only the recorded values' own rounding is left, whatever the CPU."""
    config, _, want = golden(name)
    network = by_recipe(config).double()
    x, sigma = want["x"].double().requires_grad_(), want["sigma"].double()
    y, augment = want.get("labels"), want.get("augment_labels")
    out = network(x, sigma, y, augment)
    encoded = network(x, sigma, y, augment, output="encoder")
    (grad_x,) = torch.autograd.grad(out.square().sum(), x)
    assert relative(out, want["out"]) < 2e-7
    assert relative(encoded, want["encoder_last"]) < 1e-6
    assert relative(grad_x, want["grad_x"]) < 2e-7
    s = sigma.reshape(-1, 1, 1, 1)
    F_x = network.model(x / (s ** 2 + 0.25).sqrt(), s.log() / 4, y, augment)
    assert relative(F_x, want["F"]) < 1e-6
    if "out_no_labels" in want:
        assert relative(network(x, sigma), want["out_no_labels"]) < 2e-7


@pytest.mark.parametrize("name", ["adm-small", "ncsnpp-3level-aug"])
def test_the_encoders_output_has_the_stated_shape_and_runs_no_decoder(name):
    config, _, want = golden(name)
    network, ran = by_recipe(config), []
    for block in network.model.dec.values():
        block.register_forward_hook(lambda *_: ran.append(1))
    encoded = network(want["x"], want["sigma"], want["labels"], output="encoder")
    assert not ran
    assert encoded.shape[1:] == (network.encoder_channels, *[network.encoder_resolution] * 2)
    network(want["x"], want["sigma"], want["labels"])
    assert len(ran) == len(network.model.dec)


def test_the_published_teachers_have_the_published_parameter_counts():
    with torch.device("meta"):
        cifar10, imagenet64 = EDMPrecond(**CIFAR10.network), EDMPrecond(**IMAGENET64.network)
    assert sum(p.numel() for p in cifar10.parameters()) == 55_735_299
    assert sum(p.numel() for p in imagenet64.parameters()) == 295_899_267


def slow_resample(x, taps, up):
    """Zero-stuffing and filtering written out; the definition of the resampling convolutions."""
    taps = torch.tensor(taps, dtype=x.dtype)
    kernel = taps.outer(taps) / taps.sum() ** 2
    C, pad = x.shape[1], (len(taps) - 1) // 2
    weight = kernel.expand(C, 1, -1, -1)
    if up:
        return torch.nn.functional.conv_transpose2d(x, 4 * weight, stride=2, padding=pad, groups=C)
    return torch.nn.functional.conv2d(x, weight, stride=2, padding=pad, groups=C)


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1]])
@pytest.mark.parametrize("up", [True, False])
def test_resampling_equals_grouped_filtering(taps, up):
    from edm_networks import Conv2d
    x = torch.randn(2, 6, 8, 8)
    conv = Conv2d(6, 6, 0, up=up, down=not up, resample_filter=taps)
    assert relative(conv(x), slow_resample(x, taps, up)) < 1e-6


@pytest.mark.parametrize("config", [
    dict(img_resolution=16, img_channels=1, model_type="SongUNet", model_channels=8,
         channel_mult=[1, 1, 2, 3], num_blocks=1, attn_resolutions=[4, 2], label_dim=3),
    dict(img_resolution=24, img_channels=3, model_type="SongUNet", model_channels=12, augment_dim=4,
         channel_mult=[2, 1], num_blocks=3, attn_resolutions=[], embedding_type="fourier",
         encoder_type="residual", channel_mult_noise=2, resample_filter=[1, 3, 3, 1]),
    dict(img_resolution=8, img_channels=2, model_type="DhariwalUNet", model_channels=64,
         channel_mult=[1, 1], num_blocks=2, attn_resolutions=[8], channel_mult_emb=2,
         augment_dim=2),
])
def test_any_member_of_the_families_builds_runs_and_is_rebuilt_from_its_config(config):
    network = EDMPrecond(**config).eval()
    again = EDMPrecond(**json.loads(json.dumps(network.config))).eval()
    again.load_state_dict(network.state_dict(), strict=True)
    x = torch.randn(2, *network.shape)
    y = torch.eye(config["label_dim"])[:2] if config.get("label_dim") else None
    out = network(x, torch.tensor([0.5, 7.0]), y)
    assert out.shape == x.shape and out.isfinite().all()
    assert torch.equal(out, again(x, torch.tensor([0.5, 7.0]), y))


def test_one_sigma_for_all_images_equals_the_same_sigma_for_each():
    network = by_recipe(golden("ddpmpp-cond-8")[0])
    x = torch.randn(3, 1, 8, 8)
    assert torch.allclose(network(x, 0.7), network(x, torch.full((3, 1, 1, 1), 0.7)), atol=1e-6)


def test_attention_goes_through_scaled_dot_product_attention(monkeypatch):
    calls, real = [], torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    config, _, want = golden("adm-3level")
    network = by_recipe(config)
    network(want["x"], want["sigma"])
    with_attention = [b for b in network.modules() if isinstance(b, UNetBlock) and b.heads]
    assert len(calls) == len(with_attention) > 5
    assert all(shape[-1] == 64 for shape in calls)          # 64 channels a head


def test_a_new_network_starts_from_edms_initialisation():
    torch.manual_seed(0)
    network = EDMPrecond(8, 1, 10, model_type="SongUNet", model_channels=16, channel_mult=[1, 2],
                         num_blocks=1, attn_resolutions=[4])
    x = torch.randn(4, 1, 8, 8)
    skip_only = 0.25 / (2.0 ** 2 + 0.25) * x                # c_skip x: F is about zero at first
    assert relative(network.eval()(x, 2.0), skip_only) < 1e-3
    weight = network.model.map_layer0.weight
    assert weight.abs().max() <= (6 / sum(weight.shape)) ** 0.5 < 1.05 * weight.abs().max()


@pytest.mark.parametrize("change, message", [
    (dict(model_type="UNet"), "SongUNet, DhariwalUNet"),
    (dict(channels=3), "no argument 'channels'"),
    (dict(encoder_type="skip"), "standard, residual"),
    (dict(embedding_type="sine"), "positional, fourier"),
    (dict(img_resolution=9), "multiples of 2"),
    (dict(channel_mult=[]), "channel_mult"),
    (dict(label_dim=-1), "label_dim is -1"),
    (dict(model_channels=2), "at least 4"),
    (dict(model_type="DhariwalUNet", model_channels=224, channel_mult=[1, 1],
          attn_resolutions=[8]), "heads"),
])
def test_an_architecture_that_cannot_be_built_is_a_value_error(change, message):
    config = dict(img_resolution=8, img_channels=1, model_type="SongUNet", model_channels=16,
                  channel_mult=[1, 2])
    with pytest.raises(ValueError, match=message):
        EDMPrecond(**config | change)


SMALL = dict(img_resolution=8, img_channels=1, model_type="SongUNet", model_channels=8,
             channel_mult=[1], num_blocks=1)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.3])
def test_the_preconditioning_is_that_of_edms_table_1_for_any_sigma_data(sigma_data):
    network = by_recipe(SMALL | {"sigma_data": sigma_data})
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 20.0])
    s, d = sigma.reshape(-1, 1, 1, 1), sigma_data
    F_x = network.model(x / (s ** 2 + d ** 2).sqrt(), s.log() / 4)
    by_hand = d ** 2 / (s ** 2 + d ** 2) * x + s * d / (s ** 2 + d ** 2).sqrt() * F_x
    assert network.sigma_data == sigma_data and network.config["sigma_data"] == sigma_data
    torch.testing.assert_close(network(x, sigma), by_hand)


def test_a_network_tells_what_it_is_to_be_asked():
    network = EDMPrecond(**SMALL | {"label_dim": 3, "img_channels": 2})
    assert network.shape == (2, 8, 8) and network.levels is KARRAS
    assert network.conditions.count == 3 and EDMPrecond(**SMALL).conditions.count == 0
    x0 = torch.tensor([-1.2, -1.0, 0.0, 1.0])
    assert network.pixels(x0).tolist() == to_uint8(x0).tolist() == [0, 0, 128, 255]


def test_what_only_published_files_say_is_taken_and_changes_nothing():
    """Their networks dropped labels in training, and computed in half precision."""
    plain, published = (by_recipe(SMALL | {"label_dim": 3} | more)
                        for more in ({}, {"use_fp16": True, "label_dropout": 0.9}))
    published.train()
    x, y = torch.randn(64, 1, 8, 8), torch.eye(3)[torch.arange(64) % 3]
    plain.train()
    outputs = []
    for network in (plain, published):
        torch.manual_seed(0)                                # the same dropout
        outputs.append(network(x, 1.0, y))
    assert torch.equal(*outputs) and published.config["label_dropout"] == 0.9
