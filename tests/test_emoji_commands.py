"""Emoji through the commands: their judge, their captions, pictures from words, their tables.

The pipeline has the emoji's shapes and words, and random weights.
"""

import json
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch

import evaluate
import fid
import sample
import tiny_pipelines
from base.errors import UserError
from experiments import emoji_tables
from experiments.emoji_text import new_text_encoder, new_tokenizer
from helpers import ROOT, call
from images import emoji
from images.captioned import KINDS, prompts_for, read_captions
from images.from_seeds import heun, sample_block
from images.pictures import save_png
from images.real import emoji_pictures, open_images
from metrics.evaluations import read_records
from metrics.judge import Judge, Scorer, perceptual_distance
from presets.datasets import DATASETS, SD_SIGMAS
from training import options
from weights import opening
from weights.exported import export
from weights.opening import open_network
from weights.pipeline import Pipeline, load_teacher, locate, name_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """A pipeline's folder and a three-step student of it."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    folder = tmp_path_factory.mktemp("assets")
    torch.manual_seed(0)
    tokenizer, levels = new_tokenizer(), tiny_pipelines.LEVELS
    StableDiffusionPipeline(
        vae=AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=4,
                          up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8,) * 3),
        text_encoder=new_text_encoder(tokenizer), tokenizer=tokenizer,
        unet=tiny_pipelines.unet(sample_size=8, cross_attention_dim=96),
        scheduler=DDIMScheduler(**levels, clip_sample=False, prediction_type="v_prediction"),
        safety_checker=None, feature_extractor=None,
        requires_safety_checker=False).save_pretrained(folder / "pipeline")
    export(load_teacher(folder / "pipeline"), folder / "pipeline", SD_SIGMAS, folder / "student",
           {})
    return folder


@pytest.fixture
def here(assets, monkeypatch, tmp_path):
    """Another folder than the repository, which has this student and teacher embedded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(DATASETS, "emoji", DATASETS["emoji"]._replace(
        teacher=str(assets / "pipeline"), student=str(assets / "student")))
    return tmp_path


