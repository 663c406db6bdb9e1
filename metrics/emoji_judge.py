"""The small classifier that says what stands in a picture of emoji, and on which background.

    python -m metrics.emoji_judge      trains it (minutes on one core), writes assets/emoji/judge.pt

A picture is right if it shows everything that its caption says and nothing else. Lumps count as
something else: in training, emoji that are melted, blurred away or half another's are named such.
Its penultimate features stand in for Inception's: a Frechet distance in them is emoji-FID, good for
comparing models of these pictures, comparable with no published FID.
"""

import io

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

from base.errors import Parser, run
from base.files import write_atomically
from images import emoji
from metrics.inception import in_chunks, load_trained

WEIGHTS = emoji.GLYPHS.with_name("judge.pt")
COUNTS = 3                                  # how many things stand there: none, one, two
SPOILT = 0.2                                # the share of emoji that training spoils


class EmojiNetwork(nn.Module):
    """uint8 [B,3,32,32] -> features [B,192], logits; the interface of Inception.

    The logits are in four parts: each emoji is there (sigmoid), something else is (sigmoid), the
    background (softmax), how many things there are (softmax).
    """

    name, dimensions, sha256 = "emoji-judge", 192, None
    metric, share = "emoji-FID", "right_picture"

    def __init__(self):
        super().__init__()
        self.parts = len(emoji.names()), 1, len(emoji.COLOURS), COUNTS
        widths, strides = (3, 24, 32, 48, 64, 96, 96), (1, 2, 1, 2, 1, 1)       # 32x32 -> 8x8
        self.layers = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(a, b, 2 + s, s, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b, s in zip(widths, widths[1:], strides)))
        self.name_places = nn.Conv2d(96, self.parts[0], 1)
        self.sum_up = nn.Sequential(nn.Linear(192, 96), nn.ReLU(),
                                    nn.Linear(96, sum(self.parts[1:])))

    def describe(self, x):
        """Features [B,192] and logits of float images in [-1,1]."""
        x = self.layers(x)                                              # [B,96,8,8]
        features = torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)
        # The same weights look at every place, so what stands beside an emoji does not matter
        there = self.name_places(x).amax((2, 3))
        return features, torch.cat([there, self.sum_up(features)], 1)

    def forward(self, images):
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, got {images.dtype}")
        if tuple(images.shape[1:]) != (3, emoji.SIDE, emoji.SIDE):
            raise ValueError(f"pictures of emoji are [B,3,32,32], got {list(images.shape)}")
        return in_chunks(self._chunk, images.to(self.name_places.weight.device), 256)

    def _chunk(self, images):
        return self.describe(images.to(self.name_places.weight.dtype) / 127.5 - 1)

    def seen(self, logits):
        """(bool [B,emoji] which are there, bool [B] something else is, background, how many)."""
        there, other, background, count = logits.split(self.parts, 1)
        return there > 0, other[:, 0] > 0, background.argmax(1), count.argmax(1)

    def right(self, logits, captions):
        """bool [B]: the picture shows all that its caption says and nothing else."""
        there, other, background, count = (part.cpu() for part in self.seen(logits))
        verdicts = []
        for i, (asked, colour) in enumerate(map(emoji.parse, captions)):
            verdicts.append(set(there[i].nonzero()[:, 0].tolist()) == set(asked)
                            and not other[i] and count[i] == len(asked)
                            and (colour is None or background[i] == colour))
        return torch.tensor(verdicts).bool()


def load_emoji_network(device="cpu"):
    return load_trained(EmojiNetwork(), WEIGHTS, "accuracy").to(device)        # by kind of picture


# What it learns from ------------------------------------------------------------------------


def any_scenes(count, rng):
    """Of every kind, held out or not; a few are empty, lack one of two, or show one twice."""
    sorts = [emoji.draw_scenes(count, rng, kind) for kind in emoji.KINDS]
    # One and two alike, and all that can be asked for about equally often
    shares = torch.tensor([0.44, 0.44, 0.06, 0.06])
    sort = torch.multinomial(shares, count, replacement=True, generator=rng)
    scenes = emoji.Scenes(*(torch.stack(parts)[sort, torch.arange(count)] for parts in zip(*sorts)))
    shown, chance = scenes.emoji.clone(), torch.rand(count, generator=rng)
    two = shown[:, 1] >= 0
    same, lacking, empty = two & (chance < 0.1), two & (chance > 0.9), ~two & (chance < 0.1)
    shown[same, 1] = shown[same, 0]
    side = torch.randint(2, (count,), generator=rng)
    shown[lacking, side[lacking]] = -1
    shown[empty] = -1
    return scenes._replace(emoji=shown)


