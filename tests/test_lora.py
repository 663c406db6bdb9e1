"""LoRA over one frozen base, and DMD2's published students: tiny random pipelines, user's commands.

What a U-Net with adapters says is compared with arithmetic on its weights.
"""

import copy

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import evaluate
import sample
import tiny_pipelines
import train
from base.errors import UserError
from helpers import call
from images.captioned import Asked
from losses import denoising_loss
from models import AdaptedWithHead, sample_seeds, sample_student
from training import plan as plans
from training.options import parse
from training.roles import load_roles
from training.run_folder import read_metrics
from weights import checkpoint, exported
from weights.lora import LORA_FILE, LoRA, adapted_layers, as_diffusers, key, merge, parts_of
from weights.opening import open_network
from weights.pipeline import load_teacher

for libraries in (diffusers, transformers):             # they say much of what is meant here
    libraries.utils.logging.disable_progress_bar()
    libraries.utils.logging.set_verbosity_error()
PROMPTS = ["a cat", "two dogs", "a red car"]
FAST = ("--batch", 4, "--iterations", 3, "--save-every", 2, "--ttur", 2, "--learning-rate", 1e-2,
        "--ema-halflife", 1, "--lora", 4, "--device", "cpu")
# The layers of DMD2's LoRA, as the ends of their names.
DMD2 = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
        "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv",
        "time_emb_proj")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    for name, xl, seed in (("sd", False, 0), ("xl", True, 0), ("other", False, 1)):
        tiny_pipelines.save(folder / name, xl=xl, seed=seed)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture(params=["sd", "xl"])
def base(here, request):
    return load_teacher(here / request.param).requires_grad_(False)


@pytest.fixture
def run(here, monkeypatch):
    monkeypatch.chdir(here)
    return lambda *argv: call(monkeypatch, train, "--dataset", "sd15", "--teacher", "sd",
                              "--prompts", "prompts.txt", *FAST, *argv)


