"""evaluate.py for text to image: its pictures, resizes, prompts and scores against those by hand.

The pipelines, CLIP and COCO are tiny and made here, Inception is shallow; its weights are random,
but of a size that keeps its features apart.
"""

import fnmatch
import hashlib
import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import metrics.inception
import metrics.lpips
import fid
import tiny_pipelines
from base.errors import UserError
from helpers import ShallowInception, call, in_ranks
from images.captioned import coco_captions, open_captioned, square, squares
from metrics import evaluations, judge
from metrics.clip_score import PREFIX, ClipScore
from metrics.diversity import Diversity
from metrics.inception import RESIZES, Inception, bicubic_matrix
from metrics.lpips import LPIPS
from models import Guided, sample_every_step, sample_heun, sample_seeds
from weights.pipeline import Pipeline, load_teacher
from weights import checkpoint

PROMPTS = ["a cat", "two dogs on a mat", "", "A red car", "a lamp", "7 moths; one lamp"]
SIZES = [(40, 64), (64, 40), (33, 33), (50, 75), (299, 31), (40, 43), (300, 260)]   # height, width


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def noise_picture(height, width, seed):
    """Blocks of 4 pixels, so that little is lost when it is made larger or smaller."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3))
    return blocks.repeat(4, 0).repeat(4, 1)[:height, :width].astype(np.uint8)


def fabricate_coco(folder):
    """Seven pictures of all shapes, three captions each, out of order."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2014").mkdir()
    notes = []
    for k, size in enumerate(SIZES):
        number = 1000 - 37 * k
        Image.fromarray(noise_picture(*size, k)).save(
            folder / "val2014" / f"COCO_val2014_{number:012d}.jpg")
        notes += [{"image_id": number, "id": 10 * ((5 * k) % 7) + c, "caption": f" {number} {c}\n"}
                  for c in range(3)]
    (folder / "annotations/captions_val2014.json").write_text(json.dumps({"annotations": notes}))


def save_inception(path):
    torch.manual_seed(0)
    network = ShallowInception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)


def save_clip(folder):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(2)
    text = dict(vocab_size=514, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, bos_token_id=tiny_pipelines.FIRST,
                eos_token_id=tiny_pipelines.LAST, pad_token_id=tiny_pipelines.LAST)
    vision = dict(image_size=56, patch_size=14, hidden_size=32, intermediate_size=64,
                  num_hidden_layers=2, num_attention_heads=4)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    for parameter in model.parameters():                # far enough from one answer for everything
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tiny_pipelines.tokenizer().save_pretrained(folder)


def text_network(folder):
    return load_teacher(folder / "pipeline")


def save_student(folder, name, steps):
    """A student of one or more steps; its weights are not the teacher's."""
    network = text_network(folder)
    torch.manual_seed(3)
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    checkpoint.save(folder / name, {
        "dataset": "sd15", "method": "pmdd", "stage": steps, "iteration": 1, "fid": {},
        "sigmas": network.levels.table[[999, 499, 249][:steps]].tolist(),
        "network": network.config, "ema": network.state_dict(),
        "pipeline": str(folder / "pipeline")})
    return network


@pytest.fixture(scope="module", autouse=True)
def shallow():
    """Inception itself scores in test_fid.py, test_own.py and test_cifar10_command.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.inception, "Inception", ShallowInception)
        yield


@pytest.fixture(scope="module")
def world(shallow, tmp_path_factory):
    """A folder with everything; world/evaluation.json is of a student at 1 and 2 steps."""
    folder = tmp_path_factory.mktemp("world")
    tiny_pipelines.save(folder / "pipeline")
    fabricate_coco(folder / "coco")
    save_inception(folder / "inception.pth")
    save_clip(folder / "clip")
    save_student(folder, "student.pt", 2)
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(patch, fid, "--data", "coco/val2014", "--side", 256, "--out", "coco.npz",
                    "--inception", "inception.pth") == 0
        assert call(patch, evaluate, *COMMAND) == 0
    return folder


COMMAND = ["--checkpoint", "student.pt", "--prompts", "prompts.json", "--reference", "coco.npz",
           "--inception", "inception.pth", "--clip", "--clip-model", "clip"]


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A folder of one's own that has the same files."""
    folder = shutil.copytree(world, tmp_path / "here", copy_function=os.link,
                             ignore=shutil.ignore_patterns("evaluation.json"))
    monkeypatch.chdir(folder)
    return folder


def entries(path="evaluation.json"):
    return json.loads(Path(path).read_text())["evaluations"]


# ---- By hand ----

