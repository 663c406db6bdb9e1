"""Real images as they are stored and published, and the teacher's noise-image pairs."""

import copy
import hashlib
import io
import json
import os
import pickle
import random
import resource
import struct
import tarfile
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from base import distributed
from base.errors import RunFailed, UserError
from helpers import small_network
from images import real
from models import Guided, SeededNoise, classes_as_conditions, sample_heun
from training import kept, noise_pairs
from weights.checkpoint import weights_digest


def refused(source, *words):
    """The one-line error of opening a source and reading all of it; it holds these words."""
    with pytest.raises(UserError) as caught:
        for _ in real.open_images(str(source)).batches(4):
            pass
    for word in (str(source), *words):
        assert word in str(caught.value)
    return str(caught.value)


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ---- Digits ----

def test_digits_are_the_published_grey_levels_spread_over_0_to_255():
    digits = real.open_images("digits")
    assert len(digits) == 1797 and digits.shape == (1, 8, 8) and digits.classes == 10
    with np.load(real.DIGITS) as file:
        published, labels = file["images"], file["labels"]
    assert published.shape == (1797, 8, 8) and set(np.unique(published)) == set(range(17))
    pixels, classes = digits.take(range(1797))
    assert pixels.dtype == torch.uint8 and classes.dtype == torch.int64
    expected = [round(v * 255 / 16) for v in range(17)]         # no value is a tie
    assert np.array_equal(pixels[:, 0].numpy(), np.array(expected, np.uint8)[published])
    assert np.array_equal(classes.numpy(), labels)
    # The published counts of the ten classes, and the first image's first row.
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert published[0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert labels[:10].tolist() == [*range(10)]


def test_batches_are_takes_of_consecutive_indices_and_cover_every_image_once():
    digits = real.open_images("digits")
    batches = list(digits.batches(500))
    assert [len(pixels) for pixels, _ in batches] == [500, 500, 500, 297]
    whole, classes = digits.take(range(1797))
    assert torch.equal(torch.cat([p for p, _ in batches]), whole)
    assert torch.equal(torch.cat([c for _, c in batches]), classes)
    picked, labels = digits.take([5, 1796, 5])
    assert torch.equal(picked, whole[[5, 1796, 5]]) and torch.equal(labels, classes[[5, 1796, 5]])


# ---- CIFAR-10's binary archive ----

def records(count, seed):
    """(bytes, classes, pixels) in the published layout: a class, then red, green, blue rows."""
    pixels = noise((count, 3, 32, 32), seed)
    classes = np.arange(count, dtype=np.uint8) * 3 % 10
    return b"".join(bytes([c]) + p.tobytes() for c, p in zip(classes, pixels)), classes, pixels


def archive(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:                                               # a link
                info.type, info.linkname = content
                tar.addfile(info)
    return path


def test_cifar10_is_read_in_the_order_of_its_five_files_without_the_test_set(tmp_path):
    parts = {f"cifar-10-batches-bin/data_batch_{i}.bin": records(4, i) for i in range(1, 6)}
    members = [(name, part[0]) for name, part in parts.items()][::-1]       # stored backwards
    members += [("cifar-10-batches-bin/test_batch.bin", records(3, 9)[0]),
                ("cifar-10-batches-bin/batches.meta.txt", b"airplane\n")]
    for mode in ("w:gz", "w"):
        path = archive(tmp_path / f"archive.{mode[2:]}", members, mode)
        images = real.open_images(str(path))
        assert len(images) == 20 and images.shape == (3, 32, 32) and images.classes == 10
        pixels, classes = images.take(range(20))
        assert np.array_equal(pixels.numpy(), np.concatenate([p[2] for p in parts.values()]))
        assert np.array_equal(classes.numpy(), np.concatenate([p[1] for p in parts.values()]))


def test_a_bad_cifar10_archive_is_named_with_what_is_wrong(tmp_path):
    good = records(3, 0)[0]
    name = "cifar-10-batches-bin/data_batch_1.bin"
    cases = {"cut": ([(name, good[:-1])], "has 9218 bytes, not a multiple of 3073"),
             "empty": ([(name, b"")], "has 0 bytes"),
             "class": ([(name, b"\x0a" + good[1:])], "class 10 is out of range; allowed: 0 to 9"),
             "none": ([("cifar-10-batches-bin/test_batch.bin", good)], "cifar-10-binary.tar.gz")}
    for case, (members, message) in cases.items():
        refused(archive(tmp_path / case, members), message)
    (tmp_path / "text").write_bytes(b"not an archive " * 50)
    (tmp_path / "nothing").write_bytes(b"")
    whole = archive(tmp_path / "whole", [(name, random.Random(0).randbytes(30730))]).read_bytes()
    (tmp_path / "truncated").write_bytes(whole[:len(whole) // 2])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    (tmp_path / "flipped").write_bytes(flipped)
    for case in ("text", "nothing", "truncated", "flipped"):
        refused(tmp_path / case)
    refused(tmp_path / "missing", "give digits, emoji, cifar10, a folder, a zip")


def test_an_archive_cannot_write_link_or_unpickle_anything(tmp_path):
    good, name = records(2, 1)[0], "cifar-10-batches-bin/data_batch_1.bin"
    (tmp_path / "secret.bin").write_bytes(good)
    hostile = [("../../escaped.bin", b"x"), ("/absolute_escaped", b"x"),
               ("../data_batch_0.bin", good),
               ("data_batch_2.bin", (tarfile.SYMTYPE, str(tmp_path / "secret.bin"))),
               ("data_batch_3.bin", (tarfile.LNKTYPE, name)), ("a", (tarfile.CHRTYPE, ""))]
    folder = tmp_path / "folder"
    folder.mkdir()
    path = archive(folder / "hostile.tar.gz", [*hostile, (name, good)])
    before = files_below(tmp_path)
    images = real.open_images(str(path))
    assert len(images) == 4                     # two of a real member each; links hold nothing
    assert files_below(tmp_path) == before
    # The archive for Python holds pickles under nearly the same names.
    python = archive(tmp_path / "python.tar.gz",
                     [("cifar-10-batches-py/data_batch_1", bomb(tmp_path) + bytes(3073))])
    refused(python, "data_batch_*.bin")
    assert not (tmp_path / "exploded").exists()


def test_a_member_that_states_a_huge_size_is_refused_before_it_is_read(tmp_path):
    info = tarfile.TarInfo("data_batch_1.bin")
    info.size = 3073 << 30
    (tmp_path / "bomb.tar").write_bytes(info.tobuf() + bytes(1024))
    refused(tmp_path / "bomb.tar", str(info.size))


# ---- Image folders and zips ----

def encoded(pixels, kind="PNG", **options):
    content = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(content, format=kind, **options)
    return content.getvalue()


def folder_of(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def zip_of(path, files, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


def both(tmp_path, name, files):
    """The same files as a folder and as a zip."""
    yield folder_of(tmp_path / name, files)
    yield zip_of(tmp_path / f"{name}.zip", files)


def labels_json(labels):
    return json.dumps({"labels": labels}).encode()


RGB = noise((5, 6, 4, 3), 7)                                    # five images, 6 high, 4 wide
NAMES = ["00000/img0.png", "00000/img1.png", "00001/deeper/img2.PNG", "00001/img3.bmp", "z.webp"]
FILES = {name: encoded(image, kind, **options) for name, image, (kind, options) in zip(
    NAMES, RGB, [("PNG", {}), ("PNG", {}), ("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})])}


def test_a_folder_and_a_zip_hold_the_same_images_and_classes_in_the_order_of_names(tmp_path):
    classes = [3, 0, 7, 7, 1]
    shuffled = [[n, c] for n, c in zip(NAMES, classes)][::-1]
    files = FILES | {"dataset.json": labels_json(shuffled), "README.txt": b"no image"}
    for path in both(tmp_path, "set", files):
        images = real.open_images(str(path))
        assert len(images) == 5 and images.shape == (3, 6, 4) and images.classes == 8
        pixels, labels = images.take(range(5))
        assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), RGB)
        assert labels.tolist() == classes
        assert torch.equal(torch.cat([p for p, _ in images.batches(2)]), pixels)


def test_classes_are_told_at_the_top_and_named_as_far_as_images_have_them(tmp_path):
    told = {"labels": [[name, 1] for name in NAMES], "classes": ["cat", "dog", "fox"]}
    files = FILES | {"dataset.json": json.dumps(told).encode(), "__MACOSX/._a.png": b"a note"}
    for path in both(tmp_path, "set", files):
        images = real.open_images(str(path))
        assert images.classes == 2 and images.class_names == ("cat", "dog") and len(images) == 5
    for path in both(tmp_path, "deep", {f"set/{name}": one for name, one in files.items()}):
        with pytest.raises(UserError, match="set/dataset.json, .* has to stand at the top"):
            real.open_images(str(path))


def test_images_without_classes_count_none_and_give_zeros(tmp_path):
    captions = labels_json([[name, "a red fox"] for name in NAMES])
    for i, more in enumerate(({}, {"dataset.json": b'{"labels": null}'},
                              {"dataset.json": captions})):
        for path in both(tmp_path, f"set{i}", FILES | more):
            images = real.open_images(str(path))
            assert images.classes == 0 and images.take([1, 2])[1].tolist() == [0, 0]


@pytest.mark.parametrize("labels, message", [
    (labels_json([[n, 0] for n in NAMES[:-1]]), "gives z.webp the class None"),
    (labels_json([[n, -1] for n in NAMES]), "the class -1; allowed: whole numbers from 0"),
    (labels_json([[n, "2"] for n in NAMES]), "the class '2'"),
    (json.dumps({"labels": [[n, "cat"] for n in NAMES], "classes": ["cat", "dog"]}).encode(),
     "the class 'cat'"),
    (labels_json([[n, True] for n in NAMES]), "the class True"),
    (labels_json([[n, 1.0] for n in NAMES]), "the class 1.0"),
    (labels_json([[n, [0, 1]] for n in NAMES]), "the class [0, 1]"),
    (labels_json([[n, 2 ** 70] for n in NAMES]), f"the class {2 ** 70}"),
    (labels_json([]), "the class None"),
    (labels_json([[n, 0] for n in [*NAMES, "gone.png"]]), "names gone.png, which is no image"),
    (labels_json([[n, 0] for n in [*NAMES, "z.webp"]]), "names z.webp, twice"),
    (labels_json(5), "dataset.json is not"), (labels_json([["only"]]), "dataset.json is not"),
    (labels_json({"a": 1}), "dataset.json is not"), (b"[]", "dataset.json is not"),
    (b"{}", "dataset.json is not"), (b"{", "dataset.json is not"),
    (b"\xff\xfe", "dataset.json is not"), (b"[" * 100_000, "dataset.json is not")])
def test_wrong_classes_are_refused_when_the_images_are_opened(tmp_path, labels, message):
    for path in both(tmp_path, "set", FILES | {"dataset.json": labels}):
        with pytest.raises(UserError) as caught:
            real.open_images(str(path))
        assert message in str(caught.value) and str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_every_kind_of_png_gives_the_grey_levels_or_colours_that_it_shows(tmp_path):
    grey16 = np.array([[0, 257, 32896], [65535, 128, 129]], np.uint16)  # multiples of 257 are exact
    rgba = noise((2, 3, 4))
    palette = Image.fromarray(RGB[0]).quantize(16)
    cases = {"grey": (rgba[..., 0], rgba[..., 0][None]),
             "rgb": (rgba[..., :3], rgba[..., :3].transpose(2, 0, 1)),
             "transparent": (rgba, rgba[..., :3].transpose(2, 0, 1)),   # alpha is left out
             "grey with alpha": (Image.fromarray(rgba[..., :2], "LA"), rgba[..., 0][None]),
             "16 bits": (grey16, np.array([[[0, 1, 128], [255, 0, 1]]], np.uint8)),
             "palette": (palette, np.array(palette.convert("RGB")).transpose(2, 0, 1)),
             "black and white": (Image.fromarray(np.array([[True, False]])),
                                 np.array([[[255, 0]]], np.uint8))}
    for name, (image, expected) in cases.items():
        for path in both(tmp_path, name, {"a.png": encoded(image)}):
            pixels = real.open_images(str(path)).take([0])[0][0].numpy()
            assert pixels.dtype == np.uint8 and np.array_equal(pixels, expected), name


def test_an_image_that_does_not_fit_the_others_or_is_none_is_named(tmp_path):
    wide, grey = encoded(noise((6, 5, 3))), encoded(noise((6, 4)))
    cases = {"wide": (wide, "extra.png is 5x6 with 3 channel(s), but 00000/img0.png is 4x6 with 3"),
             "grey": (grey, "extra.png is 4x6 with 1 channel(s)"),
             "text": (b"no image", "cannot read extra.png as an image"),
             "empty": (b"", "cannot read extra.png"),
             "half": (FILES[NAMES[0]][:60], "cannot read extra.png")}
    for case, (content, message) in cases.items():
        for path in both(tmp_path, case, FILES | {"extra.png": content}):
            assert "\n" not in refused(path, message)


def test_a_place_without_images_says_which_files_it_wants(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "named.png").mkdir()                    # a folder is no image
    refused(tmp_path / "set", "no images in", ".png, .jpg")
    refused(zip_of(tmp_path / "set.zip", {"dataset.json": b"{}", "a.txt": b""}), "no images in")
    # A checkpoint is a zip as well, one that holds a pickle.
    torch.save({"a": torch.zeros(2)}, tmp_path / "some.pt")
    refused(tmp_path / "some.pt", "no images in")


def test_a_zip_is_opened_once_and_each_image_is_read_once_in_a_pass(tmp_path, monkeypatch):
    path, opened, read = zip_of(tmp_path / "a.zip", FILES), [], []

    class Counted(zipfile.ZipFile):
        def __init__(self, *args):
            opened.append(args)
            super().__init__(*args)

        def read(self, name):
            read.append(name)
            return super().read(name)

    monkeypatch.setattr(real.zipfile, "ZipFile", Counted)
    images = real.open_images(str(path))
    read.clear()
    for _ in images.batches(2):
        pass
    assert len(opened) == 1 and sorted(read) == NAMES


def test_a_zip_with_any_damaged_byte_gives_images_that_were_stored_or_is_refused(tmp_path):
    files = {f"a/{i}.png": encoded(image) for i, image in enumerate(RGB)}
    files["dataset.json"] = labels_json([[name, 1] for name in files])
    whole = zip_of(tmp_path / "a.zip", files, zipfile.ZIP_DEFLATED).read_bytes()
    random_ = random.Random(0)
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[random_.randrange(len(whole))] ^= 1 << random_.randrange(8)
        (tmp_path / "b.zip").write_bytes(damaged)
        try:
            images = real.open_images(str(tmp_path / "b.zip"))
            pixels = images.take(range(len(images)))[0]
        except UserError as error:
            assert "b.zip" in str(error)
        else:                                   # the byte was in its list of names, or said nothing
            stored = {p.transpose(2, 0, 1).tobytes() for p in RGB}
            assert 1 <= len(pixels) <= 5 and {p.numpy().tobytes() for p in pixels} <= stored
    for length in random_.sample(range(len(whole)), 50):
        (tmp_path / "b.zip").write_bytes(whole[:length])
        refused(tmp_path / "b.zip")


def test_names_that_point_outside_a_zip_are_only_names(tmp_path):
    outside = {"../../evil.png": FILES[NAMES[0]], "/absolute.png": FILES[NAMES[1]]}
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    path = zip_of(folder / "a.zip", outside)
    before = files_below(tmp_path)
    assert len(real.open_images(str(path)).take([0, 1])[0]) == 2 and files_below(tmp_path) == before


def png_header(width, height, content=b""):
    def chunk(kind, body):
        sum_ = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", sum_)

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", content)
            + chunk(b"IEND", b""))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_or_a_member_that_unpacks_to_a_huge_size_is_refused(tmp_path, monkeypatch):
    lines = zlib.compress(bytes(5000 * 626))                    # 25 million pixels in 3 kB
    for size, content in ((5000, lines), (12_000, b""), (100_000, b"")):
        for path in both(tmp_path, f"bomb{size}", {"a.png": png_header(size, size, content)}):
            refused(path, "cannot read a.png as an image")
    monkeypatch.setattr(real, "LARGEST_FILE", 1 << 20)
    deflated = zip_of(tmp_path / "deflated.zip", {"a.png": bytes(2 << 20)}, zipfile.ZIP_DEFLATED)
    assert deflated.stat().st_size < 1 << 16
    refused(deflated, f"it would have {2 << 20} bytes")


def test_images_must_be_what_the_network_makes(tmp_path):
    digits = real.open_images("digits")

    def network(shape=(1, 8, 8), classes=10):
        return SimpleNamespace(shape=shape, conditions=classes_as_conditions(classes))

    real.check_fits(digits, network())
    real.check_fits(digits, network(classes=0))               # its classes are then not used
    unlabelled = real.open_images(str(folder_of(tmp_path / "a", FILES)))
    for images, one, message in [
            (digits, network((3, 8, 8)), "digits has images of shape [1, 8, 8], the teacher makes "
                                         "[3, 8, 8]"),
            (digits, network(classes=9), "digits has class 9, out of range: the teacher knows 0 "
                                           "to 8"),
            (unlabelled, network((3, 6, 4)), "has no classes")]:
        with pytest.raises(UserError) as caught:
            real.check_fits(images, one)
        assert message in str(caught.value)


# ---- The teacher's noise-image pairs ----

CPU = torch.device("cpu")
PARTS = [range(0, 4), range(4, 8), range(8, 10)]


@pytest.fixture
def teacher(monkeypatch):
    monkeypatch.setattr(noise_pairs, "PAIRS_PART", 4)
    return small_network(model_channels=8)


def open_pairs(teacher, folder, count=10, steps=3, batch=2, stop=None):
    folder.mkdir(exist_ok=True)
    stop = stop or SimpleNamespace(received=None)
    digest = weights_digest(teacher.state_dict())
    return noise_pairs.noise_image_pairs(teacher, digest, count, steps, folder, batch, CPU, stop)


def make(*args, **how):
    """z, image, class of all the pairs."""
    pairs = open_pairs(*args, **how)
    return pairs.take(range(len(pairs)))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_pair_is_the_noise_of_its_seed_and_what_the_teacher_makes_of_it(teacher, tmp_path):
    z, y, classes = make(teacher, tmp_path)
    seeds = range(noise_pairs.FIRST_SEED, noise_pairs.FIRST_SEED + 10)
    drawn = SeededNoise(seeds, (1, 8, 8), CPU)
    assert seeds[0] > 100 * 50_000                              # no image that is scored
    assert torch.equal(z, drawn()) and torch.equal(classes, drawn.indices(10))
    one_hot = torch.nn.functional.one_hot(classes, 10).float()
    again = sample_heun(teacher, z, one_hot, steps=3)
    assert y.dtype == torch.float16 and y.std() > 0.05
    assert len({t.numpy().tobytes() for t in y}) == 10
    assert torch.allclose(y.float(), again, rtol=2e-3, atol=2e-3)


def test_a_pair_depends_on_its_seed_alone(teacher, tmp_path):
    whole = make(teacher, tmp_path / "a", batch=10)
    for folder, count, batch in (("b", 10, 1), ("c", 10, 3), ("d", 6, 4)):
        z, y, classes = make(teacher, tmp_path / folder, count=count, batch=batch)
        assert torch.equal(z, whole[0][:count]) and torch.equal(classes, whole[2][:count])
        # Another batch size may add up in another order: the last bit of a float16.
        assert torch.allclose(y.float(), whole[1][:count].float(), rtol=2e-3, atol=1e-3)
    unlabelled = make(small_network(model_channels=8, label_dim=0), tmp_path / "e")
    assert torch.equal(unlabelled[0], whole[0]) and not unlabelled[2].any()


def test_pairs_are_taken_in_any_order_from_any_part(teacher, tmp_path):
    pairs = open_pairs(teacher, tmp_path)
    whole, chosen = pairs.take(range(10)), [9, 0, 4, 9, 7, 3]
    assert len(pairs) == 10 and [len(part) for part in pairs.parts] == [4, 4, 2]
    assert same(pairs.take(chosen), [x[chosen] for x in whole])


def test_a_part_of_a_slow_sampler_has_fewer_pairs(teacher, tmp_path, monkeypatch):
    whole = make(teacher, tmp_path / "a")
    monkeypatch.setattr(noise_pairs, "PART_EVALUATIONS", 12)    # of 5 for each pair
    pairs = open_pairs(teacher, tmp_path / "b")
    assert [len(part) for part in pairs.parts] == [2] * 5
    assert same(pairs.take(range(10)), whole)


def test_pairs_of_another_guidance_or_of_other_prompts_are_refused(teacher, tmp_path):
    whole = make(teacher, tmp_path / "a")
    for other in (Guided(teacher, 2.0), asked(teacher, "a cat"), asked(teacher, "a dog")):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        found = make(other, folder)
        assert same(found, whole) == (other is not whole and not isinstance(other, Guided))
        assert same(make(other, folder), found)
        for another in (Guided(teacher, 3.0), asked(teacher, "two cats")):
            with pytest.raises(UserError, match="was made with .* move it away to make it anew"):
                make(another, folder)


def asked(teacher, prompt):
    """As if its classes were prompts."""
    network = copy.deepcopy(teacher)
    network.conditions = network.conditions._replace(texts=[prompt] * 10)
    return network


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("parts", [0, 1, 2])
def test_pairs_made_with_an_interruption_equal_those_made_in_one_go(
        teacher, tmp_path, monkeypatch, parts):
    whole = make(teacher, tmp_path / "whole")
    real, made = kept.write_part, []

    def interrupted(folder, part, rows):
        if len(made) == parts:
            raise Interrupted
        made.append(part)
        real(folder, part, rows)

    with monkeypatch.context() as patched:
        patched.setattr(kept, "write_part", interrupted)
        with pytest.raises(Interrupted):
            make(teacher, tmp_path / "twice")
    # What a killed process was writing stays behind, and counts for nothing.
    left = tmp_path / "twice" / "pairs" / ".8-9-0123456789abcdef.npy.1.tmp"
    left.write_bytes(b"half a file")
    remade = []
    monkeypatch.setattr(kept, "write_part", lambda *args: (remade.append(args[1]), real(*args)))
    assert same(whole, make(teacher, tmp_path / "twice")) and made + remade == PARTS
    left.unlink()
    assert contents(tmp_path / "twice" / "pairs") == contents(tmp_path / "whole" / "pairs")
    assert len(contents(tmp_path / "whole" / "pairs")) == 4     # and about.json


def test_a_part_that_is_not_in_this_folder_was_made_in_another(tmp_path):
    with pytest.raises(RunFailed, match="lacks 0 to 9, which another process made: all need one"):
        kept.open_part(tmp_path, range(10))


def test_a_signal_stops_it_after_a_part_which_is_kept(teacher, tmp_path, monkeypatch, capsys):
    whole = make(teacher, tmp_path / "whole")
    stop, real, made = SimpleNamespace(received=None), kept.write_part, []

    def signalled(folder, part, rows):
        made.append(part)
        real(folder, part, rows)
        stop.received = "SIGTERM" if len(made) == 2 else None

    monkeypatch.setattr(kept, "write_part", signalled)
    with pytest.raises(SystemExit) as left:
        make(teacher, tmp_path / "a", stop=stop)
    assert left.value.code == 3 and "the same command goes on" in capsys.readouterr().out
    assert same(whole, make(teacher, tmp_path / "a")) and made == PARTS


def test_pairs_are_kept_and_used_again_and_never_for_what_would_make_others(
        teacher, tmp_path, monkeypatch):
    first = make(teacher, tmp_path)
    before = contents(tmp_path / "pairs")
    with monkeypatch.context() as patched:
        patched.setattr(noise_pairs, "make_pairs", None)               # nothing may be made
        assert same(first, make(teacher, tmp_path, batch=3))
    other_teacher = small_network(seed=1, model_channels=8)
    for network, how, said in ((teacher, dict(count=11), "'count': 10"),
                               (teacher, dict(steps=4), "'steps': 3"),
                               (other_teacher, {}, "'teacher': ")):
        with pytest.raises(UserError, match="move it away to make it anew") as caught:
            make(network, tmp_path, **how)
        assert said in str(caught.value) and str(tmp_path / "pairs") in str(caught.value)
    monkeypatch.setattr(noise_pairs, "FIRST_SEED", 7)
    with pytest.raises(UserError, match="'first_seed': 1000000000"):
        make(teacher, tmp_path)
    assert contents(tmp_path / "pairs") == before


def test_more_parts_are_held_than_files_may_be_open_at_first(teacher, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 9, hard))
    try:
        assert len(make(teacher, tmp_path, count=48)[0]) == 48         # 12 parts
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_parts_left_by_a_run_that_wanted_fewer_pairs_are_refused(teacher, tmp_path, monkeypatch):
    real = kept.write_part

    def one_part(folder, part, rows):
        if part[0]:
            raise Interrupted
        real(folder, part, rows)

    with monkeypatch.context() as patched:
        patched.setattr(kept, "write_part", one_part)
        with pytest.raises(Interrupted):
            make(teacher, tmp_path, count=6)                    # parts of 4 and 2
    with pytest.raises(UserError, match="this run wants .*'count': 12"):
        make(teacher, tmp_path, count=12)


def bomb(folder):
    """A pickle that makes a file when it is run."""
    class Explodes:
        def __reduce__(self):
            return open, (str(folder / "exploded"), "w")

    return pickle.dumps(Explodes())


def bomb_array(folder):
    """An .npy of objects, whose pickle makes a file when it is run."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": ()})
    return head.getvalue() + bomb(folder)


def test_a_damaged_part_says_to_move_it_away_and_runs_nothing_and_is_made_again(teacher, tmp_path):
    right = make(teacher, tmp_path)
    (path,) = (tmp_path / "pairs").glob("4-7-*.npy")
    whole = path.read_bytes()
    damaged = [b"", whole[:-1], whole[:len(whole) // 2], whole + b"\0", bomb(tmp_path),
               bomb_array(tmp_path)]
    random_ = random.Random(0)
    for position in [*range(0, 128, 7), *random_.sample(range(len(whole)), 100)]:
        flipped = bytearray(whole)
        flipped[position] ^= 1 << random_.randrange(8)
        damaged.append(flipped)
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError, match="4-7-.* is damaged .* move it away") as caught:
            make(teacher, tmp_path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.rename(tmp_path / "away")
    assert same(right, make(teacher, tmp_path)) and path.read_bytes() == whole
    assert not (tmp_path / "exploded").exists()


def test_a_part_with_a_right_name_and_objects_in_it_is_refused_and_runs_nothing(teacher, tmp_path):
    make(teacher, tmp_path)
    (path,) = (tmp_path / "pairs").glob("4-7-*.npy")
    path.unlink()
    for content in (bomb(tmp_path), bomb_array(tmp_path)):
        digest = hashlib.sha256(content).hexdigest()[:16]
        path = tmp_path / "pairs" / f"4-7-{digest}.npy"
        path.write_bytes(content)
        with pytest.raises(UserError, match="4-7-.* is damaged"):
            make(teacher, tmp_path)
        path.unlink()
    assert not (tmp_path / "exploded").exists()


def test_two_processes_share_the_parts_and_make_the_same_pairs(teacher, tmp_path, monkeypatch):
    alone = make(teacher, tmp_path / "alone")
    real, made = kept.write_part, {0: [], 1: []}
    monkeypatch.setattr(distributed, "world_size", lambda: 2)

    def as_rank(rank, at_barrier):
        """Up to where this rank has made its parts, and its barrier says what comes then."""
        waits = []

        def part(*args):
            made[rank].append(args[1])
            real(*args)

        monkeypatch.setattr(kept, "write_part", part)
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "barrier",
                            lambda: waits.append(None) or at_barrier(len(waits)))
        return make(teacher, tmp_path / "shared")

    def until_both_have_made(waits):
        if waits == 2:
            raise Interrupted

    for rank in (0, 1):
        with pytest.raises(Interrupted):
            as_rank(rank, until_both_have_made)
    assert made == {0: [PARTS[0], PARTS[2]], 1: [PARTS[1]]}
    for rank in (0, 1):
        assert same(alone, as_rank(rank, lambda waits: None))
    assert made == {0: [PARTS[0], PARTS[2]], 1: [PARTS[1]]}     # nothing anew
    assert contents(tmp_path / "shared" / "pairs") == contents(tmp_path / "alone" / "pairs")


def test_a_folder_that_cannot_be_made_ends_the_run_in_one_line(teacher, tmp_path):
    (tmp_path / "pairs").write_text("")
    with pytest.raises(RunFailed, match="cannot make .*pairs: File exists"):
        make(teacher, tmp_path)


def test_no_reader_of_images_or_pairs_asks_pickle_for_anything(teacher, tmp_path, monkeypatch):
    sources = ["digits", archive(tmp_path / "a.tar.gz", [("data_batch_1.bin", records(2, 0)[0])]),
               *both(tmp_path, "set", FILES)]

    def forbidden(*args, **kwargs):
        raise AssertionError("pickle was asked to read")

    for name in ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads"):
        monkeypatch.setattr(pickle, name, forbidden)
    for source in sources:
        assert len(real.open_images(str(source)).take([0])[0]) == 1
    make(teacher, tmp_path)
    make(teacher, tmp_path)