def moved(network, seed=0, by=0.05):
    """Adapters of no zeros."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += by * torch.randn_like(parameter)
    return network


def asked(network, batch=3):
    torch.manual_seed(5)
    sigma = torch.tensor([14.0, 1.5, 0.1])[:batch].reshape(-1, 1, 1, 1)
    width = 77 * network.text_width + sum(network.y_rest)
    return sigma * torch.randn(batch, *network.shape), sigma, torch.randn(batch, width)


def latest(folder):
    return checkpoint.load(folder / "latest.pt")


# ---- The network. ----

def test_the_layers_are_those_of_dmd2(base):
    linear = {name for name, module in base.unet.named_modules()
              if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}
    assert set(adapted_layers(base.unet)) == {name for name in linear if name.endswith(DMD2)}
    assert len(linear) > len(adapted_layers(base.unet)) > 70


@pytest.mark.parametrize("autocast", [False, True])
def test_zero_adapters_leave_every_output_as_it_was_bit_for_bit(base, autocast):
    inputs = asked(base)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for output in ("denoised", "encoder"):
            found = LoRA(base, 4)(*inputs, output=output)
            assert torch.equal(found, base(*inputs, output=output))


def test_adapters_are_a_change_of_low_rank_of_each_weight(base):
    role, inputs = moved(LoRA(base, 4)), asked(base)
    changed = copy.deepcopy(base)
    for name, layer in adapted_layers(changed.unet).items():
        change = role.changes[key(name)]
        down, up = change.down.double().flatten(1), change.up.double().flatten(1)
        weight = (up @ down).reshape(layer.weight.shape)
        assert torch.linalg.matrix_rank(weight.flatten(1)) == 4
        layer.weight.data += weight.float()
    with torch.no_grad():
        expected, found = changed(*inputs), role(*inputs)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        assert (base(*inputs) - expected).abs().max() > 0.05 * expected.abs().max()
        merged = merge(copy.deepcopy(base), parts_of(role.state_dict()), "it")
        assert (merged(*inputs) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_roles_have_their_own_adapters_and_one_base(base):
    student = moved(LoRA(base, 4))
    twin, inputs = copy.deepcopy(student), asked(base)
    before = base(*inputs), student(*inputs)
    assert torch.equal(twin(*inputs), before[1])
    moved(twin, seed=1)
    assert not torch.equal(twin(*inputs), before[1])
    assert torch.equal(student(*inputs), before[1]) and torch.equal(base(*inputs), before[0])
    own = {parameter.data_ptr() for parameter in base.parameters()}
    for role in (student, twin):
        inside = {parameter.data_ptr() for parameter in role.network.parameters()}
        assert own < inside and not own & {p.data_ptr() for p in role.parameters()}
    assert set(student.state_dict()) == {
        f"changes.{key(name)}.{side}" for name in adapted_layers(base.unet)
        for side in ("down", "up")}
    base.to(torch.float64)                              # moved or cast, it stays one
    assert {p.data_ptr() for p in base.parameters()} <= {
        p.data_ptr() for p in twin.network.parameters()}


def test_gradients_reach_adapters_alone_and_through_several_roles_at_once(base):
    """The student's loss: its own pass, then the adapted network's encoder, then backward."""
    student, adapted = moved(LoRA(base, 4)), moved(LoRA(base, 4), seed=1)
    adapted = AdaptedWithHead(adapted).requires_grad_(False)
    x_t, sigma, y = asked(base)
    adapted(student(x_t, sigma, y), sigma, y, output="logits").sum().backward()
    found = [parameter.grad for parameter in student.parameters()]
    assert all(gradient.abs().max() > 0 for gradient in found)
    assert all(parameter.grad is None for net in (base, adapted) for parameter in net.parameters())
    # By a difference, along the gradient.
    size = 1e-3 / sum(g.square().sum() for g in found).sqrt()
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, gradient in zip(student.parameters(), found):
                parameter += sign * size * gradient
            values.append(adapted(student(x_t, sigma, y), sigma, y, output="logits").sum())
    expected = 2 * size * sum(g.square().sum() for g in found)
    assert (values[0] - values[1]).item() == pytest.approx(expected.item(), rel=0.02)


def test_what_is_computed_again_for_the_backward_pass_has_the_roles_own_adapters(base):
    roles, inputs = [moved(LoRA(base, 4), seed) for seed in (0, 1)], asked(base)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            for role in roles:
                role.unet.enable_gradient_checkpointing()
        loss = sum(denoising_loss(inputs[0], inputs[1], torch.ones_like(inputs[0]), inputs[2],
                                  adapted=role, sigma_data=1.0) for role in roles)
        grads.append(torch.autograd.grad(loss, [p for role in roles for p in role.parameters()]))
    assert all(map(torch.equal, *grads))


def test_a_base_in_bf16_serves_adapters_in_fp32_under_autocast_and_without(base):
    role, inputs = moved(LoRA(base, 4)), asked(base)
    with torch.no_grad():
        expected = role(*inputs)
        base.to(torch.bfloat16)
        plain = role(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = role(*inputs)
    for found in (plain, autocast):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.05 * expected.norm()
    assert {parameter.dtype for parameter in role.parameters()} == {torch.float32}


# ---- A run. ----

@pytest.fixture(scope="module")
def trained(here, tmp_path_factory):
    """Stages 1, 2, 3, in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        assert call(patch, train, "--dataset", "sd15", "--teacher", "sd", "--prompts",
                    "prompts.txt", *FAST, "--folder", "run") == 0
    return here / "run"