def pictures_of(network, folder, sampler, seeds=range(6), prompts=PROMPTS):
    """uint8 pictures of seed k for prompt k, of each element of the sampler's list."""
    pipeline = Pipeline(folder / "pipeline")
    pipeline.serve(network, prompts)
    lists, _ = sample_seeds(network, seeds, sampler, [seed % len(prompts) for seed in seeds])
    return [pipeline.decode(latents) for latents in lists]


def by_pillow(picture, side=256):
    """uint8 [H,W,3] -> the middle square, Lanczos, uint8 [side,side,3]."""
    picture = Image.fromarray(picture)
    short, (width, height) = min(picture.size), picture.size
    left, top = round((width - short) / 2), round((height - short) / 2)
    return np.asarray(picture.crop((left, top, left + short, top + short)).resize(
        (side, side), Image.Resampling.LANCZOS))


def clean(picture, target=299):
    """Pillow's bicubic of each float channel, clipped: float32 [3,299,299]."""
    channels = [np.asarray(Image.fromarray(channel.astype(np.float32)).resize(
        (target, target), Image.Resampling.BICUBIC)) for channel in picture.transpose(2, 0, 1)]
    return np.stack(channels).clip(0, 255)


def features_of(pictures, folder, side=256):
    """[N,128] of uint8 pictures [H,W,3] of any size."""
    network = ShallowInception()
    network.load_state_dict(torch.load(folder / "inception.pth", weights_only=True))
    network.resize = lambda x: x
    floats = torch.from_numpy(np.stack([clean(by_pillow(one, side)) for one in pictures]))
    with torch.no_grad():
        return torch.cat([network._chunk(x)[0] for x in floats.split(2)]).double().numpy()


def channels_last(images):
    return images.permute(0, 2, 3, 1).numpy()


def distance(a, b):
    """Frechet's between few features: the trace of the root is the nuclear norm of A B^T."""
    root = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    traces = sum(np.square(x).sum() for x in root)
    return np.square(a.mean(0) - b.mean(0)).sum() + traces - 2 * np.linalg.norm(
        root[0] @ root[1].T, "nuc")


