"""Text to image: a U-Net as a denoiser against closed forms, files and pictures against diffusers.

The pipelines are tiny and random (tiny_pipelines.py); what is exact is compared in float64.
"""

import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny_pipelines
from base.errors import UserError
from gaussians import gaussian_denoiser
from helpers import ROOT
from losses import denoising_loss
from models import SeededNoise, sample_every_step, to_uint8
from text_to_image import TextDenoiser, build
from weights import checkpoint
from weights.exported import export, load_exported
from weights.pipeline import WEIGHTS, Pipeline, load_teacher

for libraries in (diffusers, transformers):             # they say much of what is meant here
    libraries.utils.logging.disable_progress_bar()
    libraries.utils.logging.set_verbosity_error()
PROMPTS = ["", "a photo of a cat", "A CAT, a cat!", "two  dogs", "7 lamps; 12 moths", "naïve café",
           "猫", "🐈 on a mat", "x" * 75, "the end " * 40]
STEPS = [999, 499, 249]
KINDS = {"sd": {}, "sd-v": dict(prediction_type="v_prediction"), "xl": dict(xl=True)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("pipelines")
    return {name: tiny_pipelines.save(base / name, **options) for name, options in KINDS.items()}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=["sd", "xl"])
def architecture(request):
    return request.param


@pytest.fixture
def copied(folders, tmp_path):
    """A pipeline folder of one's own, to be spoilt."""
    return lambda name="sd": shutil.copytree(folders[name], tmp_path / name)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def y_parts(network, tokens=77):
    """Text, SDXL's pooled vector, its sizes."""
    return [tokens * network.text_width, *network.y_rest]


def some_y(network, batch, seed=1):
    return normal(batch, sum(y_parts(network)), seed=seed)


def abar():
    """Of Stable Diffusion, in numpy: nothing here comes from the program."""
    return torch.from_numpy(np.cumprod(1 - np.linspace(0.00085 ** .5, 0.012 ** .5, 1000) ** 2))


def sigmas_of(network, timesteps=STEPS):
    return network.levels.table[timesteps].tolist()


# ---- The denoiser. ----

def test_levels_are_stable_diffusions_and_fractions_of_them_interpolate(folders):
    network = load_teacher(folders["sd"])
    table, at, first_scale, trained = network.levels
    assert torch.allclose(table, ((1 - abar()) / abar()).sqrt(), rtol=1e-12, atol=0)
    published = {0: 0.02917, 20: 0.13799, 249: 0.69320, 499: 1.61289, 980: 13.04308, 999: 14.61464}
    assert all(abs(table[t] - sigma) < 6e-6 for t, sigma in published.items())
    assert torch.equal(at(torch.arange(1000, dtype=torch.float64) / 999), table)
    assert [at(t / 999) for t in STEPS] == table[STEPS].tolist()
    assert math.isclose(at(499.25 / 999), table[499] ** .75 * table[500] ** .25, rel_tol=1e-12)
    between = at(torch.linspace(0, 1, 5001, dtype=torch.float64))
    assert (between.diff() > 0).all() and first_scale(3.0) == math.sqrt(10)
    drawn = trained(network.levels, 4000, torch.Generator().manual_seed(0)).flatten().sort()[0]
    assert set(drawn.tolist()) <= set(table.float().tolist())       # uniform over the timesteps
    timesteps = network.timestep(drawn.double())
    assert (timesteps / 999 - torch.linspace(0, 1, 4000)).abs().max() < 0.03
    # Uniform timesteps as DMD draws them, 2 % to 98 %, are timesteps again.
    assert torch.equal(network.timestep(table), torch.arange(1000))
    assert torch.equal(network.timestep((table[1:] * 0.51 + table[:-1] * 0.49).float()),
                       torch.arange(1, 1000))