def test_stages_1_2_3_train_adapters_each_from_those_before(here, trained):
    names = {f"changes.{key(name)}.{side}" for side in ("down", "up")
             for name in adapted_layers(load_teacher(here / "sd").unet)}
    for k in (1, 2, 3):
        saved = latest(trained / f"stage{k}")
        assert saved["lora"] == 4 and saved["iteration"] == 3
        for role in ("student", "ema", "adapted"):
            assert saved[role].keys() == names
        assert any(saved["student"][name].abs().max() > 1e-3 for name in names if "up" in name)
        assert (trained / f"stage{k}/best.pt").stat().st_size < 2e6     # the U-Net has 3 MB
    first = read_metrics(trained / "stage2" / "metrics.jsonl")[0]
    assert 0 <= first["unforget"] < 1e-9                # student and previous begin as one


def test_the_base_keeps_its_bits_over_a_run(run, here, monkeypatch, tmp_path):
    seen = {}

    def remembered(config, options, device):
        roles = load_roles(config, options, device)
        teacher = roles.opened.network
        seen[teacher] = copy.deepcopy(teacher.state_dict())
        return roles

    monkeypatch.setattr(train, "load_roles", remembered)
    for flags in ("--stage 2 --method dmd2", "--stage 1 --precision bf16 --batch-per-gpu 2"):
        assert run(*flags.split(), "--folder", tmp_path / flags[:9]) == 0
    assert len(seen) == 2
    for teacher, before in seen.items():
        assert all(torch.equal(value.view(torch.int16), before[name].view(torch.int16))
                   for name, value in teacher.state_dict().items())


def test_a_run_resumed_is_a_run_not_stopped(run, trained, tmp_path):
    assert run("--stage", 1, "--folder", tmp_path, "--iterations", 2) == 0
    assert run("--stage", 1, "--folder", tmp_path, "--force") == 0
    one, two = latest(tmp_path / "stage1"), latest(trained / "stage1")
    for role in ("student", "ema", "adapted"):
        assert all(torch.equal(one[role][name], two[role][name]) for name in one[role])


def test_the_student_is_opened_merged_and_exported_as_a_lora(here, trained, monkeypatch, tmp_path):
    best, out = trained / "stage3" / "best.pt", tmp_path / "out"
    assert call(monkeypatch, exported, "export", best, out) == 0
    assert {path.name for path in out.iterdir()} == {LORA_FILE, "README.md", "sampling.json",
                                                     "scheduler"}
    base = load_teacher(here / "sd")
    role = LoRA(base, 4)
    role.load_state_dict(checkpoint.load(best)["ema"])
    sigmas = base.levels.table[[999, 499, 249]].tolist()
    for source in (best, out):
        opened = open_network(source)
        assert list(opened.sigmas) == sigmas and opened.base == str(here / "sd")
        with torch.no_grad():
            inputs = asked(base)
            expected = role(*inputs)
            assert (opened.network(*inputs) - expected).abs().max() < 1e-5 * expected.abs().max()
            assert (base(*inputs) - expected).abs().max() > 1e-2 * expected.abs().max()
    card = (out / "README.md").read_text()
    assert "load_lora_weights(folder)" in card and "UNet2D" not in card and "rank: 4" in card
    tensors = load_file(out / LORA_FILE)
    assert {name.split(".lora_")[0] for name in tensors} == {
        f"unet.{name}" for name in adapted_layers(base.unet)}


