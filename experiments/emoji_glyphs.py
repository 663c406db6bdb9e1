"""The emoji as pictures: rendered once from Noto Color Emoji into assets/emoji/glyphs.npz."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from base.errors import UserError
from base.files import write_atomically
from images import emoji

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109                             # the only one that the font's bitmaps have
GLYPH_SIDE = 48
EMOJI = {
    "red apple": "🍎", "banana": "🍌", "lemon": "🍋", "strawberry": "🍓", "watermelon": "🍉",
    "pineapple": "🍍", "grapes": "🍇", "carrot": "🥕", "broccoli": "🥦", "avocado": "🥑",
    "mushroom": "🍄", "pizza": "🍕", "hamburger": "🍔", "donut": "🍩", "fried egg": "🍳",
    "ice cream": "🍦", "fox": "🦊", "panda": "🐼", "frog": "🐸", "pig": "🐷", "lion": "🦁",
    "koala": "🐨", "chick": "🐤", "penguin": "🐧", "owl": "🦉", "turtle": "🐢", "octopus": "🐙",
    "crab": "🦀", "fish": "🐠", "bee": "🐝", "ladybug": "🐞", "snail": "🐌", "unicorn": "🦄",
    "sunflower": "🌻", "rose": "🌹", "cactus": "🌵", "fir tree": "🎄", "maple leaf": "🍁",
    "rocket": "🚀", "car": "🚗", "tractor": "🚜", "balloon": "🎈", "gift": "🎁", "umbrella": "☂",
    "guitar": "🎸", "bell": "🔔", "crown": "👑", "diamond": "💎", "heart": "❤", "star": "⭐",
    "flame": "🔥", "snowman": "⛄", "skull": "💀", "ghost": "👻", "robot": "🤖", "alien": "👽",
    "soccer ball": "⚽", "basketball": "🏀", "book": "📕", "house": "🏠", "alarm clock": "⏰",
    "light bulb": "💡", "globe": "🌍", "rainbow": "🌈",
}


def render(symbol, font):
    """One emoji as RGBA, its longer side filling the square, in the middle of it."""
    canvas = Image.new("RGBA", (200, 200))
    ImageDraw.Draw(canvas).text((20, 20), symbol, font=font, embedded_color=True)
    drawn = canvas.crop(canvas.getbbox()).convert("RGBa")       # premultiplied: no dark fringe
    scale = GLYPH_SIDE / max(drawn.size)
    width, height = (max(1, round(side * scale)) for side in drawn.size)
    square = Image.new("RGBa", (GLYPH_SIDE, GLYPH_SIDE))
    square.paste(drawn.resize((width, height), Image.Resampling.LANCZOS),
                 ((GLYPH_SIDE - width) // 2, (GLYPH_SIDE - height) // 2))
    return np.asarray(square.convert("RGBA"))


def save_compressed(path, arrays):
    with open(path, "wb") as file:              # np.savez_compressed would add .npz to a name
        np.savez_compressed(file, **arrays)


def make_glyphs():
    if not FONT.is_file():
        raise UserError(f"no font at {FONT}: install fonts-noto-color-emoji")
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    images = np.stack([render(symbol, font) for symbol in EMOJI.values()])
    arrays = {"names": np.array(list(EMOJI)), "images": images}
    emoji.GLYPHS.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(emoji.GLYPHS, lambda temporary: save_compressed(temporary, arrays))
    print(f"{len(images)} emoji of {GLYPH_SIDE}x{GLYPH_SIDE} pixels in {emoji.GLYPHS}")
