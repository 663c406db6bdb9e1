"""Pictures: grids of images, enlarged by whole pixels, and the curves of a run."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from base.errors import UserError
from base.files import write_atomically

CURVES = ("distill", "unforget", "gan", "regression", "denoising", "discriminator",
          "student_gradient", "adapted_gradient", "image_mean", "image_spread")
LABEL_WIDTH = 24                # characters of a label before it is broken
COMPARED_COLUMNS = 10
GAP, WHITE = 1, 255             # between images, in pixels; of what is behind them


def grid(images, columns, scale=None, row_labels=(), column_labels=()):
    """uint8 [N,C,H,W] -> PIL image, row by row; enlarged by whole pixels, never blurred."""
    images = np.asarray(images)
    N, C, H, W = images.shape
    scale = scale or max(1, 48 // H)
    rows = -(-N // columns)
    cell_h, cell_w = H * scale + GAP, W * scale + GAP
    canvas = np.full((rows * cell_h + GAP, columns * cell_w + GAP, C), WHITE, np.uint8)
    for i, image in enumerate(images):
        top, left = GAP + i // columns * cell_h, GAP + i % columns * cell_w
        big = image.transpose(1, 2, 0).repeat(scale, axis=0).repeat(scale, axis=1)
        canvas[top:top + H * scale, left:left + W * scale] = big
    picture = Image.fromarray(canvas[..., 0] if C == 1 else canvas)
    if row_labels:
        picture = add_row_labels(picture, row_labels, rows, cell_h)
    return add_column_labels(picture, column_labels, cell_w)


def comparison(variants, texts):
    """Variants below each other, in blocks of at most ten columns; what is missing is blank."""
    count = len(variants[0])
    blocks = -(-count // COMPARED_COLUMNS)
    columns = -(-count // blocks)
    missing = np.full((blocks * columns - count, *variants[0].shape[1:]), WHITE, np.uint8)
    images = np.stack([np.concatenate([images, missing]) for images in variants])
    images = images.reshape(len(variants), blocks, columns, *images.shape[2:]).swapaxes(0, 1)
    return grid(images.reshape(-1, *images.shape[3:]), columns, row_labels=texts * blocks)


def add_row_labels(picture, labels, rows, cell_h):
    """A column of text at the left, one label for each row or for each block of rows."""
    font = ImageFont.load_default(size=13)
    labels = ["\n".join(textwrap.wrap(label, LABEL_WIDTH)) for label in labels]
    width = max(int(font.getlength(line)) for label in labels for line in label.split("\n")) + 12
    wide = with_margin(picture, width, 0)
    draw, block = ImageDraw.Draw(wide), rows / len(labels) * cell_h
    for i, label in enumerate(labels):
        draw.text((6, GAP + i * block + block / 2), label, fill=0, font=font, anchor="lm")
    return wide


def with_margin(picture, left, top):
    size = picture.width + left, picture.height + top
    wide = Image.new(picture.mode, size, (WHITE,) * len(picture.getbands()))
    wide.paste(picture, (left, top))
    return wide


def add_column_labels(picture, labels, cell_w):
    """A line of text on top, one label over each of the last columns."""
    if not labels:
        return picture
    font, height = ImageFont.load_default(size=13), 20
    tall = with_margin(picture, 0, height)
    draw, left = ImageDraw.Draw(tall), picture.width - cell_w * len(labels)
    for i, label in enumerate(labels):
        draw.text((left + (i + 0.5) * cell_w, height / 2), label, fill=0, font=font, anchor="mm")
    return tall


def save_png(picture, path):
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def matplotlib_pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("it needs matplotlib (pip install matplotlib)") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def draw_curves(lines, path):
    """The lines of metrics.jsonl as a picture, where matplotlib is installed."""
    try:
        plt = matplotlib_pyplot()
    except UserError as error:
        print(f"no curves.png: {error}")
        return
    names = [name for name in CURVES if any(name in line for line in lines)]
    fids = sorted({n for line in lines for n in line if "FID" in n})
    groups = [[n] for n in names] + [fids] * bool(fids)
    if not groups:
        return
    rows = -(-len(groups) // 4)
    figure, axes = plt.subplots(rows, 4, squeeze=False, figsize=(12, 2.3 * rows),
                                layout="constrained")
    for axis in axes.flat[len(groups):]:
        axis.axis("off")
    for axis, group in zip(axes.flat, groups):
        for name in group:
            points = [(line["iteration"], line[name]) for line in lines if name in line]
            axis.plot(*zip(*points), label=name, marker="." if "FID" in name else None, linewidth=1)
        axis.set_title(group[0] if group != fids else f"{fids[0].split('@')[0]} by steps",
                       fontsize=9)
        axis.tick_params(labelsize=7)
        if len(group) > 1:
            axis.legend(fontsize=7)
    write_atomically(path, lambda t: figure.savefig(t, format="png", dpi=100))
    plt.close(figure)
