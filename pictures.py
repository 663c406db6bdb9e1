"""Grids of images as PNG: whole-pixel enlargement, optional labels."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from checkpoint import write_atomically


def grid(images, columns, scale=None, gap=1, row_labels=(), background=255):
    """uint8 [N,C,H,W] -> PIL image, row by row; enlarged by whole pixels, never blurred."""
    images = np.asarray(images)
    N, C, H, W = images.shape
    scale = scale or max(1, 48 // H)
    rows = -(-N // columns)
    cell_h, cell_w = H * scale + gap, W * scale + gap
    canvas = np.full((rows * cell_h + gap, columns * cell_w + gap, C), background, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * cell_h, gap + i % columns * cell_w
        big = image.transpose(1, 2, 0).repeat(scale, axis=0).repeat(scale, axis=1)
        canvas[top:top + H * scale, left:left + W * scale] = big
    picture = Image.fromarray(canvas[..., 0] if C == 1 else canvas)
    if not row_labels:
        return picture
    return add_row_labels(picture, row_labels, rows, cell_h, gap, background)


def add_row_labels(picture, labels, rows, cell_h, gap, background):
    """A column of text at the left, one label for each row or for each block of rows."""
    font = ImageFont.load_default(size=13)
    width = max(int(font.getlength(label)) for label in labels) + 12
    wide = Image.new(picture.mode, (picture.width + width, picture.height), background)
    wide.paste(picture, (width, 0))
    draw, block = ImageDraw.Draw(wide), rows / len(labels) * cell_h
    for i, label in enumerate(labels):
        draw.text((6, gap + i * block + block / 2), label, fill=0, font=font, anchor="lm")
    return wide


def save_png(picture, path):
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))
