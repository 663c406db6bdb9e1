"""Real images as they are stored and published, and the teacher's noise-image pairs."""

import io
import json
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from images import real
from training import noise_pairs
from base.errors import UserError
from helpers import small_network
from models import SeededNoise, sample_heun


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
    assert len(digits) == 1797 and digits.shape == (1, 8, 8) and digits.label_dim == 10
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
        assert len(images) == 20 and images.shape == (3, 32, 32) and images.label_dim == 10
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
    refused(tmp_path / "missing", "give digits, cifar10, a folder, a zip")


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
    shuffled = [[n, c] for n, c in zip(NAMES, classes)][::-1] + [["gone.png", 99]]
    files = FILES | {"dataset.json": labels_json(shuffled), "README.txt": b"no image"}
    for path in both(tmp_path, "set", files):
        images = real.open_images(str(path))
        assert len(images) == 5 and images.shape == (3, 6, 4) and images.label_dim == 8
        pixels, labels = images.take(range(5))
        assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), RGB)
        assert labels.tolist() == classes
        assert torch.equal(torch.cat([p for p, _ in images.batches(2)]), pixels)


def test_images_without_classes_have_label_dim_zero_and_zeros(tmp_path):
    for i, more in enumerate(({}, {"dataset.json": b'{"labels": null}'})):
        for path in both(tmp_path, f"set{i}", FILES | more):
            images = real.open_images(str(path))
            assert images.label_dim == 0 and images.take([1, 2])[1].tolist() == [0, 0]