def test_diffusers_makes_our_images_from_the_exported_lora(here, trained, monkeypatch, tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "out"
    assert call(monkeypatch, exported, "export", trained / "stage3" / "best.pt", out) == 0
    theirs = diffusers.DiffusionPipeline.from_pretrained(
        here / "sd", scheduler=diffusers.LCMScheduler.from_pretrained(out, subfolder="scheduler"))
    theirs.load_lora_weights(out)
    theirs.set_progress_bar_config(disable=True)
    opened = open_network(out)
    opened.serve(PROMPTS[:2], "cpu")
    for n in (1, 2, 3):
        expected = theirs(PROMPTS[:2], guidance_scale=0, timesteps=[999, 499, 249][:n],
                          generator=[torch.Generator().manual_seed(seed) for seed in (5, 9)],
                          output_type="latent").images
        latents, _ = sample_seeds(opened.network, [5, 9], lambda *inputs, n=n: sample_student(
            *inputs, sigmas=opened.sigmas[:n]), [0, 1])
        assert (latents - expected).abs().max() < 1e-5 * expected.abs().max()


# ---- The plan. ----

def plan(base, *argv):
    stage, = parse(["--dataset", "sd15", "--stage", "2", "--batch", "2", *argv])
    return plans.memory(train.iteration, stage.config, base.config, 2, precision="bf16")


def test_the_plan_counts_the_base_once(here):
    base = load_teacher(here / "sd")
    weights = sum(parameter.numel() for parameter in base.parameters())
    adapters = sum(parameter.numel() for parameter in LoRA(base, 4).parameters())
    whole, lora = plan(base), plan(base, "--lora", "4")
    assert whole["teacher and previous student"] == 2 * 2 * weights
    assert lora["teacher and previous student"] == 2 * (weights + adapters)
    assert lora["trained weights"] == lora["Adam states"] / 2 == 2 * 4 * adapters
    assert lora["moving average"] == lora["gradients"] == 4 * adapters


# ---- DMD2's published students. ----

def as_published(role, unet, path, alpha=8.0):
    """A LoRA file as DMD2's: Kohya's names, fp16, alpha beside each."""
    tensors = {}
    for name in adapted_layers(unet):
        change, stem = role.changes[key(name)], f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": change.down.detach().half(),
                    f"{stem}.lora_up.weight": change.up.detach().half(),
                    f"{stem}.alpha": torch.tensor(alpha).half()}
    save_file(tensors, path)


FOUR = [999, 749, 499, 249]


@pytest.mark.parametrize("kind, name, steps", [
    ("sd", "pytorch_model.bin", [999]), ("xl", "dmd2_sdxl_4step_unet_fp16.bin", FOUR),
    ("xl", "dmd2_sdxl_1step_unet_fp16.bin", [399]), ("xl", "unet.safetensors", FOUR),
    ("xl", "dmd2_sdxl_4step_lora_fp16.safetensors", FOUR)])
def test_published_students_open_over_their_base_at_their_timesteps(here, tmp_path, kind, name,
                                                                    steps):
    base, path = load_teacher(here / kind).requires_grad_(False), tmp_path / name
    expected, inputs = copy.deepcopy(base), asked(base)
    if "lora" in name:
        role = moved(LoRA(base, 4), by=0.1)
        as_published(role, base.unet, path)
        expected = merge(expected, {layer: change | {"alpha": torch.tensor(8.0)}
                                    for layer, change in parts_of(role.state_dict()).items()}, "it")
    else:
        moved(expected, by=0.01)
        state = {weight: value.half() for weight, value in expected.unet.state_dict().items()}
        save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    opened = open_network(path, base=here / kind)
    assert list(opened.sigmas) == base.levels.table[steps].tolist()
    assert opened.base == str(here / kind)
    found, wanted = opened.network(*inputs), expected(*inputs)
    assert (found - wanted).abs().max() < 5e-3 * wanted.abs().max()         # files of fp16
    assert (found - base(*inputs)).abs().max() > 5e-2 * wanted.abs().max()


def test_a_lora_that_diffusers_wrote_has_the_strength_that_it_has_there(here, tmp_path):
    peft = pytest.importorskip("peft")
    base = load_teacher(here / "sd").requires_grad_(False)
    role, pipeline = moved(LoRA(base, 4)), diffusers.StableDiffusionPipeline.from_pretrained(
        here / "sd")
    layers = {name.removeprefix("unet."): value
              for name, value in as_diffusers(role.state_dict(), base.unet).items()}
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(adapted_layers(base.unet)))
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=layers,
                               unet_lora_adapter_metadata=config.to_dict())
    pipeline.load_lora_weights(tmp_path)
    theirs, inputs = copy.deepcopy(base), asked(base)
    theirs.unet = pipeline.unet
    with torch.no_grad():
        expected = theirs(*inputs)
        found = open_network(tmp_path / LORA_FILE, base=here / "sd").network(*inputs)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        assert (role(*inputs) - expected).abs().max() > 1e-2 * expected.abs().max()
    config.use_rslora = True
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=layers,
                               unet_lora_adapter_metadata=config.to_dict())
    with pytest.raises(UserError, match="its scale is not one for all layers, nor alpha / rank"):
        open_network(tmp_path / LORA_FILE, base=here / "sd")


