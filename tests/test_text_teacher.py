"""Stage 0 of text to image: a pipeline's U-Net and text encoder learn captioned pictures."""

import copy
import sys

import pytest
import torch
from PIL import Image

import text_to_image
import tiny_pipelines
import train
from helpers import call
from models import level
from training.draws import Sources, draw
from training.options import parse
from training.roles import load_roles
from weights import checkpoint
from weights.exported import export_teacher
from weights.opening import open_network
from weights.pipeline import load_teacher

STAGE_0 = ("--dataset", "emoji", "--stage", "0", "--teacher", "pipeline", "--prompts",
           "prompts.txt", "--data", "pictures", "--batch", "4")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage0")
    tiny_pipelines.save(folder / "pipeline", prediction_type="v_prediction")
    (folder / "prompts.txt").write_text("a red square\na blue square\n")
    (folder / "pictures").mkdir()
    for name, colour in (("red", (250, 20, 20)), ("blue", (20, 20, 250))):
        Image.new("RGB", (32, 32), colour).save(folder / "pictures" / f"{name}.png")
        (folder / "pictures" / f"{name}.txt").write_text(f"a {name} square")
    return folder


@pytest.fixture(autouse=True)
def there(here, monkeypatch):
    monkeypatch.chdir(here)


@pytest.fixture(scope="module")
def roles(here):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        stage, = parse([*STAGE_0, "--folder", "unused"])
        return load_roles(stage.config, stage.options, torch.device("cpu"))


def fit(monkeypatch, folder, iterations, *flags):
    assert call(monkeypatch, train, *STAGE_0, "--folder", folder, "--iterations", iterations,
                "--save-every", 3, *flags) == 0
    return checkpoint.load(f"{folder}/stage0/latest.pt")


def test_before_training_it_denoises_as_the_pipeline_does(roles):
    """y are a caption's tokens in training, and their embedding everywhere else."""
    plain, pipeline = load_teacher("pipeline"), roles.opened.pipeline
    prompts = pipeline.prompts
    x = torch.randn(2, *plain.shape)
    y = roles.student.conditions.embed(torch.arange(2))
    assert y.dtype == torch.int64 and y.shape == (2, 77)
    for sigma in (0.1, 3.0):
        with torch.no_grad():
            torch.testing.assert_close(roles.student(x, level(sigma, x), y),
                                       plain(x, level(sigma, x), pipeline.embed(prompts)))


def test_both_the_unet_and_the_text_encoder_learn_and_the_pipeline_around_them_does_not(
        roles, here, monkeypatch):
    before = copy.deepcopy(roles.student.state_dict())
    saved = fit(monkeypatch, "learns", 30, "--caption-dropout", "0", "--learning-rate", "1e-3",
                "--save-every", "30")
    moved = {name.partition(".")[0] for name, value in saved["student"].items()
             if not torch.equal(value, before[name])}
    assert moved == {"unet", "text_encoder"}
    lines = (here / "learns/stage0/metrics.jsonl").read_text().splitlines()
    losses = [float(line.partition('"denoising": ')[2].partition(",")[0]) for line in lines]
    assert losses[-1] < 0.7 * losses[0]
    network = checkpoint.network_from(saved, weights="student")
    roles.opened.pipeline.serve(network, ["a red square", "a blue square"])
    z = torch.randn(1, *network.shape).expand(2, -1, -1, -1)
    with torch.no_grad():
        sigma = network.levels.table[-1].item()
        x0 = network(network.levels.first_scale(sigma) * z, level(sigma, z),
                     network.conditions.embed(torch.arange(2)))
    assert (x0[0] - x0[1]).abs().mean() > 1e-3              # the caption matters


def test_captions_are_left_out_as_often_as_asked(roles):
    stage, = parse([*STAGE_0, "--folder", "unused", "--batch", "200", "--caption-dropout", "0.3"])
    network, config, asked = roles.student, stage.config, []

    class Blank:
        conditions, count = network.conditions, 2
        to_x = staticmethod(torch.Tensor.float)

        def take(self, indices):
            asked.extend(indices)
            return torch.zeros(len(indices), *network.shape), torch.tensor(indices)

    sources = Sources(network.shape, network.levels, network.conditions, Blank())
    part, = draw(config, 0, sources, stage.options)
    null = network.conditions.null
    left_out = (part.y_real == null).all(1)
    assert 35 < left_out.sum() < 85
    kept = network.conditions.embed(torch.tensor(asked)[~left_out])
    assert torch.equal(part.y_real[~left_out], kept)


def test_a_stopped_run_goes_on_bit_for_bit(monkeypatch, here):
    whole = fit(monkeypatch, "whole", 6)
    stage = here / "whole" / "stage0"
    (stage / "previous.pt").rename(stage / "latest.pt")     # as after its third iteration
    again = fit(monkeypatch, "whole", 6)
    for name, value in whole["ema"].items():
        assert torch.equal(value, again["ema"][name])


def test_it_becomes_a_pipeline_of_its_own_that_samples_the_same(monkeypatch, here):
    fit(monkeypatch, "exported", 3)
    monkeypatch.setattr(sys, "argv", ["text_to_image.py", "export",
                                      "exported/stage0/best.pt", "made"])
    from weights.exported import main
    main()
    trained, made = open_network("exported/stage0/best.pt"), open_network("made")
    x = torch.randn(1, *made.network.shape)
    images = []
    for opened in (trained, made):
        opened.serve(["a red square"], torch.device("cpu"))
        with torch.no_grad():
            y = opened.network.conditions.embed(torch.tensor([0])).to(x)
            images.append(opened.network(x, level(2.0, x), y))
    torch.testing.assert_close(*images)
    from diffusers import StableDiffusionPipeline
    theirs = StableDiffusionPipeline.from_pretrained("made", safety_checker=None)
    torch.testing.assert_close(theirs.unet.conv_in.weight, trained.network.unet.conv_in.weight)
    with pytest.raises(text_to_image.UserError, match="made exists"):
        export_teacher(trained.network, trained.base, "made")


@pytest.mark.parametrize("flags, says", [
    (("--augment", "0.1"), "--augment"),
    (("--model-channels", "8"), "--model-channels"),
    (("--data", "nowhere"), "--data nowhere"),
    (("--teacher", "xl"), "SDXL's has two")])
def test_what_it_cannot_learn_from_is_one_line(flags, says, monkeypatch, capsys, here):
    if "xl" in flags and not (here / "xl").exists():
        tiny_pipelines.save(here / "xl", xl=True)
    assert call(monkeypatch, train, *STAGE_0, "--folder", "refused", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and says in error
    assert not (here / "refused").exists()


def test_a_student_wants_a_pipeline_not_the_stage_0_itself(monkeypatch, capsys):
    fit(monkeypatch, "exported", 3)
    assert call(monkeypatch, train, "--dataset", "emoji", "--stage", "1", "--folder", "exported",
                "--prompts", "prompts.txt") == 2
    assert "text_to_image.py export exported/stage0/best.pt" in capsys.readouterr().err


def test_its_plan_says_that_the_text_encoder_is_not_in_it(monkeypatch, capsys):
    assert call(monkeypatch, train, *STAGE_0, "--dry-run") == 0
    unet = sum(value.numel() for value in load_teacher("pipeline").state_dict().values())
    out = capsys.readouterr().out
    assert f"parameters of the network: {unet:,}\n" in out
    assert "The text encoder, which learns with the U-Net" in out.splitlines()[-1]