def cosines_of(pictures, prompts, folder):
    """Of CLIPModel as a whole, with DMD2's splicing of tokens."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder / "clip")
    tokenizer = tiny_pipelines.tokenizer()
    prefix = tokenizer(PREFIX).input_ids[1:-1]
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt, padding="max_length", truncation=True).input_ids
        rows.append((ids[:1] + prefix + ids[1:])[:76] + [tiny_pipelines.LAST])
    mean, std = (np.array(values)[:, None, None] for values in (
        [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]))
    pixels = [np.asarray(Image.fromarray(one).resize((56, 56), Image.Resampling.BICUBIC))
              for one in pictures]
    pixels = [(one.transpose(2, 0, 1) / 255 - mean) / std for one in pixels]
    with torch.no_grad():
        told = model(input_ids=torch.tensor(rows),
                     pixel_values=torch.tensor(np.stack(pixels)).float())
        return (told.logits_per_image / model.logit_scale.exp()).diagonal().numpy()


# ---- Resizes and squares ----

@pytest.mark.parametrize("height, width", [(1, 1), (5, 8), (299, 299), (256, 256), (600, 301)])
def test_clean_resize_is_pillows_of_floats_without_rounding(height, width):
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    ours = RESIZES["clean"](torch.from_numpy(picture).permute(2, 0, 1)[None].float())[0]
    assert abs(ours.numpy() - clean(picture)).max() < 2e-4
    assert ours.min() >= 0 and ours.max() <= 255


def test_clean_resize_has_the_values_of_the_cubic_kernel():
    # Twice as wide: a column lies 1/4, 3/4, 5/4 or 7/4 of a new pixel from the middle of one, and
    # 1.5 d^3 - 2.5 d^2 + 1, -0.5 d^3 + 2.5 d^2 - 4 d + 2, all of them halved, are of it.
    values = [0.43359375, 0.11328125, -0.03515625, -0.01171875]
    halves = bicubic_matrix(598)[100]
    assert halves[196:206].tolist() == [0.0, *values[::-1], *values, 0.0]
    assert halves.count_nonzero() == 8
    for size in (1, 2, 7, 256, 299, 512, 1024):
        assert torch.allclose(bicubic_matrix(size).sum(1), torch.ones(299, dtype=torch.float64))
    assert torch.equal(bicubic_matrix(299), torch.eye(299, dtype=torch.float64))
    ramp = bicubic_matrix(64) @ torch.arange(64, dtype=torch.float64)       # exact away from ends
    there = (torch.arange(299) + 0.5) * 64 / 299 - 0.5
    assert torch.allclose(ramp[12:-12], there.double()[12:-12], atol=1e-5)


def test_clean_resize_clips_what_overshoots():
    step = torch.zeros(1, 3, 16, 16)
    step[..., 8:] = 255
    free = bicubic_matrix(16).float() @ step @ bicubic_matrix(16).float().T
    assert free.max() > 260 and free.min() < -5
    assert torch.equal(RESIZES["clean"](step), free.clip(0, 255))


def test_inception_sees_what_its_resize_gives():
    seen, images = [], torch.from_numpy(noise_picture(30, 50, 0)).permute(2, 0, 1)[None]
    for name, resize in RESIZES.items():
        network = Inception(name)
        network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, x: seen.append(x[0][0]))
        network(images)
        assert torch.equal(seen[-1], (resize(images.float())[0] - 128) / 128)
    assert (seen[0] - seen[1]).abs().max() > 0.1


@pytest.mark.parametrize("width, height, left, top", [
    (640, 427, 106, 0), (640, 425, 108, 0), (640, 423, 108, 0), (7, 10, 0, 2), (6, 6, 0, 0)])
def test_a_square_is_cut_where_torchvision_cuts_it(width, height, left, top):
    side = min(width, height)
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([columns % 256, rows % 256, columns // 256]).astype(np.uint8)
    expected = pixels[:, top:top + side, left:left + side]
    assert np.array_equal(square(pixels, side), expected)


def test_squares_are_pillows_and_grey_is_grey_repeated():
    for k, size in enumerate(SIZES):
        picture = noise_picture(*size, k)
        assert np.array_equal(square(picture.transpose(2, 0, 1), 100).transpose(1, 2, 0),
                              by_pillow(picture, 100))
        grey = torch.from_numpy(picture[..., 0].copy())[None, None]
        one = squares(grey, 100)
        assert torch.equal(one, squares(grey.expand(-1, 3, -1, -1), 100))
        assert torch.equal(squares(one, 100), one)                      # a second time nothing


# ---- COCO and other captions ----

def test_one_caption_of_each_picture_in_a_fixed_order(world):
    names, captions = zip(*coco_captions(world / "coco"))
    assert names[:2] == ("COCO_val2014_000000001000.jpg", "COCO_val2014_000000000852.jpg")
    assert sorted(int(caption.split()[0]) for caption in captions) == sorted(
        1000 - 37 * k for k in range(7))
    assert list(zip(names, captions)) == coco_captions(world / "coco")
    assert list(captions) != sorted(captions) and len({c.split()[1] for c in captions}) > 1
    assert captions[:3] == ("1000 1", "852 2", "815 0")          # the same on every machine


def test_pictures_of_any_size_with_captions_beside_them(tmp_path):
    for k, size in enumerate(SIZES[:3]):
        Image.fromarray(noise_picture(*size, k)).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text(f"number {k}\n")
    pictures = open_captioned(tmp_path, 50)
    assert pictures.captions == ["number 0", "number 1", "number 2"]
    pixels, _ = pictures.take([2, 0])
    assert np.array_equal(channels_last(pixels)[1], by_pillow(noise_picture(*SIZES[0], 0), 50))
    (tmp_path / "2.txt").write_bytes("\N{BYTE ORDER MARK}number 2".encode())
    image = tmp_path / os.fsdecode(b"caf\xe9.png")      # a name that is not UTF-8
    image.write_bytes((tmp_path / "2.png").read_bytes())
    image.with_suffix(".txt").write_text("a name of old")
    assert open_captioned(tmp_path, 50).captions[2:] == ["number 2", "a name of old"]
    image.unlink()
    (tmp_path / "1.txt").unlink()
    with pytest.raises(UserError, match="1 of 3 pictures have no caption, 1.png is the first"):
        open_captioned(tmp_path, 50)


# ---- Figures ----

def test_the_reference_is_that_of_the_squares_of_all_pictures(world):
    paths = sorted((world / "coco/val2014").glob("*.jpg"))
    features = features_of([np.asarray(Image.open(path)) for path in paths], world)
    with np.load(world / "coco.npz") as file:
        assert np.allclose(file["mu"], features.mean(0), rtol=1e-4, atol=1e-5)
        assert np.allclose(np.trace(file["sigma"]), features.var(0, ddof=1).sum(), rtol=1e-4)
        assert (file["resize"].item(), file["side"].item()) == ("clean", 256)


def test_figures_of_a_student_are_those_of_its_pictures_by_hand(world):
    network = checkpoint.network_from(checkpoint.load(world / "student.pt"))
    sigmas = network.levels.table[[999, 499]].tolist()
    lists = pictures_of(network, world, partial(sample_every_step, sigmas=sigmas))
    real = features_of(list(map(np.asarray, map(Image.open, (world / "coco/val2014").iterdir()))),
                       world)
    found = entries(world / "evaluation.json")
    assert [(e["what"], e["evaluations"]) for e in found] == [("1 step", 1), ("2 steps", 2)]
    for entry, images in zip(found, lists, strict=True):
        figures = {name: figure["mean"] for name, figure in entry["figures"].items()}
        assert figures.keys() == {"FID", "clip_score"}
        pictures = list(channels_last(images))
        assert figures["FID"] == pytest.approx(distance(features_of(pictures, world), real),
                                               rel=1e-4)
        cosines = cosines_of(list(map(by_pillow, pictures)), PROMPTS, world)
        assert figures["clip_score"] == pytest.approx(cosines.mean(), abs=2e-5)
    assert abs(np.diff([e["figures"]["FID"]["mean"] for e in found])) > 1e-2


def test_pictures_from_files_score_as_the_student_that_made_them(world, here, monkeypatch):
    network = checkpoint.network_from(checkpoint.load(world / "student.pt"))
    sampler = partial(sample_every_step, sigmas=network.levels.table[[999, 499]].tolist())
    Path("made").mkdir()
    for k, picture in enumerate(channels_last(pictures_of(network, world, sampler)[1])):
        Image.fromarray(picture).save(f"made/{k}.png")
        Path(f"made/{k}.txt").write_text(PROMPTS[k])
    assert call(monkeypatch, evaluate, "--images", "made", *COMMAND[4:]) == 0
    found, wanted = entries()[0], entries(world / "evaluation.json")[1]
    for name in wanted["figures"]:                      # of another batch, so to a level of uint8
        assert found["figures"][name]["mean"] == pytest.approx(wanted["figures"][name]["mean"],
                                                               rel=1e-4)
    assert found["protocol"]["side"] == 256 and found["protocol"]["resize"] == "clean"


def test_processes_agree_with_one(world, here):
    in_ranks(2, evaluate, *COMMAND, "--out", "two.json", "--device", "cpu", cwd=here)
    for two, one in zip(entries("two.json"), entries(world / "evaluation.json"), strict=True):
        assert two["protocol"] == one["protocol"] and two["environment"]["processes"] == 2
        for name in one["figures"]:
            assert two["figures"][name]["mean"] == pytest.approx(one["figures"][name]["mean"],
                                                                 rel=1e-9)


def test_the_clip_score_of_pictures_and_long_captions(world):
    clip, prompts = ClipScore(world / "clip"), [*PROMPTS, "x" * 200, "it's &amp; two, three."]
    images = torch.from_numpy(np.stack([noise_picture(90, 90, k) for k in range(8)]))
    expected = cosines_of(list(images.numpy()), prompts, world)
    first, second = clip([images.permute(0, 3, 1, 2)] * 2, prompts)
    assert np.allclose(first.numpy(), expected, atol=2e-6) and torch.equal(first, second)
    assert np.ptp(expected) > 0.05
    alone, = clip([images.permute(0, 3, 1, 2)[3:4]], prompts[3:4])
    assert torch.equal(alone, first[3:4])                   # the same bits in any company


class SmallFeatures(torch.nn.Module):
    """In Inception's place: a few features of the pictures that it is given."""

    name, dimensions, sha256, logit_bias = "small", 6, "0" * 64, torch.zeros(1008)
    metric, share, side = "FID", None, 256

    def forward(self, images):
        assert images.shape[1:] == (3, self.side, self.side) and images.dtype == torch.uint8
        means = images.float().reshape(len(images), 6, -1).mean(2)
        return means, torch.zeros(len(images), 1008)


