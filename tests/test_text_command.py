"""Text to image by the user's own commands: from a pipeline's folder and prompts to diffusers.

The pipeline is tiny and random (tiny_pipelines.py): what is trained here is never better, only the
same, bit for bit, or as a formula says.
"""

import ast
import copy
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from functools import partial
from types import SimpleNamespace

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import metrics.inception
import metrics.lpips
from presets import datasets, rows
import sample
import tiny_pipelines
import train
from faults import differences, outcome
from fid import write_reference
from gaussians import gaussian_denoiser
from helpers import ROOT, ShallowInception, call, in_ranks
from images.sets import open_npz
from losses import dm_loss
from metrics.lpips import LPIPS
from models import Conditions, Guided, level, sample_heun, sample_seeds, sample_student
from weights.pipeline import Pipeline, load_teacher
from training import cost, log, plan
from training.draws import Sources, draw
from training.options import parse
from training.roles import Roles, load_roles
from training.run_folder import read_metrics
from weights import checkpoint, exported
from weights.opening import open_network

for libraries in (diffusers, transformers):             # they say much of what is meant here
    libraries.utils.logging.disable_progress_bar()
    libraries.utils.logging.set_verbosity_error()
PROMPTS = ["a cat", "two dogs", "a red car", "the sea at night", "7 lamps"]
STEPS = [999, 499, 249]
# A run of a second. The average follows the student at once, for a student that differs.
FAST = ("--batch", 4, "--iterations", 3, "--save-every", 2, "--ttur", 2, "--learning-rate", 1e-3,
        "--ema-halflife", 1)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A pipeline's folder, prompts, pictures with captions in every form, all of it tiny."""
    folder = tmp_path_factory.mktemp("text")
    tiny_pipelines.save(folder / "pipeline")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    random = np.random.default_rng(0)
    pixels = [random.integers(0, 256, (34, 50, 3), np.uint8) for _ in range(5)]
    for name, kind in (("told", "png"), ("beside", "jpg")):
        (folder / name).mkdir()
        for i, picture in enumerate(pixels):
            Image.fromarray(picture).save(folder / name / f"{i}.{kind}")
            if name == "beside":
                (folder / name / f"{i}.txt").write_text(f"picture {i}\n")
    (folder / "told" / "dataset.json").write_text(json.dumps(
        {"labels": [[f"{i}.png", f"picture {i}"] for i in range(5)]}))
    for name in ("told", "beside"):
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as file:
            for path in (folder / name).iterdir():
                file.write(path, path.name)
    return folder


@pytest.fixture(scope="module")
def trained(here):
    """The user's whole command on two processes, with its FID: stages 1, 2, 3."""
    torch.manual_seed(0)
    torch.save(ShallowInception().state_dict(), here / "inception.pth")
    wide = ShallowInception.dimensions
    write_reference(here / "reference.npz", np.full(wide, 0.4), np.eye(wide))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.inception, "Inception", ShallowInception)
        in_ranks(2, train, "--dataset", "sd15", "--teacher", "pipeline", "--prompts", "prompts.txt",
                 "--reference", "reference.npz", "--inception", "inception.pth",
                 "--evaluate-images", 2, "--evaluate-every", 3, *FAST, cwd=here)
    return here / "runs" / "sd15-pmdd"


@pytest.fixture
def run(here, monkeypatch):
    """train.py in this process; its exit code."""
    monkeypatch.chdir(here)
    return lambda *argv: call(monkeypatch, train, "--dataset", "sd15", "--teacher", "pipeline",
                              "--prompts", "prompts.txt", *FAST, *argv)


def lines_of(folder):
    return read_metrics(folder / "stage1" / "metrics.jsonl")


def latest(folder):
    return checkpoint.load(folder / "latest.pt")


def distance(a, b):
    """The largest difference of two networks' weights."""
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ---- The whole way. ----

def test_stages_1_2_3_run_on_two_processes_with_their_fids(here, trained):
    teacher = load_teacher(here / "pipeline")
    for k in (1, 2, 3):
        saved, best = latest(trained / f"stage{k}"), checkpoint.load(trained / f"stage{k}/best.pt")
        assert saved["iteration"] == 3 and saved["pipeline"] == str(here / "pipeline")
        assert saved["sigmas"] == teacher.levels.table[STEPS[:k]].tolist()
        assert best["network"] == teacher.config and "optimizers" not in best
        fids = {name: value for line in read_metrics(trained / f"stage{k}" / "metrics.jsonl")
                for name, value in line.items() if "FID" in name}
        assert list(fids) == [f"FID@{n + 1}" for n in range(k)] and min(fids.values()) > 0
        start = checkpoint.load(trained / f"stage{k - 1}/best.pt")["ema"] if k > 1 else (
            teacher.state_dict())
        assert 1e-4 < distance(start, saved["student"]) < 0.01     # two of Adam's steps
        assert set(saved["adapted"]) == set(start)


