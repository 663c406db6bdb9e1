"""Emoji on coloured backgrounds, and captions that say what stands on them; composed on the fly.

A picture holds one emoji, or two of half its width: the one named first stands on the left. Some
combinations are never drawn for training, by a fixed rule, so that they can be asked for later: an
emoji on a background, and two emoji together. Everything is drawn from the generator given.

The emoji are Noto Color Emoji's (Copyright Google, Apache License 2.0), rendered once by
`python -m experiments.make_emoji glyphs`.
"""

import re
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from base.files import ASSETS

GLYPHS = ASSETS / "emoji" / "glyphs.npz"
SIDE = 32                                   # pixels of a picture
ALONE, TOGETHER = (20, 22, 24, 26, 28), 16  # sides of an emoji: one of these alone, this beside one
SIZES = (TOGETHER, *ALONE)
BACKGROUNDS = {"white": (246, 246, 246), "yellow": (252, 226, 92), "orange": (250, 170, 90),
               "pink": (252, 176, 200), "purple": (176, 136, 226), "blue": (112, 172, 246),
               "green": (128, 206, 122), "gray": (148, 154, 164)}
COLOURS = tuple(BACKGROUNDS)
KINDS = ("one", "two", "unseen background", "unseen pair")
PICTURES, PICTURES_SEED = 40_000, 4         # the real ones, of a teacher and of the reference
CAPTIONS_SEED = 11                          # of what a student is trained on, and scored at
BLOCK = 10_000                              # scenes drawn at a time: fewer are the first of more
WORDINGS = ("{emoji} on {a_colour} background", "{emoji} on {colour}",
            "{a_colour} background with {emoji}", "{emoji}, {colour} background")

# What is drawn where nothing is asked for; of the last two a part was never seen in training
SHOWN = ("a fox and a lemon on a green background", "a balloon on purple", "a strawberry on pink",
         "a penguin and an umbrella on a blue background", "a cactus and a rainbow on white",
         "a frog and a crown, yellow background", "a panda on a white background",
         "a fox and a mushroom on a blue background")


class Scenes(NamedTuple):
    """What stands in N pictures: the left emoji first; index -1 where there is no second."""

    emoji: torch.Tensor         # [N,2]
    background: torch.Tensor    # [N]
    size: torch.Tensor          # [N,2], index into SIZES
    x: torch.Tensor             # [N,2], left edge
    y: torch.Tensor             # [N,2], upper edge
    mirrored: torch.Tensor      # [N,2]
    wording: torch.Tensor       # [N]

    def take(self, index):
        return Scenes(*(part[index] for part in self))


@cache
def names():
    """The emoji by name, in the order of their indices."""
    with np.load(GLYPHS, allow_pickle=False) as file:
        return tuple(str(name) for name in file["names"])


@cache
def glyphs():
    """[emoji, size, 32, 32, RGBA] in 0..255, premultiplied, at the upper left of its square."""
    with np.load(GLYPHS, allow_pickle=False) as file:
        large = file["images"]                                          # [G,48,48,4]
    bank = np.zeros((len(large), len(SIZES), SIDE, SIDE, 4), np.uint8)
    for g, pixels in enumerate(large):
        image = Image.fromarray(pixels, "RGBA").convert("RGBa")
        for s, size in enumerate(SIZES):
            bank[g, s, :size, :size] = image.resize((size, size), Image.Resampling.HAMMING)
    return torch.from_numpy(bank)


# What may be asked for ----------------------------------------------------------------------


def held_background(emoji, background):
    """Whether this emoji on this background is never drawn for training: one in eight."""
    return background == (3 * emoji + 5) % len(COLOURS)


def held_pair(first, second):
    """Whether these two emoji are never drawn together for training: about one in eight."""
    return (first + second) % 8 == 3


@cache
def combinations(kind):
    """int64 [M,3], all (left emoji, right emoji or -1, background) of one of KINDS."""
    G, B = len(names()), len(COLOURS)
    if kind in ("one", "unseen background"):
        e, b = torch.cartesian_prod(torch.arange(G), torch.arange(B)).T
        chosen = held_background(e, b) == (kind == "unseen background")
        return torch.stack([e, torch.full_like(e, -1), b], 1)[chosen]
    i, j, b = torch.cartesian_prod(torch.arange(G), torch.arange(G), torch.arange(B)).T
    chosen = (i != j) & ~held_background(i, b) & ~held_background(j, b)
    return torch.stack([i, j, b], 1)[chosen & (held_pair(i, j) == (kind == "unseen pair"))]