@pytest.mark.parametrize("labels, message", [
    (labels_json([[n, 0] for n in NAMES[:-1]]), "gives z.webp the class None"),
    (labels_json([[n, -1] for n in NAMES]), "the class -1; allowed: whole numbers from 0"),
    (labels_json([[n, "2"] for n in NAMES]), "the class '2'"),
    (labels_json([[n, True] for n in NAMES]), "the class True"),
    (labels_json([[n, 1.0] for n in NAMES]), "the class 1.0"),
    (labels_json([[n, [0, 1]] for n in NAMES]), "the class [0, 1]"),
    (labels_json([[n, 2 ** 70] for n in NAMES]), f"the class {2 ** 70}"),
    (labels_json([]), "the class None"),
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

    def network(shape=(1, 8, 8), label_dim=10):
        return SimpleNamespace(image_shape=shape, label_dim=label_dim)

    real.check_fits(digits, network())
    real.check_fits(digits, network(label_dim=0))               # its classes are then not used
    unlabelled = real.open_images(str(folder_of(tmp_path / "a", FILES)))
    for images, one, message in [
            (digits, network((3, 8, 8)), "digits has images of shape [1, 8, 8], the teacher makes "
                                         "[3, 8, 8]"),
            (digits, network(label_dim=9), "digits has class 9, out of range: the teacher knows 0 "
                                           "to 8"),
            (unlabelled, network((3, 6, 4)), "has no classes")]:
        with pytest.raises(UserError) as caught:
            real.check_fits(images, one)
        assert message in str(caught.value)


# ---- The teacher's noise-image pairs ----

CPU = torch.device("cpu")


@pytest.fixture
def teacher(monkeypatch):
    monkeypatch.setattr(noise_pairs, "PAIRS_PART", 4)
    return small_network(model_channels=8)


def make(teacher, folder, count=10, steps=3, batch=2, stop=None):
    folder.mkdir(exist_ok=True)
    stop = stop or SimpleNamespace(received=None)
    return noise_pairs.noise_image_pairs(teacher, count, steps, folder, batch, CPU, stop)


def test_a_pair_is_the_noise_of_its_seed_and_what_the_teacher_makes_of_it(teacher, tmp_path):
    z, y, classes = make(teacher, tmp_path)
    seeds = range(noise_pairs.FIRST_SEED, noise_pairs.FIRST_SEED + 10)
    drawn = SeededNoise(seeds, (1, 8, 8), CPU)
    assert seeds[0] > 100 * 50_000                              # no image that is scored
    assert torch.equal(z, drawn()) and torch.equal(classes, drawn.classes(10))
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


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("parts", [0, 1, 2])
def test_pairs_made_with_an_interruption_equal_those_made_in_one_go(
        teacher, tmp_path, monkeypatch, parts):
    whole = make(teacher, tmp_path / "whole")
    real, made = noise_pairs.make_part, []

    def interrupted(teacher, seeds, *rest):
        if len(made) == parts:
            raise Interrupted
        made.append(seeds)
        real(teacher, seeds, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(noise_pairs, "make_part", interrupted)
        with pytest.raises(Interrupted):
            make(teacher, tmp_path / "twice")
    # What a killed process was writing stays behind, and counts for nothing.
    (tmp_path / "twice" / "pairs" / ".8-9-3.npz.1.tmp").write_bytes(b"half a file")
    remade = []
    monkeypatch.setattr(noise_pairs, "make_part",
                        lambda *args: (remade.append(args[1]), real(*args)))
    twice = make(teacher, tmp_path / "twice")
    assert made + remade == [range(0, 4), range(4, 8), range(8, 10)]
    assert all(torch.equal(a, b) for a, b in zip(whole, twice))
    assert files_below(tmp_path / "twice") == ["pairs.npz"]
    assert (tmp_path / "twice" / "pairs.npz").read_bytes() == (
        tmp_path / "whole" / "pairs.npz").read_bytes()


def test_a_signal_stops_it_after_a_part_which_is_kept(teacher, tmp_path, monkeypatch, capsys):
    whole = make(teacher, tmp_path / "whole")
    stop, real, made = SimpleNamespace(received=None), noise_pairs.make_part, []

    def signalled(teacher, seeds, *rest):
        made.append(seeds)
        real(teacher, seeds, *rest)
        stop.received = "SIGTERM" if len(made) == 2 else None

    monkeypatch.setattr(noise_pairs, "make_part", signalled)
    with pytest.raises(SystemExit) as left:
        make(teacher, tmp_path / "a", stop=stop)
    assert left.value.code == 3 and "the same command goes on" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(whole, make(teacher, tmp_path / "a")))
    assert made == [range(0, 4), range(4, 8), range(8, 10)]


def test_parts_left_by_a_run_that_wanted_fewer_pairs_are_not_taken_for_whole(
        teacher, tmp_path, monkeypatch):
    def before_joining(*args):
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(noise_pairs, "join_parts", before_joining)
        with pytest.raises(Interrupted):
            make(teacher, tmp_path / "a", count=6)              # parts of 4 and 2
    more = make(teacher, tmp_path / "a", count=12)
    assert all(torch.equal(x, y) for x, y in zip(more, make(teacher, tmp_path / "b", count=12)))


def test_pairs_are_kept_and_used_again_and_never_for_another_count_or_another_sampler(
        teacher, tmp_path, monkeypatch):
    first = make(teacher, tmp_path)
    stamp = (tmp_path / "pairs.npz").stat().st_mtime_ns
    with monkeypatch.context() as patched:
        patched.setattr(noise_pairs, "make_part", None)                # nothing may be made
        assert all(torch.equal(a, b) for a, b in zip(first, make(teacher, tmp_path)))
    for other in (dict(count=11), dict(steps=4)):
        with pytest.raises(UserError, match="move it away to make new pairs") as caught:
            make(teacher, tmp_path, **other)
        assert '"count": 10' in str(caught.value) and "pairs.npz" in str(caught.value)
    assert (tmp_path / "pairs.npz").stat().st_mtime_ns == stamp


def bomb(folder):
    """A pickle that makes a file when it is run."""
    class Explodes:
        def __reduce__(self):
            return open, (str(folder / "exploded"), "w")

    return pickle.dumps(Explodes())


def test_a_damaged_file_of_pairs_says_to_move_it_away_and_runs_nothing(teacher, tmp_path):
    make(teacher, tmp_path, count=4)
    path = tmp_path / "pairs.npz"
    whole = path.read_bytes()
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    objects = zip_of(tmp_path / "objects", {
        "about.npy": bomb_array(tmp_path), **{f"{k}.npy": array.getvalue() for k in ("z", "y")}})
    damaged = [b"", whole[:len(whole) // 2], b"PK" + bytes(50), array.getvalue(), bomb(tmp_path),
               objects.read_bytes(), objects.read_bytes()[:-30]]
    random_ = random.Random(0)
    for _ in range(200):
        flipped = bytearray(whole)
        flipped[random_.randrange(len(whole))] ^= 1 << random_.randrange(8)
        damaged.append(flipped)
    right = make(teacher, tmp_path, count=4)
    survived = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            pairs = make(teacher, tmp_path, count=4)
        except UserError as error:
            assert "pairs.npz" in str(error) and "move it away" in str(error)
        else:                                                   # a date, an attribute: no content
            survived += 1
            assert all(torch.equal(a, b) for a, b in zip(pairs, right))
    assert survived < 100 and not (tmp_path / "exploded").exists()


def bomb_array(folder):
    """An .npy of objects, whose pickle makes a file when it is run."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": ()})
    return head.getvalue() + bomb(folder)


def test_a_damaged_part_says_to_move_it_away(teacher, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(noise_pairs.distributed, "barrier",
                        lambda: (_ for _ in ()).throw(Interrupted()))
        with pytest.raises(Interrupted):
            make(teacher, tmp_path)
    (part,) = (tmp_path / "pairs").glob("4-7-*-3-*.npz")
    content = part.read_bytes()
    part.write_bytes(content[:-40])
    with pytest.raises(UserError, match="4-7-.* is damaged .* move it away, it will be made"):
        make(teacher, tmp_path)
    part.unlink()
    pairs = make(teacher, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(pairs, make(teacher, tmp_path / "other")))


def test_two_processes_share_the_parts_and_make_the_same_pairs(teacher, tmp_path, monkeypatch):
    alone = make(teacher, tmp_path / "alone")
    real, made = noise_pairs.make_part, {0: [], 1: []}
    monkeypatch.setattr(noise_pairs.distributed, "world_size", lambda: 2)

    class AtTheBarrier(BaseException):
        pass

    for rank in (1, 0):                         # the second rank first, up to where it waits
        def part(*args, mine=made[rank]):
            mine.append(args[1])
            real(*args)

        def barrier(rank=rank):
            if rank:
                raise AtTheBarrier

        monkeypatch.setattr(noise_pairs, "make_part", part)
        monkeypatch.setattr(noise_pairs.distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(noise_pairs.distributed, "barrier", barrier)
        if rank:
            with pytest.raises(AtTheBarrier):
                make(teacher, tmp_path / "shared")
    shared = make(teacher, tmp_path / "shared")
    assert made == {0: [range(0, 4), range(8, 10)], 1: [range(4, 8)]}
    assert all(torch.equal(a, b) for a, b in zip(alone, shared))


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