@pytest.fixture
def small(here, monkeypatch):
    monkeypatch.setattr(judge, "feature_network", lambda *args: SmallFeatures())
    np.savez("small.npz", mu=np.full(6, 100.0), sigma=np.eye(6))
    return ["--prompts", "prompts.json", "--reference", "small.npz"]


def small_distance(images):
    features = SmallFeatures()(squares(images, 256))[0].double().numpy()
    own = np.cov(features, rowvar=False)
    root = np.sqrt(np.linalg.eigvalsh(own).clip(0)).sum()
    return np.square(features.mean(0) - 100).sum() + np.trace(own) + 6 - 2 * root


@pytest.mark.parametrize("flags, weight", [([], 3.0), (["--guidance", "1"], 1), (
    ["--guidance", "0.5"], 0.5)])
def test_a_teacher_is_guided_by_three_or_as_told(small, here, monkeypatch, flags, weight):
    assert call(monkeypatch, evaluate, "--checkpoint", "pipeline", "--heun", 2, *flags, *small) == 0
    entry, = entries()
    assert entry["protocol"]["guidance"] == weight and entry["evaluations"] == 3
    network = text_network(here)
    Pipeline(here / "pipeline").serve(network, PROMPTS)
    images, = pictures_of(Guided(network, weight), here,
                          lambda *inputs: [sample_heun(*inputs, steps=2)])
    assert entry["figures"]["FID"]["mean"] == pytest.approx(small_distance(images), rel=1e-5)
    assert entry["protocol"]["source"] == {
        "file": "pipeline", "sha256": checkpoint.weights_digest(text_network(here).state_dict())}