def blurred(layer, width):
    """By a Gaussian of its own standard deviation [B] in pixels each."""
    apart = torch.arange(emoji.SIDE)[:, None] - torch.arange(emoji.SIDE)
    kernel = torch.exp(-apart.square() / (2 * width.clamp_min(0.1).square()[:, None, None]))
    middle = kernel[:, emoji.SIDE // 2].sum(1)[:, None, None]           # far from the border
    kernel = (kernel / middle)[:, None]
    return kernel @ layer @ kernel


def warped(layer, strength, rng):
    """By a smooth random field of this standard deviation [B] in pixels."""
    coarse = torch.randn(len(layer), 2, 6, 6, generator=rng) * strength[:, None, None, None]
    move = F.interpolate(coarse, emoji.SIDE, mode="bicubic").permute(0, 2, 3, 1) * 2 / emoji.SIDE
    still = F.affine_grid(torch.eye(2, 3).expand(len(layer), 2, 3), layer.shape,
                          align_corners=False)
    return F.grid_sample(layer, still + move, align_corners=False)


def before_middle(inside):
    """bool [B,32]: before the mean position of those that are inside."""
    position = torch.arange(emoji.SIDE)
    return position < ((inside * position).sum(1) / inside.sum(1).clamp_min(1))[:, None]


def spoilt(layer, other, size, rng):
    """Lumps: blurred away, melted, a little of both, blended with another emoji, half another."""
    B = len(layer)
    amount = torch.rand(B, generator=rng)
    share = (0.35 + 0.3 * amount)[:, None, None, None]
    upper, left = (before_middle((layer[:, 3] > 0.5).any(axis)) for axis in (2, 1))    # [B,32]
    half = torch.where(torch.rand(B, 1, 1, generator=rng) < 0.5, upper[:, :, None],
                       left[:, None, :])[:, None]
    both = blurred(layer, size * (0.07 + 0.05 * amount))
    choices = torch.stack([blurred(layer, size * (0.1 + 0.1 * amount)),
                           warped(layer, size * (0.1 + 0.12 * amount), rng),
                           warped(both, size * (0.07 + 0.05 * amount), rng),
                           layer * share + other * (1 - share),
                           torch.where(half, layer, other)])
    return choices[torch.randint(len(choices), (B,), generator=rng), torch.arange(B)]


def lesson(count, rng):
    """Float images in [-1,1], and what stands there: the targets of the four parts."""
    scenes = any_scenes(count, rng)
    strangers = scenes._replace(emoji=torch.randint(len(emoji.names()), (count, 2), generator=rng))
    colours = torch.tensor(list(emoji.BACKGROUNDS.values())) / 255.0
    x = colours[scenes.background][:, :, None, None].expand(-1, -1, emoji.SIDE, emoji.SIDE)
    there, other = torch.zeros(count, len(emoji.names()) + 1), torch.zeros(count)
    for k in range(2):
        shown, size = scenes.emoji[:, k], torch.tensor(emoji.SIZES)[scenes.size[:, k]].float()
        # What a decoder may do is done to lumps too: being sharp must not tell them
        worn = (torch.rand(count, generator=rng) < 0.7) * size
        soft, bent = (0.04 * worn * torch.rand(count, generator=rng),
                      0.03 * worn * torch.rand(count, generator=rng))
        layer, stranger = (warped(blurred(
            emoji.place(s, k).permute(0, 3, 1, 2).float() / 255, soft), bent, rng)
            for s in (scenes, strangers))
        lump = (shown >= 0) & (shown != strangers.emoji[:, k])
        lump &= torch.rand(count, generator=rng) < SPOILT
        layer = torch.where(lump[:, None, None, None], spoilt(layer, stranger, size, rng), layer)
        x = x * (1 - layer[:, 3:]) + layer[:, :3]
        there[torch.arange(count), torch.where(lump, -1, shown)] = 1    # -1: nothing to name
        other = torch.maximum(other, lump.float())
    tint = 1 + 0.04 * torch.randn(count, 3, 1, 1, generator=rng)
    grain = 0.03 * torch.rand(count, 1, 1, 1, generator=rng)
    x = (x * tint + grain * torch.randn(x.shape, generator=rng)).clamp(0, 1)
    return x * 2 - 1, (there[:, :-1], other[:, None], scenes.background,
                       (scenes.emoji >= 0).sum(1))


def lesson_loss(network, x, targets):
    there, other, background, count = network.describe(x)[1].split(network.parts, 1)
    yes_or_no = F.binary_cross_entropy_with_logits
    return (yes_or_no(there, targets[0], reduction="sum") / len(x) + yes_or_no(other, targets[1])
            + F.cross_entropy(background, targets[2]) + F.cross_entropy(count, targets[3]))


def train(steps=1800, batch=128, lr=4e-3):
    """An EmojiNetwork; the same weights on every call."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    network = EmojiNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    for _ in (bar := trange(steps, desc="training the judge", mininterval=20)):
        loss = lesson_loss(network, *lesson(batch, rng))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix({"loss": f"{loss.item():.3f}"}, refresh=False)
    return network.eval().requires_grad_(False)


def accuracies(network, count, seed):
    """The share of fresh real pictures found right, by kind, and of lumps refused."""
    rng = torch.Generator().manual_seed(seed)
    figures = {}
    for kind in emoji.KINDS:
        scenes = emoji.draw_scenes(count, rng, kind)
        verdicts = network.right(network(emoji.paint(scenes))[1], emoji.captions(scenes))
        figures[kind] = verdicts.double().mean().item()
    x, targets = lesson(4 * count, rng)
    images = ((x + 1) * 127.5).round().to(torch.uint8)[targets[1][:, 0] > 0]
    figures["lumps refused"] = network.seen(network(images)[1])[1].double().mean().item()
    return figures


def main():
    Parser(prog="python -m metrics.emoji_judge", description="Train the judge anew.").parse_args()
    torch.set_num_threads(1)  # sums split over threads round differently; one core is quick enough
    network = train()
    network.accuracy = accuracies(network, 2000, seed=1)
    saved = io.BytesIO()
    torch.save({**{k: v.half() if v.is_floating_point() else v
                   for k, v in network.state_dict().items()}, "accuracy": network.accuracy}, saved)
    write_atomically(WEIGHTS, lambda temporary: temporary.write_bytes(saved.getvalue()))
    print("right:", ", ".join(f"{kind} {value:.4f}" for kind, value in network.accuracy.items()),
          f"; wrote {WEIGHTS}")


if __name__ == "__main__":
    run(main)