def test_two_processes_do_what_one_does(trained, run, tmp_path, capsys):
    assert run("--stage", 1, "--folder", tmp_path, "--evaluate-every", 0) == 0
    assert capsys.readouterr().out.endswith('best.pt --steps 1 --prompt "..."\n')
    one = lines_of(tmp_path)
    two = [line for line in lines_of(trained) if "denoising" in line]
    assert len(one) == len(two) == 2
    for a, b in zip(one, two):
        for name in ("distill", "denoising", "student_gradient", "adapted_gradient"):
            assert a[name] == pytest.approx(b[name], rel=1e-3)


def test_other_prompts_in_a_file_of_the_same_name_are_refused(run, tmp_path, capsys):
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a cat")
    flags = ("--stage", 1, "--folder", tmp_path, "--evaluate-every", 0, "--prompts", prompts)
    assert run(*flags, "--iterations", 1) == 0
    prompts.write_text("a dog")
    assert run(*flags, "--force", "--iterations", 2) == 0
    prompts.write_text("a fox")
    assert run(*flags, "--iterations", 2) == 2
    assert "mine.txt holds other prompts than when" in capsys.readouterr().err


def test_diffusers_makes_the_pictures_of_sample_py_from_the_exported_folder(
        here, trained, monkeypatch, tmp_path):
    best, out = trained / "stage3" / "best.pt", tmp_path / "out"
    assert call(monkeypatch, exported, "export", best, out) == 0
    unet = diffusers.UNet2DConditionModel.from_pretrained(out)
    theirs = diffusers.DiffusionPipeline.from_pretrained(
        here / "pipeline", unet=unet,
        scheduler=diffusers.LCMScheduler.from_pretrained(out, subfolder="scheduler"))
    theirs.set_progress_bar_config(disable=True)
    prompts, seeds = PROMPTS[:2], [5, 9]
    opened = open_network(out)
    opened.serve(prompts, "cpu")
    monkeypatch.chdir(tmp_path)                         # the pipeline is found from anywhere
    for n in (1, 2, 3):
        def diffusers_says(output_type, n=n):
            generators = [torch.Generator().manual_seed(seed) for seed in seeds * 2]
            return theirs([p for p in prompts for _ in seeds], guidance_scale=0,
                          timesteps=STEPS[:n], generator=generators, output_type=output_type).images

        sampler = partial(sample_student, sigmas=opened.sigmas[:n])
        latents, _ = sample_seeds(opened.network, seeds * 2, sampler, [0, 0, 1, 1])
        expected = diffusers_says("latent")
        assert (latents - expected).abs().max() < 1e-5 * expected.abs().max()
        pixels = (diffusers_says("np") * 255).round()
        for source in (best, out):
            assert call(monkeypatch, sample, "--checkpoint", source, "--prompt", *prompts,
                        "--seeds", "5,9", "--steps", n, "--out", "a.npz", "--force") == 0
            drawn = np.load("a.npz")["arr_0"]
            assert np.abs(drawn - pixels).max() <= 1 and (drawn != pixels).mean() < 1e-3
    assert distance(unet.state_dict(), theirs.unet.state_dict()) == 0 < distance(
        unet.state_dict(), load_teacher(here / "pipeline").unet.state_dict())