def test_the_clip_score_is_of_256_pixels_whatever_the_side(small, monkeypatch):
    for side in (64, 256):
        monkeypatch.setattr(SmallFeatures, "side", side)
        assert call(monkeypatch, evaluate, "--checkpoint", "student.pt", "--steps", 1, *small,
                    "--side", side, "--clip", "--clip-model", "clip") == 0
    first, second = (entry["figures"] for entry in entries())
    assert first["clip_score"] == second["clip_score"] and first["FID"] != second["FID"]


def test_further_blocks_of_seeds_ask_for_the_same_prompts(small, here, monkeypatch):
    assert call(monkeypatch, evaluate, "--checkpoint", "student.pt", "--steps", 1, "--n", 4,
                "--repeats", 2, *small) == 0
    network = checkpoint.network_from(checkpoint.load("student.pt"))
    sampler = partial(sample_every_step, sigmas=network.levels.table[[999]].tolist())
    values = entries()[0]["figures"]["FID"]["values"]
    for block, value in enumerate(values):
        images, = pictures_of(network, here, sampler, range(4 * block, 4 * block + 4), PROMPTS[:4])
        assert value == pytest.approx(small_distance(images), rel=1e-5)
    assert values[0] != values[1] and entries()[0]["protocol"]["seeds"] == ["0-3", "4-7"]


def test_precision_and_recall_are_against_the_squares_of_coco(small, monkeypatch):
    held = []
    monkeypatch.setattr(judge, "precision_recall",
                        lambda real, fake, k: held.append((real, fake)) or (0.5, 0.25))
    assert call(monkeypatch, evaluate, "--checkpoint", "student.pt", "--steps", 1, "--coco", "coco",
                "--precision-recall", *small) == 0
    (real, fake), = held
    paths = sorted(Path("coco/val2014").iterdir())
    pictures = torch.from_numpy(np.stack([by_pillow(np.asarray(Image.open(p))) for p in paths]))
    assert torch.equal(real, SmallFeatures()(pictures.permute(0, 3, 1, 2))[0]) and len(fake) == 6
    assert "7 of 7 in coco/val2014" in entries()[0]["protocol"]["precision_recall"]


def test_training_scores_squares_of_the_prompts_in_order(small, here):
    config = SimpleNamespace(dataset="sd15", evaluate_every=1, evaluate_images=5)
    options = SimpleNamespace(reference="small.npz", inception=None, cache=None,
                              network=text_network(here).config)
    network = checkpoint.network_from(checkpoint.load("student.pt"))
    sigmas, prompts = network.levels.table[[999, 499]].tolist(), PROMPTS[:3]
    lists = pictures_of(network, here, partial(sample_every_step, sigmas=sigmas), range(5), prompts)
    scorer = judge.Scorer(config, options, torch.device("cpu"))
    assert scorer.judge.made == {"resize": "clean", "side": 256}
    found = scorer.score(network, sigmas)
    assert [found[key]["FID"] for key in "12"] == pytest.approx(
        [small_distance(images) for images in lists], rel=1e-5)


# ---- Records ----

def test_the_protocol_names_all_that_the_figures_depend_on(world):
    for entry in entries(world / "evaluation.json"):
        protocol = entry["protocol"]
        assert protocol["prompts"] == {"file": "prompts.json",
                                       "sha256": digest(world / "prompts.json")}
        assert (protocol["resize"], protocol["side"], protocol["images"]) == ("clean", 256, 6)
        assert protocol["clip_score"]["model"] == "clip" and "guidance" not in protocol
        assert protocol["source"]["sha256"] == digest(world / "student.pt")
        assert protocol["reference"]["sha256"] == digest(world / "coco.npz")
        assert protocol["seeds"] == ["0-5"] and "prompts in order" in protocol["labels"]


