"""Published weights: read bit for bit, never run, and turned into networks."""

import json
import os
import pickle
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import hostile_pickles
from base.errors import UserError
from edm_networks import EDMPrecond
from weights import pretrained

GOLDEN = Path(__file__).parent / "golden"
PICKLES = sorted(path.stem for path in GOLDEN.glob("*.pkl"))
SONG = {"img_resolution": 16, "img_channels": 3, "model_type": "SongUNet", "model_channels": 16}
ADM = {"img_resolution": 16, "img_channels": 3, "model_type": "DhariwalUNet", "model_channels": 64}
NCSNPP = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2}
MEMBERS = [
    {**SONG, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []},
    {**SONG, "channel_mult": [2, 1, 3], "num_blocks": 2, "attn_resolutions": [8], "label_dim": 3},
    {**SONG, "channel_mult": [1, 2], "num_blocks": 3, "attn_resolutions": [16, 8],
     "augment_dim": 9},
    {**SONG, "channel_mult": [1, 1, 1, 1], "num_blocks": 1, "attn_resolutions": [2, 4],
     "channel_mult_emb": 2, "img_channels": 1, "augment_dim": 6, "label_dim": 1},
    {**SONG, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [], "img_resolution": 64},
    {**SONG, **NCSNPP, "channel_mult": [2, 2], "num_blocks": 1, "attn_resolutions": [8],
     "resample_filter": [1, 3, 3, 1]},
    {**SONG, **NCSNPP, "channel_mult": [1, 2, 3], "num_blocks": 2, "attn_resolutions": [4],
     "resample_filter": [1, 2, 2, 1], "label_dim": 12, "augment_dim": 9},
    {**SONG, **NCSNPP, "channel_mult": [3, 1], "num_blocks": 1, "attn_resolutions": [16],
     "resample_filter": [-1, 3, 3, -1], "model_channels": 32},
    {**SONG, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8],
     "embedding_type": "fourier", "resample_filter": [1, 3, 3, 1], "img_channels": 4},
    {**ADM, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [16]},
    {**ADM, "channel_mult": [1, 2, 2], "num_blocks": 2, "attn_resolutions": [], "label_dim": 5},
    {**ADM, "channel_mult": [2, 1], "num_blocks": 1, "attn_resolutions": [8], "label_dim": 2,
     "channel_mult_emb": 2},
    {**ADM, "channel_mult": [1, 1, 2], "num_blocks": 1, "attn_resolutions": [16, 4],
     "img_channels": 1, "model_channels": 128, "augment_dim": 9},
]


def golden(name):
    """The configuration in a golden file, and the weights that it was made with."""
    data = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
    config, shapes = json.loads(str(data["config"])), json.loads(str(data["state_dict_shapes"]))
    state = {}
    for key, shape in shapes.items():
        r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
        module = key.split(".")[-2]
        if key.endswith("resample_filter"):
            taps = np.array(config["resample_filter"] if "resample_filter" in config else [1, 1])
            r = (np.outer(taps, taps) / taps.sum() ** 2)[None, None]
        elif key.endswith("freqs"):
            r = 16 * r
        elif len(shape) > 1:
            r = 0.6 * r / np.sqrt(np.prod(shape[1:]))
        else:
            r = 1 + 0.2 * r if "norm" in module and key.endswith(".weight") else 0.2 * r
        state[key] = torch.tensor(r, dtype=torch.float32)
    return config, state


NETWORKS = sorted(path.stem for path in GOLDEN.glob("*.npz")
                  if "config" in np.load(path, allow_pickle=False))


def assert_same(state, expected):
    assert set(state) == set(expected)
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def assert_inverted(config):
    """config_from_state_dict gives the configuration back, but for dropout."""
    network = EDMPrecond(**config)
    found = EDMPrecond(**pretrained.config_from_state_dict(network.state_dict())).config
    known = network.config
    levels = [known["img_resolution"] >> i for i in range(len(known["channel_mult"]))]
    known["attn_resolutions"] = [res for res in levels if res in known["attn_resolutions"]]
    for name in ("dropout", "label_dropout"):
        known.pop(name), found.pop(name)
    assert found == known