def test_a_published_student_is_sampled_and_compared_by_the_users_commands(here, monkeypatch,
                                                                           tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    base = load_teacher(here / "xl")
    as_published(moved(LoRA(base, 4)), base.unet, tmp_path / "dmd2_sdxl_4step_lora.safetensors")
    flags = "--checkpoint", "dmd2_sdxl_4step_lora.safetensors", "--base", here / "xl"
    assert call(monkeypatch, sample, *flags, "--prompt", "a cat", "--n", 2, "--out", "a.npz") == 0
    assert "taken for DMD2's, [999, 749, 499, 249]" in capsys.readouterr().out
    opened = open_network(flags[1], base=here / "xl")
    opened.serve(["a cat"], "cpu")
    images, _ = sample_seeds(opened.network, [0, 1], lambda *inputs: sample_student(
        *inputs, sigmas=opened.sigmas), [0, 0])
    expected = opened.network.pixels(images).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.load("a.npz")["arr_0"].astype(int) - expected).max() <= 1
    for base in ("", str(here / "xl")):                 # a record says what was around the network
        args = evaluate.parse(["--checkpoint", flags[1], *["--base", base][:2 * bool(base)]])
        job = evaluate.student_job(opened, Asked(["a cat"], {}), args, torch.device("cpu"))
        assert job.protocol[0]["source"].get("base", "") == base


def test_a_lora_of_another_base_is_refused_in_one_line(here, trained, run, monkeypatch, tmp_path,
                                                       capfd):
    monkeypatch.chdir(tmp_path)
    out, base = tmp_path / "out", load_teacher(here / "sd")
    assert call(monkeypatch, exported, "export", trained / "stage1/best.pt", out) == 0
    as_published(LoRA(base, 4), base.unet, tmp_path / "lora.safetensors")
    for source, pipeline in ((trained / "stage1/best.pt", "other"), (out, "other"),
                             (tmp_path / "lora.safetensors", "xl")):
        assert call(monkeypatch, sample, "--checkpoint", source, "--base", here / pipeline,
                    "--prompt", "a cat") == 2
        line, = capfd.readouterr().err.strip().splitlines()
        assert line.startswith("error: ") and "is a LoRA of another base" in line
    monkeypatch.chdir(here)
    refused = {"--teacher other --stage 2": "is a LoRA of another base than --teacher other",
               "--lora 2 --stage 2": "was trained with --lora 4, this run has --lora 2",
               "--lora -1 --stage 1": "--lora is -1; allowed: 0 or more"}
    for flags, message in refused.items():
        start = ("--start-from", trained / "stage1/best.pt") if "stage 2" in flags else ()
        assert run(*flags.split(), *start, "--folder", tmp_path / "new") == 2
        assert message in capfd.readouterr().err
    assert call(monkeypatch, train, "--lora", 4, "--stage", 1) == 2
    assert "--lora 4: is for text to image" in capfd.readouterr().err


def test_a_student_without_a_base_is_told_how_to_name_it(here, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    torch.save(load_teacher(here / "sd").unet.state_dict(), "unet.bin")
    assert call(monkeypatch, sample, "--checkpoint", "unet.bin", "--prompt", "a cat") == 2
    assert "give --base, its pipeline's folder or name" in capfd.readouterr().err
    assert call(monkeypatch, sample, "--checkpoint", "unet.bin", "--base", here / "xl") == 2
    assert "its weights do not fit its configuration" in capfd.readouterr().err