class GaussianUNet(torch.nn.Module):
    """The best epsilon or v of latents from N(mean, std^2), at a timestep."""
    dtype = torch.float64

    def __init__(self, mean, std, predicts_v):
        super().__init__()
        self.mean, self.std, self.predicts_v = mean, std, predicts_v

    def forward(self, x, t, text, added_cond_kwargs):
        a, b = (root[t].reshape(-1, 1, 1, 1) for root in (abar().sqrt(), (1 - abar()).sqrt()))
        surprise = (x - a * self.mean) / (a ** 2 * self.std ** 2 + b ** 2)
        eps, x0 = b * surprise, self.mean + a * self.std ** 2 * surprise
        return SimpleNamespace(sample=a * eps - b * x0 if self.predicts_v else eps)


@pytest.mark.parametrize("name", ["sd", "sd-v"])
def test_d_is_the_posterior_mean_of_gaussian_latents_at_every_level(folders, name):
    network = load_teacher(folders[name])
    network.unet = GaussianUNet(0.3, 0.7, predicts_v=name == "sd-v")
    sigma = network.levels.table.reshape(-1, 1, 1, 1)
    x_t = 0.3 + (0.7 ** 2 + sigma ** 2).sqrt() * normal(1000, 1, 4, 4)
    found = network(x_t, sigma, torch.zeros(1, sum(y_parts(network))))
    assert (found - gaussian_denoiser(0.3, 0.7)(x_t, sigma)).abs().max() < 1e-6


def predicted(network, x_t, t, y):
    """What the U-Net says, asked as its documentation asks it."""
    text, pooled, sizes = y.split(y_parts(network), 1)
    c = abar()[t].sqrt().reshape(-1, 1, 1, 1)
    return network.unet(c * x_t, t, text.reshape(len(y), 77, -1), added_cond_kwargs={
        "text_embeds": pooled, "time_ids": sizes}).sample


def test_the_denoising_loss_is_the_error_of_epsilon_or_of_v(folders, kind):
    network = load_teacher(folders[kind]).double()
    assert network.sigma_data == (1.0 if kind == "sd-v" else math.inf)
    x0, eps, y = normal(5, *network.shape), normal(5, *network.shape, seed=2), some_y(network, 5)
    t = torch.tensor([999, 749, 499, 20, 0])
    a, b = (root[t].reshape(-1, 1, 1, 1) for root in (abar().sqrt(), (1 - abar()).sqrt()))
    sigma = network.levels.table[t].reshape(-1, 1, 1, 1)
    loss = denoising_loss(x0, sigma, eps, y, adapted=network, sigma_data=network.sigma_data)
    target = a * eps - b * x0 if kind == "sd-v" else eps
    expected = (predicted(network, x0 + sigma * eps, t, y) - target).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)


def test_guidance_of_d_is_guidance_of_epsilon(folders, architecture):
    network = load_teacher(folders[architecture]).double()
    x_t, t = 5 * normal(2, *network.shape), torch.tensor([999, 499])
    y, null, w = some_y(network, 2), some_y(network, 1, seed=9), 7.5
    sigma = network.levels.table[t].reshape(-1, 1, 1, 1)
    guided = (1 - w) * network(x_t, sigma, null) + w * network(x_t, sigma, y)
    without, asked = (predicted(network, x_t, t, part.expand(2, -1)) for part in (null, y))
    assert (asked - without).abs().max() > 1e-3
    eps = without + w * (asked - without)
    assert torch.allclose(guided, x_t - sigma * eps, rtol=0, atol=1e-10)