# ------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("name", PICKLES)
def test_golden_pickle_equals_the_recipe_bit_for_bit(name):
    config, expected = golden(name)
    found, state = pretrained.network_from_pickle(GOLDEN / f"{name}.pkl")
    assert {**found, **config} == found
    assert_same(state, expected)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", [*PICKLES, "ncsnpp-3level-aug"])
def test_every_pickle_protocol_reads_the_same(name, protocol, tmp_path):
    config, expected = golden(name)
    path = tmp_path / "network.pkl"
    path.write_bytes(hostile_pickles.network_pickle(config, expected, protocol))
    found, state = pretrained.network_from_pickle(path)
    assert found == config
    assert_same(state, expected)


def test_positional_constructor_arguments_get_their_names(tmp_path):
    path = tmp_path / "network.pkl"
    path.write_bytes(hostile_pickles.network_pickle(
        {"model_type": "SongUNet"}, {}, 4, args=(32, 3, 10, True)))
    assert pretrained.network_from_pickle(path)[0] == {
        "img_resolution": 32, "img_channels": 3, "label_dim": 10, "use_fp16": True,
        "model_type": "SongUNet"}


def test_plain_values_of_every_kind_are_read():
    value = {"a": [1, -2**40, 1.5, None, True, "é", b"bytes" * 100], 3: (1, (2, 3, 4), ()),
             "set": {1, 2, "x"}, "np": [np.float32(0.1), np.int64(-3), np.bool_(True)]}
    for protocol in (2, 3, 4, 5):
        found = pretrained.read_pickle(pickle.dumps(value, protocol))
        assert found == value and type(found["np"][1]) is int


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64,
                                   torch.uint8, torch.bool])
def test_tensors_of_every_type_and_stride_are_read(dtype):
    base = (torch.arange(24).reshape(4, 6) % 5).to(dtype)
    for tensor in (base, base.t(), base[1:, ::2], base[2, 3]):
        assert torch.equal(pretrained.read_pickle(pickle.dumps(tensor, 4)), tensor)


# ------------------------------------------------------------------------------------------------
# Hostile files