def test_a_prompts_file_gives_pictures_with_their_captions(trained, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.jsonl").write_text('{"caption": "a cat"}\n"two dogs"\n')
    flags = "--checkpoint", trained / "stage3" / "best.pt"
    assert call(monkeypatch, sample, *flags, "--prompts", "two.jsonl", "--n", 3,
                "--out", "a.zip") == 0
    with zipfile.ZipFile("a.zip") as file:
        told = json.loads(file.read("dataset.json"))["labels"]
        pictures = [np.asarray(Image.open(file.open(name))) for name, _ in told]
    assert [caption for _, caption in told] == ["a cat"] * 3 + ["two dogs"] * 3
    assert call(monkeypatch, sample, *flags, "--prompt", "two dogs", "--seeds", "1,0",
                "--out", "b.npz") == 0
    again = open_npz(tmp_path / "b.npz").take([0, 1])[0].permute(0, 2, 3, 1).numpy()
    assert np.array_equal(again, [pictures[4], pictures[3]])    # a picture is its seed and prompt
    assert not np.array_equal(pictures[0], pictures[3])


def test_compare_shows_the_students_own_teacher_without_being_told(
        trained, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, sample, "--runs", trained.parent, "--compare", "--prompt", *PROMPTS,
                "--heun", 2) == 0
    picture = Image.open(tmp_path / "sd15-compare.png")
    assert picture.height == 20 + 5 * 129 + 1           # a line of labels, a row for each prompt
    assert picture.width > 4 * 129                      # teacher, 1, 2, 3 steps; captions
    said = capsys.readouterr().err
    assert said.count("the tokenizer does not know") == 1       # by the one pipeline of both


def test_a_students_pipeline_is_the_teacher_of_a_name_of_ones_own(
        here, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(here)
    assert call(monkeypatch, train, "--dataset", "mine", "--teacher", "pipeline", "--prompts",
                "prompts.txt", *FAST, "--stage", 1, "--folder", tmp_path / "mine-pmdd") == 0
    assert call(monkeypatch, sample, "--runs", tmp_path, "--dataset", "mine", "--heun", 2,
                "--prompt", *PROMPTS, "--out", tmp_path / "teacher.png") == 0
    assert "pipeline (teacher)" in capsys.readouterr().out


# ---- Every method and flag. ----

def test_guidance_is_what_the_first_loss_says(run, here, tmp_path):
    """At first student and adapted network are the teacher: dm's gradient is guidance alone, which
    is (1 - w) times D(y) - D(null), each image's weight aside."""
    first = {}
    for weight in (0, 1, 1.75, 3):
        assert run("--stage", 1, "--guidance", weight, "--dm-weighting", "sigma",
                   "--iterations", 1, "--folder", tmp_path / str(weight)) == 0
        first[weight] = lines_of(tmp_path / str(weight))[0]["distill"]
    assert first[1] < 1e-9 * first[0]
    assert first[1.75] == pytest.approx(0.75 ** 2 * first[0], rel=1e-3)
    assert first[3] == pytest.approx(4 * first[0], rel=1e-3)


@pytest.mark.parametrize("flags", ["--method sid --guidance 0", "--stage 1 --loss sid",
                                   "--method dmd2 --stage 3"])
def test_every_method_moves_its_student(run, here, tmp_path, flags):
    assert run(*flags.split(), "--folder", tmp_path) == 0
    folder = next(tmp_path.glob("stage*"))
    moved = distance(latest(folder)["student"], load_teacher(here / "pipeline").state_dict())
    assert 1e-4 < moved < 0.01


@pytest.mark.parametrize("flags, tolerance", [("--batch-per-gpu 1", 1e-3),
                                              ("--precision bf16", 0.03)])
def test_parts_of_a_batch_and_bf16_compute_the_same(trained, run, tmp_path, flags, tolerance):
    assert run("--stage", 1, "--folder", tmp_path, *flags.split()) == 0
    whole = [line for line in lines_of(trained) if "denoising" in line]
    for a, b in zip(lines_of(tmp_path), whole, strict=True):
        for name in ("distill", "denoising", "student_gradient", "adapted_gradient"):
            assert a.get(name) == pytest.approx(b.get(name), rel=tolerance)


def roles_of(here, monkeypatch, *argv):
    monkeypatch.chdir(here)
    flags = "--dataset", "sd15", "--teacher", "pipeline", "--prompts", "prompts.txt", *argv
    stage, = parse(list(map(str, flags)))
    return load_roles(stage.config, stage.options, torch.device("cpu")), stage


def test_each_image_of_a_batch_is_of_its_own_prompt(here, monkeypatch):
    roles, stage = roles_of(here, monkeypatch, "--stage", 1, "--batch", 6, "--batch-per-gpu", 3)
    network = roles.opened.network
    known, asked = network.conditions, []
    seen = known._replace(embed=lambda index: asked.extend(index.tolist()) or known.embed(index))
    parts = draw(stage.config, 7, Sources(network.shape, network.levels, seen), stage.options)
    expected = Pipeline(here / "pipeline").embed([PROMPTS[i] for i in asked])
    assert len(parts) == 2 and len(set(asked)) > 2
    assert torch.allclose(torch.cat([part.y for part in parts]), expected, atol=1e-5)


def test_in_bf16_what_is_frozen_is_bf16_and_what_learns_is_fp32(here, trained, monkeypatch):
    roles, _ = roles_of(here, monkeypatch, "--stage", 2, "--precision", "bf16")
    kinds = {name: {p.dtype for p in network.parameters()} for name, network in (
        ("teacher", roles.teacher), ("previous", roles.previous), ("student", roles.student),
        ("adapted", roles.adapted), ("ema", roles.ema), ("pipeline", roles.opened.pipeline))}
    half, full = {torch.bfloat16}, {torch.float32}
    assert kinds == {"teacher": half, "previous": half, "pipeline": half, "student": full,
                     "adapted": full, "ema": full}


@pytest.fixture
def vgg(tmp_path, monkeypatch):
    """LPIPS with random weights in the two files that are published."""
    torch.manual_seed(0)
    network = LPIPS(resize=None)               # of pictures as they are, as DMD for text
    state = {name: value.abs() if name.startswith("lin") else value     # as LPIPS's are
             for name, value in network.state_dict().items()}
    network.load_state_dict(state)
    for name in ("vgg16", "lpips-vgg"):
        linear = name == "lpips-vgg"
        torch.save({k: v for k, v in state.items() if k.startswith("lin") == linear},
                   tmp_path / name)
    monkeypatch.setattr(metrics.lpips, "fetch", lambda name, cache: tmp_path / name)
    return network


def test_dmd_learns_the_guided_teachers_own_pictures(run, here, vgg, tmp_path):
    assert run("--method", "dmd", "--regression-pairs", 3, "--regression-steps", 2, "--batch", 1,
               "--iterations", 1, "--folder", tmp_path) == 0
    path, = (tmp_path / "stage1" / "pairs").glob("*.npy")
    pairs, teacher, pipeline = np.load(path), load_teacher(here / "pipeline"), Pipeline(
        here / "pipeline")
    assert pairs["image"].shape == (3, 4, 16, 16) and set(pairs["index"]) <= set(range(5))
    pipeline.serve(teacher, PROMPTS)
    z, image = (torch.from_numpy(pairs[name]).float() for name in ("z", "image"))
    y = teacher.conditions.embed(torch.from_numpy(pairs["index"]))
    generators = [torch.Generator().manual_seed(10 ** 9 + i) for i in range(3)]
    assert torch.equal(z, torch.stack([torch.randn(4, 16, 16, generator=g) for g in generators]))
    made = sample_heun(Guided(teacher, 3.0), z, y, steps=2)
    assert (made - image).abs().max() < 2e-3 * image.abs().max()
    assert (sample_heun(teacher, z, y, steps=2) - image).abs().max() > 5e-3 * image.abs().max()
    # The first regression: LPIPS of what the student, still the teacher, and the teacher make.
    with torch.no_grad():
        sigma = level(teacher.levels.table[-1], z)
        x_ref = teacher((1 + sigma ** 2).sqrt() * z, sigma, y)
        possible = 0.25 * vgg(pipeline.decode_float(x_ref), pipeline.decode_float(image))
    found = lines_of(tmp_path)[0]["regression"]
    assert possible.min() > 0 and (possible / found - 1).abs().min() < 1e-3


def test_pictures_with_captions_are_the_same_in_every_form(run, here, trained, tmp_path, capsys):
    """DMD2's GAN: latents that the VAE draws of each picture, kept, and its caption's embedding."""
    rows, gan = {}, ("--method", "dmd2", "--variant", "gan", "--start-from",
                     trained / "stage1" / "best.pt", "--iterations", 1)
    for name in ("told", "told.zip", "beside", "beside.zip"):
        assert run(*gan, "--data", name, "--folder", tmp_path / name) == 0
        path, = (tmp_path / name / "stage1" / "latents").glob("*.npy")
        rows[name] = np.load(path)["latent"]
        line, = lines_of(tmp_path / name)
        assert line["gan"] > 0 and line["discriminator"] > 0
    assert np.array_equal(rows["told"], rows["told.zip"])
    assert np.array_equal(rows["beside"], rows["beside.zip"])
    # The middle square of 34 x 50, by Lanczos to 32, and the first draw of the picture's number.
    picture = Image.open(here / "told" / "3.png").crop((8, 0, 42, 34)).resize(
        (32, 32), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())[None]
    latent = Pipeline(here / "pipeline").encode(pixels, torch.Generator().manual_seed(3))
    assert np.array_equal(latent[0].half().numpy(), rows["told"][3])
    assert set(latest(tmp_path / "told" / "stage1")["head"]) > {"layers.0.weight"}
    # In another order the latents kept would have the captions of other pictures.
    renamed, again = shutil.copytree(here / "beside", tmp_path / "renamed"), tmp_path / "again"
    assert run(*gan, "--data", renamed, "--folder", again) == 0
    caption = min(renamed.glob("*.txt"))
    said = caption.read_text()
    caption.write_text("something else")
    assert run(*gan, "--data", renamed, "--folder", again) == 2
    assert "latents was made with" in capsys.readouterr().err
    caption.write_text(said)
    last = max(path.stem for path in renamed.iterdir())
    for path in [*renamed.glob(f"{last}.*")]:
        path.rename(path.with_stem("0"))
    assert run(*gan, "--data", renamed, "--folder", again) == 2
    assert "latents was made with" in capsys.readouterr().err


def test_grids_show_what_dm_compares(here, trained, monkeypatch, tmp_path):
    grids = sorted(path.name for path in (trained / "stage3" / "samples").iterdir())
    assert grids == ["000002.png", "000003.png"]        # at every save, also without an FID
    roles, stage = roles_of(here, monkeypatch, "--stage", 2, "--guidance", 1,
                            "--start-from", trained / "stage1" / "best.pt")
    roles.adapted.load_state_dict(roles.teacher.state_dict())

    def cells():
        log.save_samples(roles, stage.config.sigmas, tmp_path / "a" / "b.png", "cpu")
        picture = np.asarray(Image.open(tmp_path / "a" / "b.png"))
        right = picture[20:, -4 * 129 - 1:]             # behind the captions, below the labels
        return [[right[1 + 129 * r:129 * (r + 1), 1 + 129 * c:129 * (c + 1)] for c in range(4)]
                for r in range(4)]

    rows, prompts = cells(), PROMPTS[:4]
    for one, two, x0_teacher, x0_adapted in rows:
        assert np.array_equal(x0_teacher, x0_adapted) and not np.array_equal(one, two)
        assert not np.array_equal(two, x0_teacher)
    for n in (1, 2):
        latents, _ = sample_seeds(roles.ema, range(4), partial(
            sample_student, sigmas=stage.config.sigmas[:n]), range(4))
        for row, pixels in zip(rows, roles.ema.pixels(latents).permute(0, 2, 3, 1).numpy()):
            assert np.array_equal(row[n - 1], pixels.repeat(4, 0).repeat(4, 1))
    assert roles.opened.pipeline.prompts[:4] == prompts
    roles.teacher = Guided(roles.teacher, 30.0)
    assert all(not np.array_equal(row[2], row[3]) for row in cells())


# ---- A run that is killed. ----

def killed(at_update, argv):
    """The command in a process of its own, killed with SIGKILL after so many optimizer steps, in
    whichever iteration that is. Returns whether it was, or had ended before."""
    process = os.fork()
    if not process:
        code, done, update = 1, [], train.update

        def dying(*args):
            update(*args)
            done.append(None)
            if len(done) == at_update:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            train.update, silent = dying, os.open(os.devnull, os.O_WRONLY)
            for number in (1, 2):
                os.dup2(silent, number)
            code = train.main(list(map(str, argv)))
        finally:                                        # never back into pytest
            os._exit(code)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("argv", ["--stage 2", "--method dmd2 --variant gan --data beside"])
def test_killed_anywhere_a_run_goes_on_bit_for_bit(here, trained, run, tmp_path, argv):
    flags = ("--iterations", 5, "--start-from", trained / "stage1" / "best.pt", *argv.split())
    assert run(*flags, "--folder", tmp_path / "whole") == 0
    command = ("--dataset", "sd15", "--teacher", "pipeline", "--prompts", "prompts.txt", *FAST,
               *flags, "--folder", tmp_path / "killed")
    # Between two updates of iteration 0; after one of the adapted network; the last of all.
    assert killed(1, command) and not list((tmp_path / "killed").rglob("*.pt"))
    assert killed(5, command) and killed(5, command)
    assert not killed(99, command)
    assert not differences(outcome(tmp_path / "whole"), outcome(tmp_path / "killed"))


# ---- What it learns. ----

class ExactUNet(torch.nn.Module):
    """epsilon of latents whose E[x0 | x_t] is known; told its mean by the first number of y."""
    dtype = torch.float64

    def __init__(self, levels, posterior_mean):
        super().__init__()
        self.table, self.posterior_mean = levels.table, posterior_mean

    def forward(self, x, t, text, added_cond_kwargs):
        sigma = self.table[t].reshape(-1, 1, 1, 1).to(x.dtype)
        x_t = x * (1 + sigma ** 2).sqrt()
        mean = text[:, :1, :1, None]
        return SimpleNamespace(sample=(x_t - self.posterior_mean(x_t, sigma, mean)) / sigma)


def prompts_as(values):
    """Conditions whose y begins with a number for each prompt; the last is of no prompt."""
    y = torch.zeros(len(values), 77 * 32, dtype=torch.float64)
    y[:, 0] = torch.tensor(values)
    return Conditions(len(values) - 1, lambda index: y[index], y[-1:], on_host=True)


def test_the_dm_gradient_points_to_the_guided_target(here):
    """Prompts move the mean of N(m, 0.6^2): guided by w, the target's is m0 + w (m - m0)."""
    network, means, w = load_teacher(here / "pipeline"), [0.5, -1.0, 0.2], 1.75
    network.unet = ExactUNet(network.levels, lambda x_t, sigma, mean: gaussian_denoiser(
        mean, 0.6)(x_t, sigma))
    network.conditions = prompts_as(means)
    index = torch.tensor([0, 1, 0, 1])
    y, target = network.conditions.embed(index), torch.tensor([0.725, -1.9], dtype=torch.float64)
    target = target[index].reshape(-1, 1, 1, 1)
    normal = partial(torch.randn, 4, 4, 8, 8, dtype=torch.float64,
                     generator=torch.Generator().manual_seed(0))
    x0, eps, s = (0.3 + 0.6 * normal()).requires_grad_(), normal(), 0.6
    sigma = network.levels.table[[20, 250, 499, 980]].reshape(-1, 1, 1, 1)
    teacher, adapted = Guided(network, w), gaussian_denoiser(0.3, s)
    dm_loss(x0, sigma, eps, y, teacher=teacher, adapted=adapted).backward()
    x0_teacher = gaussian_denoiser(target, s)(x0 + sigma * eps, sigma)
    weight = 1 / (x0 - x0_teacher).abs().mean((1, 2, 3), keepdim=True)
    expected = weight * sigma ** 2 / (s ** 2 + sigma ** 2) * (0.3 - target) / x0.numel()
    assert (x0.grad / expected - 1).abs().max() < 1e-6
    assert ((target - 0.3) * -x0.grad > 0).all()        # downhill is towards the guided mean


SHARES = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([[-1.5, 0.5], [1.0, -1.0]], dtype=torch.float64)
STDS = torch.tensor([0.4, 0.8], dtype=torch.float64)


def mixture_mean(x_t, sigma, means, stds):
    """E[x0 | x_t] of points in the plane from two round Gaussians. x_t [B,2,1,1]"""
    x, total = x_t.flatten(1)[:, None], stds ** 2 + sigma.reshape(-1, 1) ** 2        # [B,2]
    away = (x - means).square().sum(-1)
    share = (SHARES.log() - total.log() - away / (2 * total)).softmax(1)[..., None]
    return (share * (means + (stds ** 2 / total)[..., None] * (x - means))).sum(1).view_as(x_t)


class Mixture(torch.nn.Module):
    """Two Gaussians to be learnt, as what makes their points from z, or as their denoiser."""
    shape, sigma_data, config = (2, 1, 1), float("inf"), {}

    def __init__(self, levels, generates):
        super().__init__()
        self.means = torch.nn.Parameter(torch.tensor([[-0.5, 0.0], [0.5, 0.0]]).double())
        self.log_stds = torch.nn.Parameter(torch.zeros(2).double())
        self.levels, self.generates = levels, generates

    def forward(self, x_t, sigma, y):
        x_t, stds = x_t.double(), self.log_stds.exp()
        if not self.generates:
            return mixture_mean(x_t, sigma, self.means, stds)
        z = (x_t / (1 + sigma.double() ** 2).sqrt()).flatten(1)     # Stable Diffusion's input
        share = torch.special.ndtr(z[:, 0])
        which = (share > SHARES[0]).long()
        within = torch.where(which > 0, (share - 0.3) / 0.7, share / 0.3).clamp(1e-12, 1 - 1e-12)
        normal = torch.stack([torch.special.ndtri(within), z[:, 1]], 1)
        return (self.means[which] + stds[which][:, None] * normal).view_as(x_t)


@pytest.mark.parametrize("loss", ["dm", "sid"])
def test_a_one_step_student_of_a_mixtures_epsilon_network_becomes_the_mixture(here, loss):
    """The optimum is known: the mixture itself, of student and of adapted network."""
    torch.manual_seed(0)
    teacher = load_teacher(here / "pipeline")
    teacher.unet = ExactUNet(teacher.levels, lambda x_t, sigma, mean: mixture_mean(
        x_t, sigma, MEANS, STDS))
    conditions = prompts_as([0.0, 0.0])
    student, adapted = Mixture(teacher.levels, True), Mixture(teacher.levels, False)
    config = dataclasses.replace(
        rows.find("sd15", "pmdd", 1).config, loss=loss, alpha=1.0, guidance=1.0, batch=256,
        iterations=500, ttur=2, learning_rate=0.03, final_rate=0.02, weight_decay=0.0, clip=0.0)
    roles = Roles(student, copy.deepcopy(student), teacher, None, adapted)
    roles.wrap()
    optimizers = train.make_optimizers(config, roles, torch.device("cpu"))
    sources = Sources(student.shape, teacher.levels, conditions)
    whole = SimpleNamespace(world_size=1, batch_per_gpu=config.batch)
    for step in range(config.iterations):
        train.set_rate(config, step, optimizers)
        parts = draw(config, step, sources, whole)
        train.iteration(config, roles, optimizers, parts, step % config.ttur == 0)
    for network in (student, adapted):
        assert (network.means - MEANS).abs().max() < 0.1
        assert (network.log_stds.exp() - STDS).abs().max() < 0.05


# ---- The plan. ----

SD15 = datasets.DATASETS["sd15"].network


def preset(stage):
    return rows.find("sd15", "pmdd", stage).config


@pytest.mark.parametrize("stage, forwards, exaflop, gpus, hours", [(1, 4.5, 52, 3, 5.0 * 24),
                                                                   (2, 6.6, 1.7, 1, 11.8)])
def test_the_plan_of_pmdd_costs_what_its_authors_paid(here, stage, forwards, exaflop, gpus, hours):
    """5 to 6 days on 3 H100, and 12 hours on one: at 40 TFLOP/s each. A backward pass counts as two
    forward; a network's size does not change how often it is asked."""
    config, tiny = preset(stage), load_teacher(here / "pipeline").config
    told = cost.totals(config, cost.count(train.iteration, config, tiny))
    there, back = (told[f"images {way} through a network"] for way in ("forward", "backward"))
    images = config.iterations * config.batch
    assert (there + 2 * back) / images == pytest.approx(forwards, rel=1e-3)
    flops = (there + 2 * back) * cost.forward_flops(SD15)
    assert flops == pytest.approx(exaflop * 1e18, rel=0.01)
    assert flops / (gpus * 40e12) / 3600 == pytest.approx(hours, rel=0.01)


def test_the_flops_of_a_plan_are_its_passes():
    counted = cost.count(train.iteration, preset(2), SD15)
    assert cost.forward_flops(SD15) == pytest.approx(0.803e12, rel=1e-3)    # as measured elsewhere
    assert counted.flops / 16_000 == pytest.approx(6.6 * 0.803e12, rel=0.01)


def test_stage_2_at_batch_20_fits_one_gpu_of_80_gb_in_bf16():
    parameters, gib = 859_520_964, 2 ** 30
    sizes = plan.memory(train.iteration, preset(2), SD15, 20, precision="bf16", on_gpu=True)
    activations = sizes.pop(plan.ACTIVATIONS)
    # Two trained networks, an average, one gradient, four moments; two frozen ones in bf16.
    assert sum(sizes.values()) == parameters * (4 * (2 + 1 + 1 + 4) + 2 * 2)
    assert activations / gib == pytest.approx(40 * 1.2, rel=0.1)    # two steps of 20 images
    assert 70 * gib < sum(sizes.values()) + activations < 79 * gib


def test_pairs_of_a_guided_teacher_cost_twice():
    config = rows.find("sd15", "dmd", 1).config
    counted = cost.Counted({}, 0.0)
    assert cost.totals(config, counted)["images forward through the teacher for pairs"] == (
        500_000 * 49 * 2)


# ---- What is refused. ----

def refused(monkeypatch, capsys, script, *argv):
    """The one line of an error, with exit code 2."""
    capsys.readouterr()
    assert call(monkeypatch, script, *argv) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(said) == 1
    return said[0]


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def few_captions(folder):
    (folder / "beside" / "3.txt").unlink()


def small_pictures(folder):
    edit(folder / "pipeline/unet/config.json", sample_size=8)


UNET = "pipeline/unet/diffusion_pytorch_model"
REFUSED = [                             # what is spoilt, the flags, what the line says
    (None, "--guidance -1", "--guidance is -1.0; allowed: 0 or more"),
    (None, "--prompts nowhere.txt", "cannot read the prompts nowhere.txt: No such file"),
    (lambda f: (f / "prompts.txt").write_text(" \n\n"), "", "prompts.txt: no prompts in it"),
    (lambda f: (f / "prompts.txt").write_bytes(b"caf\xe9"), "", "prompts.txt is not UTF-8"),
    (lambda f: (f / f"{UNET}.safetensors").rename(f / f"{UNET}.bin"), "",
     "pipeline/unet holds no diffusion_pytorch_model.safetensors, and .* is a pickle"),
    (lambda f: edit(f / "pipeline/model_index.json", _class_name="StableDiffusion3Pipeline"), "",
     "pipeline is a StableDiffusion3Pipeline, not a pipeline of Stable Diffusion"),
    (lambda f: edit(f / "pipeline/scheduler/scheduler_config.json", prediction_type="sample"), "",
     "prediction_type is 'sample'; allowed: epsilon, v_prediction"),
    (lambda f: (f / "pipeline/vae/diffusion_pytorch_model.safetensors").unlink(), "",
     "pipeline/vae holds no diffusion_pytorch_model.safetensors"),
    (None, "--teacher some/name", "no pipeline 'some/name': it is no folder, and unet cannot be "
                                  "had from the model hub into "),
    (None, "--sigmas 80", "--sigmas 80: the teacher knows the noise levels from 0.02917 to 14.61"),
    (None, "--gan-weight 1", "--data sd15: no such folder or zip; the GAN wants pictures with"),
    (few_captions, "--gan-weight 1 --data beside", "1 of 5 pictures have no caption, 3.jpg is the "
                                                   "first; wanted: dataset.json"),
    (small_pictures, "--gan-weight 1 --data emoji",
     "--data emoji: pictures of 32 pixels a side, those of .*pipeline have 16"),
    (small_pictures, "--dataset emoji",
     r"--dataset emoji: --teacher pipeline has images of shape \[3, 16, 16\], emoji are"),
    (None, "--stage 2", "stage 2 starts from .*stage1/best.pt, which is no file"),
    (None, "--reference nowhere.npz", "no reference at nowhere.npz")]


@pytest.mark.parametrize("spoil, flags, message", REFUSED, ids=[text for _, _, text in REFUSED])
def test_a_wrong_training_command_is_one_line_and_leaves_nothing(
        here, tmp_path, monkeypatch, capsys, spoil, flags, message):
    for name in ("pipeline", "beside"):
        shutil.copytree(here / name, tmp_path / name)
    shutil.copy(here / "prompts.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if spoil:
        spoil(tmp_path)
    before = set(tmp_path.rglob("*"))
    line = refused(monkeypatch, capsys, train, "--dataset", "sd15", "--teacher", "pipeline",
                   "--prompts", "prompts.txt", "--stage", 1, *FAST, *flags.split())
    assert re.search(message, line), line
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("script, argv, message", [
    (train, "--dataset sd15 --teacher pipeline --stage 1 --folder new",
     "give --prompts FILE, one a line"),
    (train, "--dataset digits --prompts prompts.txt", "--prompts: digits has no text"),
    (train, "--dataset sd15 --stage 0", "no preset for --dataset sd15 --method pmdd --stage 0"),
    (sample, "--dataset digits --prompt a", "--prompt or .*digits-student.pt is no text-to-image"),
    (sample, "--checkpoint pipeline", "pipeline makes pictures from text: give --prompt or"),
    (sample, "--checkpoint pipeline --prompt a --guidance -1", "--guidance -1.0: must be 0 or"),
    (sample, "--checkpoint pipeline --prompt a --steps 1", "pipeline is a teacher, not a student"),
    (sample, "--checkpoint {student} --prompt a --guidance 2", "--guidance is for a teacher"),
    (sample, "--checkpoint {student} --prompt a --steps 4", "was trained for 1 to 3"),
    (exported, "export {student} pipeline", "pipeline exists; give a new folder"),
    (exported, "export nowhere.pt out", "nowhere.pt"),
    (exported, "export {digits} out", "digits-student.pt is no student of text to image")])
def test_a_wrong_flag_is_one_line(here, trained, monkeypatch, capsys, script, argv, message):
    monkeypatch.chdir(here)
    before = set(here.rglob("*"))
    argv = argv.format(student=trained / "stage3" / "best.pt",
                       digits=ROOT / "assets" / "digits-student.pt").split()
    assert re.search(message, refused(monkeypatch, capsys, script, *argv))
    assert set(here.rglob("*")) == before


# ---- Who knows of text. ----

def test_without_the_extra_libraries_all_else_works_and_text_says_what_it_needs(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
for name in ("diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub"):
    sys.modules[name] = None
import torch, train, sample
from base import errors
torch.set_num_threads(1)

def ends(script, *argv):
    sys.argv = ["command", *argv]
    try:
        errors.run(script.main)
    except SystemExit as stopped:
        return stopped.code or 0

few = "--batch 4 --iterations 2 --evaluate-images 16 --stage 1 --folder run".split()
print(ends(train, *few), ends(sample, "--runs", ".", "--n", "4"),
      ends(train, "--dataset", "sd15", "--stage", "1", "--dry-run"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.stdout.splitlines()[-1] == "0 0 2", done.stdout + done.stderr
    assert "text to image needs diffusers" in done.stderr
    assert "pip install -r requirements-text.txt" in done.stderr


def test_the_iteration_and_the_losses_know_nothing_of_text():
    source = (ROOT / "train.py").read_text()
    iteration, = (ast.get_source_segment(source, node) for node in ast.parse(source).body
                  if isinstance(node, ast.FunctionDef) and node.name == "iteration")
    words = r"\b(prompts?|captions?|latents?|text|tokens?|vae|unet|pipeline|guid\w+|null)\b"
    for code in (iteration, (ROOT / "losses.py").read_text()):
        assert "def " in code and not re.findall(words, code, re.I)