@pytest.mark.parametrize("timesteps", [[999], [999, 499], STEPS, [999, 749, 499, 249], [399]])
def test_the_roll_out_is_the_alternation_of_variance_preserving_diffusion(folders, kind, timesteps):
    network = load_teacher(folders[kind]).double()
    y, draws = some_y(network, 2), [normal(2, *network.shape, seed=10 + k) for k in range(5)]
    noise = iter(draws[1:])
    images = sample_every_step(network, draws[0], y, lambda: next(noise),
                               sigmas=sigmas_of(network, timesteps))
    x = draws[0]
    for k, t in enumerate(timesteps):
        a, b = abar()[t].sqrt(), (1 - abar()[t]).sqrt()
        with torch.no_grad():
            says = predicted(network, x / a, torch.tensor([t, t]), y)
        x0 = a * x - b * says if kind == "sd-v" else (x - b * says) / a
        assert (images[k] - x0).abs().max() < 1e-6 * x0.abs().max()
        if k + 1 < len(timesteps):
            a = abar()[timesteps[k + 1]]
            x = a.sqrt() * x0 + (1 - a).sqrt() * draws[k + 1]


@pytest.mark.parametrize("autocast", [False, True])
def test_encoder_features_are_the_middle_block_bit_for_bit(folders, architecture, autocast):
    network, seen = load_teacher(folders[architecture]), []
    network.unet.mid_block.register_forward_hook(lambda *args: seen.append(args[2]))
    x_t, y = normal(2, *network.shape).float(), some_y(network, 2).float()
    sigma = torch.tensor([14.0, 0.1]).reshape(-1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        network(x_t, sigma, y)
        features = network(x_t, sigma, y, output="encoder")
    assert torch.equal(features, seen[0].float()) and features.dtype == torch.float32
    assert seen[0].dtype == (torch.bfloat16 if autocast else torch.float32)
    side = network.encoder_resolution
    assert features.shape == (2, network.encoder_channels, side, side)


def test_the_gradient_of_features_reaches_the_encoder_and_all_of_it(folders, architecture):
    network = load_teacher(folders[architecture])
    x_t, y = normal(2, *network.shape).float(), some_y(network, 2).float()
    network(x_t, torch.ones(1, 1, 1, 1), y, output="encoder").square().sum().backward()
    reached = {name for name, p in network.unet.named_parameters() if p.grad is not None}
    assert reached == {name for name, _ in network.unet.named_parameters()
                       if not name.startswith(("up_blocks", "conv_norm_out", "conv_out"))}
    assert any(name.startswith("mid_block") for name in reached)


@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_in_bf16_timesteps_stay_whole_and_x0_is_fp32(folders, kind, half):
    network, seen = load_teacher(folders[kind]), []
    x_t, y = normal(3, *network.shape).float(), some_y(network, 3).float()
    sigma = network.levels.table[[999, 749, 499]].float().reshape(-1, 1, 1, 1)
    with torch.no_grad():
        exact = network(x_t, sigma, y)
        if half == "weights":
            network.bfloat16()
        network.unet.register_forward_pre_hook(lambda unet, args: seen.append(args[1]))
        with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
            rough = network(x_t, sigma, y)
    assert torch.equal(seen[0], torch.tensor([999, 749, 499]))      # 1000, 748, 500 in bf16
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_network_is_built_again_from_its_plain_config(folders, kind):
    network = load_teacher(folders[kind])
    twin = build(json.loads(json.dumps(network.config)))
    assert all(p.is_meta for p in twin.parameters())
    twin.load_state_dict(network.state_dict(), assign=True)
    x_t, y = normal(2, *network.shape).float(), some_y(network, 2).float()
    inputs = x_t, torch.ones(2, 1, 1, 1), y
    assert torch.equal(twin(*inputs), network(*inputs))
    assert torch.equal(twin.levels.table, network.levels.table)


PUBLISHED = {
    "SD 1.5": dict(sample_size=64, cross_attention_dim=768),
    "SDXL": dict(sample_size=128, cross_attention_dim=2048, block_out_channels=[320, 640, 1280],
                 down_block_types=["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
                 up_block_types=[*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
                 attention_head_dim=[5, 10, 20], transformer_layers_per_block=[1, 2, 10],
                 use_linear_projection=True, addition_embed_type="text_time",
                 addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)}


@pytest.mark.parametrize("name, count, parts, shape, resolution", [
    ("SD 1.5", 859_520_964, [77 * 768, 0, 0], (4, 64, 64), 8),
    ("SDXL", 2_567_463_684, [77 * 2048, 1280, 6], (4, 128, 128), 32)])
def test_the_published_networks_have_their_shapes(folders, name, count, parts, shape, resolution):
    config = load_teacher(folders["sd"]).config | {"unet": PUBLISHED[name]}
    network = build(config)                                 # without weights, and without memory
    assert sum(p.numel() for p in network.parameters()) == count
    assert (y_parts(network), network.shape) == (parts, shape)
    x_t, y = (torch.empty(2, *size, device="meta") for size in (shape, [sum(parts)]))
    sigma = torch.empty(2, 1, 1, 1, device="meta")
    assert network(x_t, sigma, y).shape == x_t.shape
    assert network(x_t, sigma, y, output="encoder").shape == (
        2, network.encoder_channels, network.encoder_resolution, network.encoder_resolution)
    assert (network.encoder_channels, network.encoder_resolution) == (1280, resolution)


# ---- Prompts and pictures. ----

def test_the_vae_of_sdxl_is_never_asked_in_fp16(folders):
    pipeline = Pipeline(folders["xl"])
    latents = torch.zeros(1, 4, 16, 16)
    pipeline.vae.bfloat16()
    assert pipeline.decode_float(latents).isfinite().all()
    assert pipeline.decode(latents).shape == (1, 3, 32, 32)
    pipeline.vae.half()
    for decode in (pipeline.decode_float, pipeline.decode):
        with pytest.raises(UserError,
                           match="the VAE of SDXL overflows in fp16; allowed: fp32, bf16"):
            decode(latents)


def test_a_prompts_y_is_bit_for_bit_what_diffusers_embeds(folders, architecture, capsys):
    theirs = diffusers.DiffusionPipeline.from_pretrained(folders[architecture])
    ours = Pipeline(folders[architecture])
    text, null, *pooled = theirs.encode_prompt(
        prompt=PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    y = ours.embed(PROMPTS)
    if architecture == "sd":
        assert torch.equal(y, text.flatten(1))
    else:
        sizes = theirs._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.float32, 16)
        assert sizes.tolist() == [[32, 32, 0, 0, 32, 32]] and not null.any() and not pooled[1].any()
        assert torch.equal(y, torch.cat([text.flatten(1), pooled[0], sizes.expand(10, -1)], 1))
    conditions = ours.conditions(PROMPTS)
    expected = torch.cat([null[:1].flatten(1), *([pooled[1][:1], sizes] if pooled else [])], 1)
    assert torch.equal(conditions.null, expected) and conditions.count == 10
    assert torch.equal(conditions.embed(torch.tensor([3, 1])), ours.embed([PROMPTS[3], PROMPTS[1]]))
    assert not y.requires_grad and len(y.unique(dim=0)) == 10
    assert y.shape[1] == sum(y_parts(load_teacher(folders[architecture])))


def test_a_long_prompt_is_cut_and_that_is_said_once(folders, capsys):
    pipeline = Pipeline(folders["sd"])
    pipeline.spelled = True                             # that its words are unknown is said too
    pipeline.embed(["b" * 75])
    assert not capsys.readouterr().err
    assert torch.equal(pipeline.embed(["b" * 76, "a"])[0], pipeline.embed(["b" * 500])[0])
    assert capsys.readouterr().err == ("a prompt has more than 77 tokens: it is cut there, as "
                                       "every long one is\n")


def test_pictures_are_diffusers_own_and_their_gradient_reaches_the_latents(folders, architecture):
    pipeline = Pipeline(folders[architecture])
    vae = diffusers.AutoencoderKL.from_pretrained(folders[architecture] / "vae")
    factor = {"sd": 0.18215, "xl": 0.13025}[architecture]
    latents = normal(2, 4, 16, 16).float().requires_grad_()
    floats = pipeline.decode_float(latents)
    with torch.no_grad():
        expected = torch.cat([vae.decode(one / factor).sample for one in latents.split(1)])
        posteriors = [vae.encode(one).latent_dist
                      for one in (to_uint8(expected) / 127.5 - 1).split(1)]
    assert torch.equal(floats.detach(), expected)
    assert torch.equal(pipeline.decode(latents), to_uint8(expected))
    processed = diffusers.image_processor.VaeImageProcessor().postprocess(expected, "np")
    rounded = torch.from_numpy((processed * 255).round()).permute(0, 3, 1, 2)
    assert (pipeline.decode(latents) - rounded).abs().max() <= 1
    assert ((pipeline.decode(latents) - rounded) != 0).float().mean() < 1e-3
    floats.sum().backward()
    assert latents.grad.abs().min() > 0 and not any(p.requires_grad for p in pipeline.parameters())

    means = torch.cat([p.mean for p in posteriors]) * factor
    spread = torch.cat([p.std for p in posteriors]) * factor
    draw = torch.randn(means.shape, generator=torch.Generator().manual_seed(3))
    images = pipeline.decode(latents)
    assert torch.equal(pipeline.encode(images), means)
    sampled = pipeline.encode(images, torch.Generator().manual_seed(3))
    assert torch.allclose(sampled, means + spread * draw, atol=1e-6)


def test_files_as_they_were_published_years_ago_load_the_same(folders, copied):
    """Text weights under text_model., the VAE's attention as query and key, a plain vocabulary."""
    old = copied()
    file = old / "text_encoder" / "model.safetensors"
    state = {f"text_model.{name.removeprefix('text_model.')}": value
             for name, value in load_file(file).items()}
    save_file(state | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file,
              {"format": "pt"})
    file = old / "vae" / f"{WEIGHTS}.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {re.sub("|".join(names), lambda found: names[found[0]], name): value
             for name, value in load_file(file).items()}
    assert any("query" in name for name in state)
    save_file(state, file, {"format": "pt"})
    tokens = json.loads((old / "tokenizer" / "tokenizer.json").read_text())
    (old / "tokenizer" / "vocab.json").write_text(json.dumps(tokens["model"]["vocab"]))
    (old / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (old / "tokenizer" / "tokenizer.json").unlink()
    ours, theirs = Pipeline(old), Pipeline(folders["sd"])
    assert torch.equal(ours.embed(PROMPTS), theirs.embed(PROMPTS))
    latents = normal(1, 4, 16, 16).float()
    assert torch.equal(ours.decode_float(latents), theirs.decode_float(latents))


def test_weights_in_several_files_are_one_network(folders, copied):
    folder = copied() / "unet"
    diffusers.UNet2DConditionModel.from_pretrained(folder).save_pretrained(
        folder, max_shard_size="1MB")
    assert len(list(folder.glob("*-of-*.safetensors"))) > 1
    found, expected = load_teacher(folder.parent), load_teacher(folders["sd"])
    assert all(map(torch.equal, found.state_dict().values(), expected.state_dict().values()))


# ---- A student as a folder, and diffusers' own pictures of it. ----

def card_code(folder):
    """The code block of the model card, made to run where the card is not the current folder."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    return code.replace('folder = "."', f"folder = {str(folder)!r}")


def test_diffusers_makes_our_pictures_from_the_exported_folder(folders, kind, tmp_path):
    network, ours = load_teacher(folders[kind]), Pipeline(folders[kind])
    assert export(network, folders[kind], sigmas_of(network), tmp_path / "out", {}) == STEPS
    told = {}
    with warnings.catch_warnings(action="error"):
        exec(card_code(tmp_path / "out"), told)             # loads, and makes a picture
    assert told["picture"].size == (32, 32)
    theirs, prompts, seeds = told["pipeline"], ["a cat", "two dogs", ""], [5, 6, 7]
    theirs.set_progress_bar_config(disable=True)
    sigmas, noise = sigmas_of(network), SeededNoise(seeds, network.shape, "cpu")
    images = sample_every_step(network, noise(), ours.embed(prompts), noise, sigmas=sigmas)
    for guidance, n in [(0, 1), (1, 1), (0, 2), (0, 3)]:
        def diffusers_says(output_type, guidance=guidance, n=n):
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            return theirs(prompts, guidance_scale=guidance, timesteps=STEPS[:n],
                          generator=generators, output_type=output_type).images

        latents = diffusers_says("latent")
        assert (images[n - 1] - latents).abs().max() < 1e-5 * latents.abs().max()
        pixels = (diffusers_says("np") * 255).round().transpose(0, 3, 1, 2)
        assert np.abs(ours.decode(images[n - 1]).numpy() - pixels).max() <= 1
    assert (images[0] - images[2]).abs().max() > 0.1        # the steps differ by far more
    found, found_sigmas, base = load_exported(tmp_path / "out")
    noise = SeededNoise(seeds, found.shape, "cpu")
    again = sample_every_step(found, noise(), Pipeline(base).embed(prompts), noise,
                              sigmas=found_sigmas)
    assert all(map(torch.equal, again, images))


@pytest.mark.parametrize("timesteps, grid, without_them", [
    ([999], 1, [1]), ([999, 499], 2, [1, 2]), (STEPS, 4, [1, 2]), ([399], 5, []),
    ([999, 749, 499, 249], 4, [1, 3, 4])])
def test_the_scheduler_knows_the_timesteps(folders, tmp_path, monkeypatch, timesteps, grid,
                                           without_them):
    network = load_teacher(folders["sd"])
    export(network, folders["sd"], sigmas_of(network, timesteps), tmp_path / "out", {})
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert (config["original_inference_steps"], config["timestep_scaling"]) == (grid, 1e6)
    scheduler = diffusers.LCMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    said = []
    monkeypatch.setattr(diffusers.schedulers.scheduling_lcm.logger, "warning", said.append)
    scheduler.set_timesteps(timesteps=timesteps)
    assert scheduler.timesteps.tolist() == timesteps
    assert len(said) == (timesteps[0] != 999)               # of the first one it always warns

    def chosen(n):
        scheduler.set_timesteps(n)
        return scheduler.timesteps.tolist()

    assert [n for n in range(1, len(timesteps) + 1) if chosen(n) == timesteps[:n]] == without_them


def test_the_exported_folder_is_whole_readable_and_says_what_it_is(folders, tmp_path):
    network = load_teacher(folders["sd"])
    facts = {"method": "pmdd", "prompts": "captions.txt"}
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    export(network, name, sigmas_of(network), tmp_path / "out", facts)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {str(path.relative_to(tmp_path / "out")) for path in files} == {
        "README.md", "config.json", f"{WEIGHTS}.safetensors", "sampling.json",
        "scheduler/scheduler_config.json"}
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in files)
    card = (tmp_path / "out" / "README.md").read_text()
    metadata = huggingface_hub.ModelCard(card).data.to_dict()
    assert metadata["license"] == "creativeml-openrail-m" and metadata["base_model"] == name
    assert metadata["library_name"] == "diffusers"
    assert all(line in card for line in (
        "- method: pmdd", "- prompts: captions.txt", "timesteps=[999, 499, 249])", "at most 1",
        "1: `[999]`, 2: `[999, 499]`, 3: `[999, 499, 249]`"))
    found, sigmas, base = load_exported(tmp_path / "out")
    assert (sigmas, base) == (sigmas_of(network), name)
    assert found.config == network.config | {"unet": found.config["unet"]}
    assert all(map(torch.equal, found.state_dict().values(), network.state_dict().values()))


def test_an_export_that_fails_leaves_nothing_and_one_that_would_overwrite_is_refused(
        folders, tmp_path, monkeypatch):
    network = load_teacher(folders["sd"])
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists; give a new folder"):
        export(network, "a/b", sigmas_of(network), tmp_path / "there", {})
    monkeypatch.setattr(diffusers.LCMScheduler, "save_pretrained", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(network, "a/b", sigmas_of(network), tmp_path / "out", {})
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_folders_own_licence_is_passed_on(folders, copied, tmp_path):
    base = copied()
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    network = load_teacher(base)
    export(network, base, sigmas_of(network), tmp_path / "out", {})
    metadata = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert metadata["license"] == "mit" and "base_model" not in metadata


def test_the_export_command_takes_a_checkpoint(folders, tmp_path):
    network = load_teacher(folders["sd"])
    checkpoint.save(tmp_path / "best.pt", {
        "dataset": "sd15", "method": "pmdd", "stage": 3, "sigmas": sigmas_of(network),
        "network": network.config, "pipeline": str(folders["sd"]), "ema": network.state_dict()})

    def command(*arguments):
        return subprocess.run([sys.executable, ROOT / "text_to_image.py", *arguments], text=True,
                              cwd=tmp_path, capture_output=True)

    done = command("export", "best.pt", "out")
    assert done.returncode == 0 and "timesteps [999, 499, 249]" in done.stdout, done.stderr
    found, sigmas, base = load_exported(tmp_path / "out")
    assert (sigmas, base) == (sigmas_of(network), str(folders["sd"]))
    assert all(map(torch.equal, found.state_dict().values(), network.state_dict().values()))
    refused = command("export", "best.pt")
    assert refused.returncode == 2 and refused.stderr.startswith("error: usage:")


# ---- What is refused, and what is not imported. ----

def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without_a_weight(path):
    state = load_file(path)
    del state[sorted(state)[0]]
    save_file(state, path, {"format": "pt"})


def as_pickle(folder):
    path = folder / f"{WEIGHTS}.safetensors"
    path.rename(path.with_suffix(".bin"))


UNET, SCHEDULER = f"unet/{WEIGHTS}.safetensors", "scheduler/scheduler_config.json"
SPOILT = {
    "is no pipeline folder: it holds no model_index.json": lambda f: (
        f / "model_index.json").unlink(),
    "JSONDecodeError": lambda f: (f / "model_index.json").write_text("{"),
    "config.json: no JSON object": lambda f: (f / "unet/config.json").write_text("[]"),
    "is a StableDiffusion3Pipeline, not a pipeline of Stable Diffusion 1.x": lambda f: edit(
        f / "model_index.json", _class_name="StableDiffusion3Pipeline"),
    ".bin is a pickle": lambda f: as_pickle(f / "unet"),
    "only diffusion_pytorch_model.fp16.safetensors; save the pipeline without variant": lambda f: (
        f / UNET).rename((f / UNET).with_suffix(".fp16.safetensors")),
    "holds no diffusion_pytorch_model.safetensors$": lambda f: (f / UNET).unlink(),
    "prediction_type is 'sample'; allowed: epsilon, v_": lambda f: edit(
        f / SCHEDULER, prediction_type="sample"),
    "has rescale_betas_zero_snr; allowed": lambda f: edit(
        f / SCHEDULER, rescale_betas_zero_snr=True),
    "beta_schedule is 'squaredcos_cap_v2'; allowed: linear": lambda f: edit(
        f / SCHEDULER, beta_schedule="squaredcos_cap_v2"),
    "9 channels in and 4 out": lambda f: edit(f / "unet/config.json", in_channels=9),
    "unet: SafetensorError": lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-9]),
    "Missing key.*conv_in.bias": lambda f: without_a_weight(f / UNET),
}
SPOILT_AROUND = {
    "cannot load .*text_encoder: ": lambda f: (f / "text_encoder/model.safetensors").write_bytes(
        b"\0" * 99),
    "text_encoder: 1 weights are missing, the first is '.*embedding.weight'":
        lambda f: without_a_weight(f / "text_encoder/model.safetensors"),
    "vae: 1 weights are missing": lambda f: without_a_weight(
        f / f"vae/{WEIGHTS}.safetensors"),
    "vae holds no .*is a pickle": lambda f: as_pickle(f / "vae"),
    "cannot load .*tokenizer: ": lambda f: shutil.rmtree(f / "tokenizer"),
}


@pytest.mark.parametrize("message", [*SPOILT, *SPOILT_AROUND])
def test_a_spoilt_pipeline_is_refused_in_one_line(copied, message):
    folder = copied()
    (SPOILT | SPOILT_AROUND)[message](folder)
    load = load_teacher if message in SPOILT else Pipeline
    with pytest.raises(UserError, match=message) as refused:
        load(folder)
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


def test_a_pipeline_that_cannot_be_had_is_named_with_what_can_be_given(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", tmp_path)
    for load in (load_teacher, Pipeline):
        with pytest.raises(UserError, match="no pipeline 'some/name': it is no folder") as refused:
            load("some/name")
        assert f"into {tmp_path}" in str(refused.value)
        assert "a pipeline folder downloaded elsewhere can be given" in str(refused.value)


def test_of_a_published_pipeline_only_what_is_needed_is_fetched(monkeypatch, folders):
    wanted = {}

    def snapshot_download(name, **patterns):
        wanted[name] = patterns
        return folders["sd"]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load_teacher("some/unet").shape == (4, 16, 16)
    assert Pipeline("some/rest").size == 32
    weights = ["model", "model.fp16", "diffusion_pytorch_model", "diffusion_pytorch_model.fp16",
               "diffusion_pytorch_model.non_ema", "diffusion_pytorch_model-00001-of-00002"]
    parts = ("unet", "text_encoder", "vae", "safety_checker")
    published = [f"{part}/{name}.{kind}" for part in parts
                 for name in weights for kind in ("safetensors", "bin")] + [
        "model_index.json", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "README.md",
        "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json",
        "text_encoder/config.json", "tokenizer/merges.txt", "tokenizer/vocab.json"]

    def fetched(name):
        return set(huggingface_hub.utils.filter_repo_objects(published, **wanted[name]))

    for_both = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json"}
    assert fetched("some/unet") - for_both == {
        f"unet/{name}.safetensors" for name in weights if name[-5:] not in (".fp16", "n_ema")}
    assert {"tokenizer/merges.txt", "tokenizer/vocab.json", "text_encoder/model.safetensors",
            "text_encoder/config.json", "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors", *for_both} <= fetched("some/rest")
    assert not any("unet/" in name or "safety" in name for name in fetched("some/rest") - for_both)


@pytest.mark.parametrize("name", ["diffusers", "transformers", "huggingface_hub"])
def test_a_missing_library_is_named_with_the_command_that_brings_it(monkeypatch, folders, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"needs {name} .*pip install -r requirements-text.txt"):
        load_teacher(folders["sd"])
        Pipeline("some/name" if name == "huggingface_hub" else folders["sd"])


def test_what_is_hidden_in_a_checkpoint_is_no_text_network():
    with pytest.raises(UserError, match="prediction_type is None"):
        TextDenoiser(unet={}, prediction_type=None, schedule={})


def test_no_module_imports_the_extra_libraries():
    rooms = [path.parent for path in ROOT.glob("*/__init__.py")]
    modules = [path.stem for path in ROOT.glob("*.py")] + [
        f"{room.name}.{path.stem}" for room in rooms for path in room.glob("[!_]*.py")]
    assert "text_to_image" in modules and "weights.exported" in modules
    code = f"import {', '.join(modules)}; import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    extra = {"diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub"}
    assert not extra & set(loaded.stdout.split())