def test_hostile_pickles_run_nothing_and_end_in_one_clear_error_within_limits(tmp_path):
    sentinel, good = tmp_path / "ran", (GOLDEN / "ddpmpp-cond-8.pkl").read_bytes()
    names = []
    for name, data in hostile_pickles.hostile(f"touch {sentinel}", good):
        (tmp_path / f"{name}.pkl").write_bytes(data)
        names.append(name)
    assert len(names) == len(set(names)) > 100
    (tmp_path / "good.pkl").write_bytes(good)
    root = str(Path(pretrained.__file__).parents[1])
    answer = subprocess.run(
        [sys.executable, hostile_pickles.__file__, tmp_path], capture_output=True, text=True,
        timeout=300, check=True, env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"})
    results = {result["name"]: result for result in map(json.loads, answer.stdout.splitlines())}
    assert results.pop("good")["said"] == "loaded"
    assert sorted(results) == sorted(names)
    for result in results.values():
        kind, _, message = result["said"].partition(": ")
        assert result["status"] == 0, result  # neither out of time nor crashed
        assert kind in ("UnsafePickle", "UserError"), result
        assert "MemoryError" not in message and len(message) < 600, result
        assert f"{result['name']}.pkl: " in message and "\n" not in message, result
    assert not sentinel.exists() and not answer.stderr
    assert len(list((tmp_path / "converted").iterdir())) == 1  # the good one


def test_flipped_bytes_raise_nothing_but_a_user_error(tmp_path):
    good, random = (GOLDEN / "ddpmpp-cond-8.pkl").read_bytes(), np.random.default_rng(0)
    path = tmp_path / "flipped.pkl"
    for position in random.integers(0, 40_000, 60):  # where the structure is, not the numbers
        data = bytearray(good)
        data[position] ^= 1 << random.integers(8)
        path.write_bytes(data)
        try:
            pretrained.network_from_pickle(path)
        except UserError as error:
            assert str(path) in str(error)


# ------------------------------------------------------------------------------------------------
# Networks


def test_a_pickle_is_parsed_once_and_then_loaded_from_the_plain_file(tmp_path, monkeypatch):
    config, expected = golden("ddpmpp-cond-8")
    network = pretrained.load_network(GOLDEN / "ddpmpp-cond-8.pkl", tmp_path)
    assert_same(network.state_dict(), expected)
    assert not network.training and all(p.requires_grad for p in network.parameters())

    monkeypatch.setattr(pretrained, "read_pickle", None)
    again = pretrained.load_network(GOLDEN / "ddpmpp-cond-8.pkl", tmp_path)
    assert_same(again.state_dict(), expected)
    assert again.config == network.config == EDMPrecond(**config).config
    plain, = (tmp_path / "converted").iterdir()
    assert_same(pretrained.load_network(plain).state_dict(), expected)


def test_a_state_dict_becomes_the_network_without_its_gan_head_and_critic(tmp_path):
    _, expected = golden("adm-small")
    path = tmp_path / "pytorch_model.bin"
    others = {"cls_pred_branch.0.weight": torch.ones(3, 3), "step": torch.tensor(1)}
    for prefix in ("", "module.", "feedforward_model.", "guidance_model.fake_unet."):
        state = {prefix + name: tensor for name, tensor in expected.items()} | others
        state[f"{prefix}model.cls_pred_branch.0.bias"] = torch.ones(3)
        if prefix == "feedforward_model.":
            state |= {f"guidance_model.fake_unet.{k}": v + 1 for k, v in expected.items()}
        torch.save(state, path)
        assert_same(pretrained.load_network(path).state_dict(), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_configuration_of_golden_networks_is_inferred_from_their_weights(name):
    assert_inverted(golden(name)[0])


@pytest.mark.parametrize("config", MEMBERS)
def test_configuration_of_other_members_of_the_families_is_inferred(config):
    assert_inverted(config)


def test_bad_sources_are_named(tmp_path):
    def error(source):
        with pytest.raises(UserError) as caught:
            pretrained.load_network(source, tmp_path)
        return str(caught.value)

    assert "edm-imagenet-64x64-cond-adm" in error("edm-imagenet-64x64")
    for name, content in (("a.pkl", b""), ("a.bin", b"junk"), ("a.txt", b"x"), ("a.pt", b"")):
        (tmp_path / name).write_bytes(content)
        assert str(tmp_path / name) in error(tmp_path / name)
    _, state = golden("ddpmpp-cond-8")
    path = tmp_path / "b.pt"
    for change, said in (
            (lambda s: s.pop("model.map_layer0.weight"), "0 U-Nets"),
            (lambda s: s.pop("model.enc.8x8_block0.conv0.weight"), "conv0.weight"),
            (lambda s: s.pop("model.enc.8x8_conv.weight"), "8x8_conv.weight"),
            (lambda s: s.update({"model.map_layer1.bias": torch.ones(3)}), "map_layer1.bias"),
            (lambda s: s.update({"x.map_layer0.weight": torch.ones(3)}), "2 U-Nets"),
            (lambda s: s.update({"model.enc.8x8_conv.weight": "text"}), "state dict"),
            (lambda s: s.update({"model.enc.extra": torch.ones(3)}), "enc.extra")):
        changed = dict(state)
        change(changed)
        torch.save(changed, path)
        assert said in error(path) and str(path) in error(path)
    torch.save({"config": {"num_blocks": 10**9}, "state": {}}, path)
    assert "num_blocks" in error(path)
    torch.save([1], path)
    assert "state dict" in error(path)


def test_the_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/converted"):
        pretrained.load_network(GOLDEN / "adm-small.pkl", tmp_path / "file")