def refused(monkeypatch, capsys, *command):
    assert call(monkeypatch, *command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    return lines[0]


# ---- Captions and the judge ----

def test_fewer_captions_are_the_first_of_more_and_other_ones_than_the_references():
    for kind in KINDS:
        assert prompts_for("emoji", kind, 10_020)[:30] == prompts_for("emoji", kind, 30)
    training = prompts_for("emoji", None, 200)
    assert training == prompts_for("emoji", "training", 200) != emoji_pictures().captions[:200]
    assert all(emoji.held_pair(*emoji.parse(text)[0])
               for text in prompts_for("emoji", "unseen-pair", 50))


def test_prompts_are_of_a_file_where_one_is_given_and_of_nothing_for_other_data(tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\na bee\n")
    assert prompts_for("emoji", tmp_path / "prompts.txt", 9) == ["a fox", "a bee"]
    assert prompts_for("sd15", None, 9) == [] == read_captions(None, None, None, "digits").prompts
    asked = read_captions("one", None, 3, "emoji")
    assert len(asked.prompts) == 3 and asked.protocol["prompts"]["file"] == "emoji, one"
    assert len(read_captions(None, None, None, "emoji").prompts) == 10_000


def test_what_is_drawn_where_nothing_is_asked_for_names_emoji_and_the_last_two_are_held_out():
    for text in emoji.SHOWN:
        asked, background = emoji.parse(text)
        held = (any(emoji.held_background(one, background) for one in asked)
                or len(asked) == 2 and emoji.held_pair(*asked))
        assert len(asked) == 1 + text.count(" and ") and held == (text in emoji.SHOWN[-2:])


def test_real_pictures_are_right_for_their_own_captions_alone_and_near_the_reference():
    real, blocks = emoji_pictures(), [range(0, 100), range(100, 200)]
    judge, scores = Judge("emoji", CPU, captions=real.captions), {}
    for shift in (0, 1):
        def task(numbers, shift=shift):
            return [real.take([number + shift for number in numbers])[0]], torch.tensor(numbers)
        scores[shift], = judge.scores(task, blocks, 1, 200)
    assert set(scores[0]) == {"emoji-FID", "right_picture"}
    assert scores[0]["right_picture"] > 0.98 and scores[1]["right_picture"] < 0.02
    assert scores[0]["emoji-FID"] < 25
    noise, = judge.scores(lambda numbers: ([torch.randint(0, 256, (100, 3, 32, 32)).byte()],
                                           torch.tensor(numbers)), blocks[:1], 1, 100)
    assert noise["emoji-FID"] > 200 and noise["right_picture"] == 0


def test_the_reference_is_made_by_one_command(monkeypatch, tmp_path):
    monkeypatch.setattr(emoji, "PICTURES", 64)
    monkeypatch.chdir(tmp_path)
    fid.main(["--data", "emoji", "--out", "reference.npz"])
    mean, covariance = fid.read_reference("reference.npz", 192)
    real = open_images("emoji")
    features = Judge("emoji", CPU).network(real.take(range(64))[0])[0].double().numpy()
    assert len(real) == 64 and mean == pytest.approx(features.mean(0), abs=1e-5)
    shipped, _ = fid.read_reference(ROOT / DATASETS["emoji"].reference, 192)
    assert abs(mean - shipped).max() < 1 < abs(shipped).max()


def test_a_run_is_scored_on_the_prompts_that_its_network_is_asked_for(assets):
    config = options.parse(["--dataset", "emoji", "--stage", "1", "--evaluate-images", "2"])[0]
    network = load_teacher(assets / "pipeline")
    Pipeline(assets / "pipeline").serve(network, ["a fox", "a bee"])
    scores = Scorer(config.config, config.options, CPU).score(network, SD_SIGMAS[:1])
    assert set(scores["1"]) == {"emoji-FID", "right_picture"}


def test_the_distance_of_dmd_is_between_latents():
    x, y = torch.randn(2, 3, 4, 8, 8)
    distance = perceptual_distance("emoji", None, CPU)(x, y)
    assert distance == pytest.approx((x - y).square().flatten(1).mean(1))


# ---- Pictures from words ----

def test_a_word_that_is_not_known_is_named_once_and_the_picture_drawn(here, monkeypatch, capsys):
    assert call(monkeypatch, sample, "--dataset", "emoji", "--n", 2, "--prompt",
                "a fox and a banjo on blue", "a zebra", "", "--out", "x.zip") == 0
    said = capsys.readouterr().err
    assert said.count("does not know") == 1 and "'banjo', 'zebra'" in said and "fox" not in said
    assert call(monkeypatch, sample, "--dataset", "emoji", "--prompt", "A Fox, on BLUE",
                "--n", 1, "--out", "y.png") == 0
    assert "does not know" not in capsys.readouterr().err
    # What was drawn is scored with the captions that lie beside it
    assert call(monkeypatch, evaluate, "--dataset", "emoji", "--images", "x.zip") == 0
    entry, = read_records("evaluation.json")
    assert set(entry["figures"]) == {"emoji-FID", "right_picture"}
    assert entry["protocol"]["images"] == 6
    pixels, numbers = np.zeros((6, 32, 32, 3), np.uint8), np.arange(6) // 2
    np.savez("z.npz", arr_0=pixels, arr_1=numbers)      # which holds no captions
    assert call(monkeypatch, evaluate, "--dataset", "emoji", "--images", "z.npz", "--out",
                "z.json") == 0
    entry, = read_records("z.json")
    assert set(entry["figures"]) == {"emoji-FID"} and entry["protocol"]["labels"] == "none"


def test_a_set_of_captions_is_drawn_where_nothing_is_asked_for(here, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(sample, "save_png", lambda image, path: shown.append(path)
                        or save_png(image, path))
    monkeypatch.setattr(sample, "draw_block", lambda numbers, ask, rows, *_, **__: (
        numbers, [torch.zeros(len(numbers), 3, 32, 32).byte().numpy()] * (4 if rows[1:] else 1),
        None))                                                          # the network takes seconds
    assert call(monkeypatch, sample, "--dataset", "emoji") == 0
    assert call(monkeypatch, sample, "--dataset", "emoji", "--compare") == 0
    assert [path.name for path in shown] == ["emoji-3-steps.png", "emoji-compare.png"]
    said = capsys.readouterr().out
    assert f"{4 * len(emoji.SHOWN)} images" in said and f"{len(emoji.SHOWN)} images" in said
    assert call(monkeypatch, sample, "--dataset", "emoji", "--prompts", "unseen-pair",
                "--n", 1) == 0
    assert call(monkeypatch, sample, "--dataset", "emoji", "--class", 3) == 2
    assert call(monkeypatch, sample, "--dataset", "emoji", "--grid", "4x2") == 2


def test_from_python_a_student_is_asked_again_and_its_pipeline_read_once(here, assets, monkeypatch):
    read = []
    monkeypatch.setattr(opening, "Pipeline", lambda base: read.append(base) or Pipeline(base))
    images, prompts = sample.load(assets / "student"), ["a fox", "a bee"]
    both, bee = images(2, asked=prompts), images(1, seed=1, asked=prompts[1:])
    assert both.shape == (2, 3, 32, 32) and torch.equal(bee[0], both[1]) and len(read) == 1
    with pytest.raises(UserError, match="makes pictures from text"):
        images(2)
    teacher = sample.load(assets / "pipeline")
    guided = open_network(assets / "pipeline")
    guided.serve(prompts, CPU)
    guided.guide(3.0)
    expected, _ = sample_block(guided.network, range(2), heun(2), [0, 1], CPU)
    assert torch.equal(teacher(2, steps=2, asked=prompts), expected[0])


@pytest.mark.parametrize("flags, said", [
    ("--checkpoint {}/student --sigmas 5 1", "has its own, [14."),
    ("--checkpoint {}/pipeline --sigmas 5", "is a teacher"),
    ("--checkpoint {}/student --dataset sd15", "--dataset sd15: "),
    ("--checkpoint bset.pt --dataset emoji", "no checkpoint at bset.pt")])
def test_a_flag_that_would_change_nothing_is_refused(flags, said, here, assets, monkeypatch,
                                                     capsys):
    assert said in refused(monkeypatch, capsys, sample, "--prompt", "a fox",
                           *flags.format(assets).split())


@pytest.mark.parametrize("change", [
    {"base": 3}, {"timesteps": 999}, {"timesteps": []}, {"timesteps": [249, 999]},
    {"timesteps": [999, -1]}, {"timesteps": [1000, 499]}], ids=str)
def test_an_exported_folder_that_was_edited_wrongly_is_refused(change, here, assets, monkeypatch,
                                                               capsys):
    shutil.copytree(assets / "student", here / "student")
    path = here / "student" / "sampling.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert "student/sampling.json" in refused(monkeypatch, capsys, sample, "--checkpoint",
                                              "student", "--prompt", "a fox")


def test_without_the_extra_one_line_says_how_to_install_it(here, monkeypatch, capsys):
    for name in ("diffusers", "transformers", "safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    line = refused(monkeypatch, capsys, sample, "--dataset", "emoji", "--prompt", "a fox")
    assert "pip install -r requirements-text.txt" in line


@pytest.mark.parametrize("part", [
    "model_index.json", "tokenizer/tokenizer.json", "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_a_damaged_pipeline_ends_with_two_and_one_line(part, here, assets, monkeypatch, capsys):
    shutil.copytree(assets / "pipeline", here / "pipeline")
    (here / "pipeline" / part).write_bytes((here / "pipeline" / part).read_bytes()[:50])
    opened = open_network(assets / "student")
    export(opened.network, here / "pipeline", opened.sigmas, here / "student", {})
    capsys.readouterr()
    line = refused(monkeypatch, capsys, sample, "--checkpoint", "student", "--prompt", "a fox",
                   "--out", "x.png")
    assert str(here / "pipeline" / part.split("/")[0]) in line


def test_a_folder_of_the_repository_is_found_from_any_other(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert name_of("assets") == name_of(ROOT / "assets") == "assets"
    assert locate("assets") == ROOT / "assets"
    (tmp_path / "assets").mkdir()                       # the user's own comes first
    assert name_of("assets") == str(tmp_path / "assets") and locate("assets") == ROOT / "assets"
    assert name_of("someone/some-pipeline") == "someone/some-pipeline"


# ---- Tables ----

@pytest.mark.parametrize("name", emoji_tables.RUNS)
def test_every_run_is_a_command_that_train_and_evaluate_take(name):
    plan = emoji_tables.PLAN
    *first, last = emoji_tables.commands(plan, name, 0)
    if name != "teacher":
        (_, config, where), = options.parse(shlex.split(first.pop(0))[2:])
        assert config.seed == 0 and len(config.sigmas) == config.stage == plan.runs[name].stage
        assert where.folder == (plan.best(name, 0)).parent
        assert config.iterations % config.evaluate_every == 0
        if plan.runs[name].after:
            assert config.start_from == str(plan.best(plan.runs[name].after, 0))
    for command in (*first, last):
        args = evaluate.parse(shlex.split(command)[2:])
        assert args.dataset == "emoji" or args.checkpoint == str(plan.best(name, 0))
    assert last.endswith("evaluation.json")


def test_rows_that_are_compared_differ_by_their_flags_alone():
    def config(name, more=""):
        train = emoji_tables.commands(emoji_tables.PLAN, name, 0)[0]
        (_, config, _), = options.parse(shlex.split(train + more)[2:])
        return vars(config)

    def differing(a, b, *more):
        return {k for k, v in config(a).items() if v != config(b, *more)[k]} - {"start_from"}

    budget = {"iterations", "evaluate_every"}
    assert differing("pmdd-2", "unguided-2") == {"guidance"} == differing("pmdd-3", "unguided-3")
    assert differing("pmdd-1", "dmd2-2", " --stage 1 --trained-step last") == {"method"} | budget
    assert differing("pmdd-1", "dmd2-gan") == {"method", "gan_weight"}
    assert differing("pmdd-1", "guidance-8") == {"guidance"} == differing("pmdd-1", "guidance-1")
    assert differing("beta-0-external-sampling", "beta-10-external-sampling") == {"unforget_weight"}
    assert differing("beta-1-external-sampling", "beta-1-no-external-sampling") == {
        "external_sampling"}


def test_the_tables_leave_out_no_run(monkeypatch):
    asked = set()
    monkeypatch.setattr(type(emoji_tables.PLAN), "done", lambda plan, name: asked.add(name) or [])
    for table in emoji_tables.TABLES.values():
        table()
    assert asked == set(emoji_tables.RUNS)
