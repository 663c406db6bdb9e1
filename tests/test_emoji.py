"""The pictures of emoji, their captions, what is held out of training, and their judge."""

import pytest
import torch

from images import emoji
from metrics.emoji_judge import lesson, load_emoji_network

ALL = ("training", *emoji.KINDS)


def draw(kind, count=300, seed=0):
    return emoji.draw_scenes(count, torch.Generator().manual_seed(seed), kind)


@pytest.fixture(scope="module")
def judge():
    return load_emoji_network()


@pytest.mark.parametrize("kind", ALL)
def test_a_seed_gives_the_same_pictures_and_captions_and_another_seed_others(kind):
    first, again, other = draw(kind), draw(kind), draw(kind, seed=1)
    assert torch.equal(emoji.paint(first), emoji.paint(again))
    assert emoji.captions(first) == emoji.captions(again)
    assert not torch.equal(emoji.paint(first), emoji.paint(other))


def test_a_picture_does_not_depend_on_its_batch():
    scenes = draw("training")
    some = torch.tensor([7, 250, 31])
    assert torch.equal(emoji.paint(scenes.take(some)), emoji.paint(scenes)[some])


@pytest.mark.parametrize("kind", ALL)
def test_a_caption_says_what_the_picture_shows(kind):
    scenes = draw(kind, 2000)
    for text, shown, background in zip(emoji.captions(scenes), scenes.emoji.tolist(),
                                       scenes.background.tolist()):
        assert emoji.parse(text) == (tuple(e for e in shown if e >= 0), background)


def test_parse_knows_an_apples_red_from_a_background():
    apple, fox = emoji.names().index("red apple"), emoji.names().index("fox")
    assert emoji.parse("A red apple on a blue background") == ((apple,), 5)
    assert emoji.parse("an orange background with a fox and a red apple") == ((fox, apple), 2)
    assert emoji.parse("a fox") == ((fox,), None)
    assert emoji.parse("") == ((), None)


def test_every_caption_has_its_right_article():
    scenes = draw("training", 2000)
    wrong = [t for t in emoji.captions(scenes) for a, b in zip(t.split(), t.split()[1:])
             if a in ("a", "an") and (a == "an") != (b[0] in "aeiou")]
    assert wrong == []


def test_what_is_held_out_is_never_drawn_for_training():
    scenes = draw("training", 20_000)
    held = emoji.held_background(scenes.emoji, scenes.background[:, None]) & (scenes.emoji >= 0)
    assert not held.any()
    two = scenes.emoji[:, 1] >= 0
    assert not emoji.held_pair(*scenes.emoji[two].T).any()
    assert 0.48 < two.double().mean() < 0.52


def test_the_held_out_kinds_hold_nothing_else():
    scenes = draw("unseen background")
    assert emoji.held_background(scenes.emoji[:, 0], scenes.background).all()
    scenes = draw("unseen pair")
    assert emoji.held_pair(*scenes.emoji.T).all()
    # ... and only that is unseen of it
    assert not emoji.held_background(scenes.emoji, scenes.background[:, None]).any()


def test_everything_is_seen_on_other_backgrounds_and_with_others():
    one, two = emoji.combinations("one"), emoji.combinations("two")
    G, B = len(emoji.names()), len(emoji.COLOURS)
    assert (torch.bincount(one[:, 0]) == B - 1).all()           # each lacks one background
    assert len(torch.bincount(one[:, 2])) == B
    partners = [len(two[two[:, 0] == e, 1].unique()) for e in range(G)]
    assert min(partners) >= G // 2
    held = len(emoji.combinations("unseen pair"))
    assert 0.08 < held / (held + len(two)) < 0.2


def test_there_are_sixty_emoji_that_differ_and_eight_backgrounds():
    assert len(set(emoji.names())) >= 60
    flat = emoji.glyphs()[:, -1].flatten(1).float()
    apart = torch.cdist(flat, flat) / flat.shape[1] ** 0.5 + 255 * torch.eye(len(flat))
    assert apart.min() > 20                                     # levels of 255, root mean square
    assert len(set(emoji.BACKGROUNDS.values())) == len(emoji.COLOURS) == 8


def test_emoji_stand_whole_inside_the_picture_and_do_not_overlap():
    scenes = draw("training", 2000)
    side = torch.tensor(emoji.SIZES)[scenes.size]
    for edge in (scenes.x, scenes.y):
        assert (edge >= 0).all() and (edge + side <= emoji.SIDE)[scenes.emoji >= 0].all()
    layers = [emoji.place(scenes, k)[..., 3] for k in range(2)]
    assert not ((layers[0] > 0) & (layers[1] > 0)).any()
    assert (layers[0] > 127).sum((1, 2)).min() > 20             # something is always there


def test_mirrored_is_the_mirror_image():
    one = emoji.Scenes(*(torch.tensor(v) for v in (
        [[3, -1]], [0], [[5, 5]], [[2, 0]], [[2, 0]], [[False, False]], [0])))
    other = one._replace(mirrored=torch.tensor([[True, True]]))
    assert torch.equal(emoji.paint(one).flip(3), emoji.paint(other))


@pytest.mark.parametrize("kind", emoji.KINDS)
def test_the_judge_finds_real_pictures_right(judge, kind):
    scenes = draw(kind, 1000, seed=5)
    right = judge.right(judge(emoji.paint(scenes))[1], emoji.captions(scenes))
    assert right.double().mean() >= max(0.98, judge.accuracy[kind]) - 0.01


def test_the_judge_refuses_wrong_captions(judge):
    """Another background, one emoji more, one fewer, one exchanged, one twice."""
    scenes = draw("two", 300)
    logits, (first, second) = judge(emoji.paint(scenes))[1], scenes.emoji.T
    third = (second + 1 + (second + 1 == first).long()) % len(emoji.names())
    third = torch.where(third == first, (third + 1) % len(emoji.names()), third)
    wrong = [scenes._replace(background=(scenes.background + 1) % 8),
             scenes._replace(emoji=torch.stack([first, torch.full_like(first, -1)], 1)),
             scenes._replace(emoji=torch.stack([first, third], 1)),
             scenes._replace(emoji=torch.stack([first, first], 1))]
    for other in wrong:
        assert judge.right(logits, emoji.captions(other)).double().mean() < 0.01
    one = draw("one", 300)
    logits = judge(emoji.paint(one))[1]
    more = one._replace(emoji=torch.stack([one.emoji[:, 0], (one.emoji[:, 0] + 1) % 64], 1))
    assert judge.right(logits, emoji.captions(more)).double().mean() < 0.01


def test_the_judge_refuses_lumps(judge):
    x, (_, other, _, _) = lesson(1000, torch.Generator().manual_seed(9))
    images = ((x + 1) * 127.5).round().to(torch.uint8)
    refused = judge.seen(judge(images)[1])[1]
    assert refused[other[:, 0] > 0].double().mean() > 0.8
    assert refused[other[:, 0] == 0].double().mean() < 0.05


def test_the_judges_features_do_not_depend_on_the_batch(judge):
    images = emoji.paint(draw("training", 20))
    assert torch.equal(judge(images)[0][:3], judge(images[:3])[0])