def draw_scenes(count, rng, kind="training"):
    """Scenes of one of KINDS; of "training": "one" and "two", half of each."""
    def below(high, *shape):
        return torch.randint(high, (count, *shape), generator=rng)

    if kind == "training":
        one, two = combinations("one"), combinations("two")
        chosen = torch.where(below(2, 1) == 0, one[below(len(one))], two[below(len(two))])
    else:
        table = combinations(kind)
        chosen = table[below(len(table))]
    alone = chosen[:, 1] < 0
    size = torch.where(alone, 1 + below(len(ALONE)), 0)
    room = SIDE - torch.tensor(SIZES)[size]
    place = (torch.rand(count, 2, generator=rng) * (room[:, None] + 1)).long()      # alone
    x = torch.where(alone[:, None], place[:, :1], torch.tensor([0, TOGETHER]))
    # Side by side, each within four pixels of the middle
    y = torch.where(alone[:, None], place[:, 1:], TOGETHER // 2 - 4 + below(9, 2))
    return Scenes(chosen[:, :2], chosen[:, 2], size[:, None].expand(-1, 2), x, y,
                  below(2, 2) == 1, below(len(WORDINGS)))


def first_scenes(count, seed, kind="training"):
    """The first `count` of one endless list of scenes."""
    rng = torch.Generator().manual_seed(seed)
    blocks = [draw_scenes(BLOCK, rng, kind) for _ in range(-(-count // BLOCK))]
    return Scenes(*(torch.cat(parts)[:count] for parts in zip(*blocks)))


# Pictures -----------------------------------------------------------------------------------


def paint(scenes):
    """uint8 [N,3,32,32]."""
    colours = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)
    canvas = colours[scenes.background][:, None, None, :].expand(-1, SIDE, SIDE, 3)
    for k in range(2):
        layer = place(scenes, k).float()
        canvas = canvas * (1 - layer[..., 3:] / 255) + layer[..., :3]
    return canvas.round().clamp(0, 255).to(torch.uint8).permute(0, 3, 1, 2).contiguous()


def place(scenes, k):
    """The k-th emoji of each scene alone on a transparent canvas, premultiplied [N,32,32,RGBA];
    nothing where it is -1."""
    emoji, size, x, y, mirrored = (part[:, k] for part in (
        scenes.emoji, scenes.size, scenes.x, scenes.y, scenes.mirrored))
    side = torch.tensor(SIZES)[size][:, None]
    rows, columns = (torch.arange(SIDE) - edge[:, None] for edge in (y, x))         # [N,32]
    inside = [(p >= 0) & (p < side) & (emoji >= 0)[:, None] for p in (rows, columns)]
    columns = torch.where(mirrored[:, None], side - 1 - columns, columns)
    # The last row and column of a glyph's square are transparent at every size
    rows, columns = (torch.where(i, p, SIDE - 1) for i, p in zip(inside, (rows, columns)))
    return glyphs()[emoji[:, None, None], size[:, None, None], rows[:, :, None],
                    columns[:, None, :]]


# Captions -----------------------------------------------------------------------------------


def with_article(name):
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def captions(scenes):
    """One for each scene, such as "a panda and a lemon on a yellow background"."""
    texts = []
    for emoji, colour, wording in zip(*(t.tolist() for t in (scenes.emoji, scenes.background,
                                                             scenes.wording))):
        said = " and ".join(with_article(names()[e]) for e in emoji if e >= 0)
        texts.append(WORDINGS[wording].format(emoji=said, colour=COLOURS[colour],
                                              a_colour=with_article(COLOURS[colour])))
    return texts


@cache
def name_pattern():
    longest_first = sorted(names(), key=len, reverse=True)
    return re.compile(r"\b(" + "|".join(map(re.escape, longest_first)) + r")\b")


def parse(caption):
    """(the emoji's indices in the order of naming, the background's index or None)."""
    text = caption.lower()
    emoji = tuple(names().index(found) for found in name_pattern().findall(text))
    # What is left once "red apple" and the like are gone
    colours = re.findall(r"\b(" + "|".join(COLOURS) + r")\b", name_pattern().sub("", text))
    return emoji, COLOURS.index(colours[-1]) if colours else None