def test_coco_gives_prompts_and_says_how_they_were_chosen(small, monkeypatch):
    assert call(monkeypatch, evaluate, "--checkpoint", "student.pt", "--steps", 1, "--coco", "coco",
                *small[2:]) == 0
    entry, = entries()
    file = "coco/annotations/captions_val2014.json"
    assert entry["protocol"]["images"] == 7
    assert entry["protocol"]["prompts"] == {
        "file": str(Path(file)), "sha256": digest(file),
        "choice": "one caption of each picture, drawn by seed 0 as their order"}
    assert call(monkeypatch, evaluate, "--checkpoint", "student.pt", "--steps", 1, "--coco", "coco",
                *small) == 0                            # a file of prompts decides
    assert entries()[1]["protocol"]["prompts"]["file"].endswith("prompts.json")


def test_the_table_shows_the_clip_score_and_the_protocol(world, capsys, monkeypatch):
    found = entries(world / "evaluation.json")
    text = evaluations.table(found)
    score = found[0]["figures"]["clip_score"]["mean"]
    assert "| FID | CLIP score | protocol |" in text and f"| {score:.4f} |" in text
    sha = digest(world / "prompts.json")[:8]
    for part in (f"prompts prompts.json ({sha})", "middle squares, Lanczos to 256",
                 "clean-fid's resize", "CLIP score of clip ("):
        assert part in text


def test_a_record_of_before_there_was_a_choice_of_resize_is_replaced_by_the_same(tmp_path):
    entry = {"what": "1 step", "evaluations": 1, "figures": {"FID": evaluate.summary([2.0])},
             "protocol": {"images": 9, "seeds": None, "labels": "none", "rounding": "as given",
                          "reference": {"file": "r.npz", "sha256": "ab" * 32},
                          "features": {"network": "inception", "sha256": "cd" * 32},
                          "source": {"file": "a.pt", "sha256": "ef" * 32}},
             "environment": {"torch": "2.6", "device": "cpu"}}
    path = tmp_path / "evaluation.json"
    evaluations.record(path, [entry], force=False)
    newer = [entry | {"protocol": entry["protocol"] | {"resize": name}}
             for name in ("tf1", "clean")]
    assert evaluations.table([entry]) == evaluations.table(newer[:1])
    evaluations.record(path, newer, force=False)
    assert evaluations.read_records(path) == newer


# ---- What is refused ----

@pytest.mark.parametrize("flags, said", [
    ("--checkpoint student.pt --prompts prompts.json --n 7", "has 6 captions, 7 images need"),
    ("--checkpoint student.pt --coco coco --n 8", "has 7 captions, 8 images need"),
    ("--checkpoint student.pt --prompts one.json", "has 1 captions, 2 images need"),
    ("--checkpoint student.pt --prompts none.txt", "none.txt"),
    ("--checkpoint student.pt --coco clip", "annotations/captions_val2014.json"),
    ("--checkpoint student.pt --coco clip", "val2014/*.jpg, of val2014.zip; both are published"),
    ("--checkpoint student.pt --coco spoilt", "holds no captions as COCO's does"),
    ("--checkpoint student.pt --coco coco", "--side 256 --resize clean --out FILE.npz makes one"),
    ("--checkpoint student.pt --coco coco --reference none.npz",
     "no reference at none.npz; python fid.py --data PICTURES --side 256 --resize clean --out "
     "none.npz makes one"),
    ("--checkpoint student.pt --coco coco --reference tf1.npz",
     "tf1.npz was made with --resize tf1, these figures are of --resize clean"),
    ("--checkpoint student.pt --coco coco --reference 512.npz", "--side 512, these figures are of"),
    ("--checkpoint student.pt", "makes pictures from text: give --prompts or --coco"),
    ("--dataset digits --runs none --prompts prompts.json", "is no text-to-image network"),
    ("--dataset digits --runs none --coco coco", "is no text-to-image network"),
    ("--dataset digits --runs none --clip", "--clip: assets/digits-student.pt is no text-to-image"),
    ("--dataset digits --runs none --side 16", "digits have a network of their own"),
    ("--dataset digits --runs none --resize clean", "digits have a network of their own"),
    ("--dataset digits --runs none --side 8 --resize tf1", "digits have a network of their own"),
    ("--checkpoint pipeline --prompts prompts.json --guidance -1", "--guidance -1.0: must be 0 or"),
    ("--checkpoint pipeline --prompts prompts.json --guidance nan", "--guidance nan: must be 0 or"),
    ("--checkpoint student.pt --prompts prompts.json --guidance 2", "--guidance is for a teacher"),
    ("--checkpoint student.pt --prompts prompts.json --side 0", "--side 0: must be 1 to 4096"),
    ("--checkpoint student.pt --coco coco --clip-model clip", "--clip-model is for --clip"),
    ("--checkpoint student.pt --prompts prompts.json --reference ok.npz --clip --clip-model coco",
     "model.safetensors"),
    ("--images coco/val2014 --prompts prompts.json", "--images are made already"),
    ("--images coco/val2014 --clip --reference ok.npz", "7 of 7 pictures have no caption"),
    ("--images none --side 256 --reference ok.npz", "no pictures at none"),
    ("--images coco/val2014 --reference ok.npz", "all images must have one size")])
def test_a_mistake_is_one_line_and_leaves_nothing_behind(here, monkeypatch, capfd, flags, said):
    monkeypatch.setattr(judge, "load_inception", lambda *args: SmallFeatures())
    small = {"mu": np.zeros(6), "sigma": np.eye(6)}
    np.savez("ok.npz", **small)
    np.savez("tf1.npz", **small, resize="tf1", side=256)
    np.savez("512.npz", **small, resize="clean", side=512)
    Path("one.json").write_text('["a cat"]')
    Path("spoilt/annotations").mkdir(parents=True)
    Path("spoilt/annotations/captions_val2014.json").write_text('{"annotations": [{"id": 1}]}')
    before = set(Path().rglob("*"))
    assert call(monkeypatch, evaluate, *flags.split()) == 2
    line, = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line and set(Path().rglob("*")) == before


def test_clip_is_fetched_from_the_hub_by_its_parts_or_asked_for(world, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: (
        asked.append((name, allow_patterns)) or world / "clip"))
    assert ClipScore().size == 56 and asked[0][0] == "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
    files = ["model.safetensors", "tokenizer.json", "merges.txt", "pytorch_model.bin",
             "open_clip_pytorch_model.safetensors"]
    assert [any(fnmatch.fnmatch(file, part) for part in asked[0][1]) for file in files] == [
        True, True, True, False, False]

    def fails(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(UserError, match="--clip-model some/name is no folder, and config.json.*"
                                        "offline.*can be given in its place"):
        ClipScore("some/name")


def test_fid_refuses_pictures_of_many_sizes_but_with_a_side(here, monkeypatch, capfd):
    monkeypatch.setattr(judge, "load_inception", lambda *args: SmallFeatures())
    flags = ["--data", "coco/val2014", "--out", "out.npz"]
    for more, said in (([], "all images must have one size"), (["--side", 5000], "1 to 4096")):
        assert call(monkeypatch, fid, *flags, *more) == 2
        assert said in capfd.readouterr().err and not Path("out.npz").exists()
    assert call(monkeypatch, fid, *flags, "--side", 256) == 0
    assert fid.read_reference("out.npz", 6, resize="clean", side=256)[0].shape == (6,)


def test_a_reference_of_the_pictures_that_the_first_captions_are_of(here, monkeypatch, capfd):
    inception = ["--inception", "inception.pth"]
    assert call(monkeypatch, fid, "--coco", "coco", "--n", 3, "--side", 64, "--out", "three.npz",
                *inception) == 0
    Path("three").mkdir()
    for number in (1000, 852, 815):
        name = f"COCO_val2014_{number:012d}.jpg"
        shutil.copy(Path("coco/val2014", name), Path("three", name))
    assert call(monkeypatch, fid, "--data", "three", "--side", 64, "--out", "again.npz",
                *inception) == 0
    one, other = (fid.read_reference(f"{name}.npz") for name in ("three", "again"))
    assert all(np.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(one, other))
    shutil.move("coco/val2014", "elsewhere")
    shutil.copytree("three", "coco/val2014")
    for flags, said in ((["--coco", "coco", "--side", 64], "4 of 7 pictures are not there, COCO_v"),
                        (["--coco", "coco"], "--coco has pictures of many sizes: give --side"),
                        (["--coco", "coco", "--n", 1, "--side", 64], "--n 1: must be 2 to 7"),
                        (["--side", 64], "give --data, or --coco"),
                        (["--data", "three", "--n", 3, "--side", 64], "--n is for --coco")):
        assert call(monkeypatch, fid, *flags, "--out", "none.npz") == 2
        assert said in capfd.readouterr().err and not Path("none.npz").exists()


# ---- Patch FID and diversity, as DMD2 has them ----

def patch_by_hand(picture):
    """uint8 [H,W,3] -> the middle 299 pixels a side; a smaller one resized whole."""
    height, width = picture.shape[:2]
    if min(height, width) < 299:
        return np.asarray(Image.fromarray(picture).resize((299, 299), Image.Resampling.BICUBIC))
    top, left = round((height - 299) / 2), round((width - 299) / 2)
    return picture[top:top + 299, left:left + 299]


def patch_features(pictures, folder):
    network = ShallowInception()
    network.load_state_dict(torch.load(folder / "inception.pth", weights_only=True))
    network.resize = lambda x: x
    x = torch.from_numpy(np.stack([patch_by_hand(one) for one in pictures]))
    with torch.no_grad():
        return network._chunk(x.permute(0, 3, 1, 2).float())[0].double().numpy()


def test_patch_fid_is_of_the_middle_299_pixels_as_they_are(here, monkeypatch, capfd):
    real = [noise_picture(*size, k) for k, size in enumerate([(330, 352), (299, 404), (320, 120)])]
    made = [noise_picture(310, 325, seed) // 2 for seed in (7, 8, 9)]
    for name, pictures in (("real", real), ("made", made)):
        Path(name).mkdir()
        for k, picture in enumerate(pictures):
            Image.fromarray(picture).save(f"{name}/{k}.png")
    np.savez("any.npz", mu=np.zeros(128), sigma=np.eye(128))
    inception = "--inception", "inception.pth"
    assert call(monkeypatch, fid, "--data", "real", "--patch", "--out", "patch.npz",
                *inception) == 0
    flags = "--images", "made", "--reference", "any.npz", *inception, "--patch-fid"
    assert call(monkeypatch, evaluate, *flags, "patch.npz") == 0
    entry, = entries()
    wanted = distance(*(patch_features(pictures, here) for pictures in (made, real)))
    assert entry["figures"]["patch_fid"]["mean"] == pytest.approx(wanted, rel=1e-4)
    assert entry["protocol"]["patch_reference"] == {"file": "patch.npz",
                                                    "sha256": digest("patch.npz")}
    assert "| patch FID |" in evaluations.table([entry])
    refused = {"coco.npz": "was made with --side 256, these figures are of --side 299",
               "none.npz": "python fid.py --data PICTURES --patch --out none.npz makes one",
               "patch.npz --side 256": "--patch-fid is of images as they are"}
    for path, said in refused.items():
        assert call(monkeypatch, evaluate, *flags, *path.split()) == 2
        assert said in capfd.readouterr().err


def test_larger_pictures_are_compared_at_512_pixels_for_diversity():
    diverse, sides = object.__new__(Diversity), []
    diverse.prompts, diverse.device = ["the sea"], "cpu"
    diverse.distance = lambda x, y: sides.append(x.shape[-1]) or torch.zeros(len(x))
    lists = [torch.zeros(4, 3, side, side, dtype=torch.uint8) for side in (600, 512, 64)]
    assert diverse.scores(lambda numbers: (lists, None), 3) == [0, 0, 0] and sides == [512, 512, 64]


def test_diversity_is_the_mean_lpips_between_four_pictures_of_each_prompt(here, monkeypatch, capfd):
    torch.manual_seed(0)
    lpips = LPIPS(resize=None)
    state = {name: value.abs() if name.startswith("lin") else value     # as LPIPS's are
             for name, value in lpips.state_dict().items()}
    lpips.load_state_dict(state)
    for name in ("vgg16", "lpips-vgg"):
        torch.save({k: v for k, v in state.items() if k.startswith("lin") == (name != "vgg16")},
                   name)
    monkeypatch.setattr(metrics.lpips, "fetch", lambda name, cache: name)
    Path("two.txt").write_text("a red car\nthe sea\n")
    assert call(monkeypatch, evaluate, *COMMAND[:8], "--diversity", "two.txt", "--steps", 1, 2,
                "--n", 2) == 0
    network = checkpoint.network_from(checkpoint.load("student.pt"))
    lists = pictures_of(network, here, partial(
        sample_every_step, sigmas=network.levels.table[[999, 499]].tolist()), range(8),
        ["a red car"] * 4 + ["the sea"] * 4)
    for entry, images in zip(entries(), lists, strict=True):
        x = images / 127.5 - 1
        pairs = [lpips(x[i:i + 1], x[j:j + 1]).item() for first in (0, 4)
                 for i in range(first, first + 4) for j in range(i + 1, first + 4)]
        assert len(pairs) == 12 and min(pairs) > 0
        assert entry["figures"]["diversity"]["mean"] == pytest.approx(np.mean(pairs), rel=1e-3)
        assert "4 images of each prompt of two.txt" in entry["protocol"]["diversity"]
    assert call(monkeypatch, evaluate, "--images", "coco/val2014", "--diversity", "two.txt") == 2
    assert "--diversity is of text to image" in capfd.readouterr().err
