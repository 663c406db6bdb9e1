"""Makes what the emoji need in assets/emoji/; the same command again goes on where it stopped.

    python -m experiments.make_emoji glyphs      the emoji, from Debian's fonts-noto-color-emoji
    python -m experiments.make_emoji vae         the autoencoder
    python -m experiments.make_emoji teacher     text encoder and U-Net
    python -m experiments.make_emoji pipeline    all of them in assets/emoji/pipeline
"""

import copy
import math
import re
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from base.errors import Parser, UserError, run
from images import emoji
from weights.checkpoint import write_atomically

WORK = Path("runs/emoji-pipeline")          # what is half done
PIPELINE = emoji.GLYPHS.with_name("pipeline")
POOL = 40_000                               # pictures whose latents are encoded once

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


# Training -----------------------------------------------------------------------------------


def generator(stream, k):
    """For iteration k of one of several streams: the same however often the run was stopped."""
    return torch.Generator().manual_seed(stream * 1_000_000_007 + k)


def to_float(images):
    return images.float() / 127.5 - 1


def to_uint8(x):
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def rate_of(k, iterations, hold):
    """One after a short warm-up until this share of all iterations, then a cosine to zero."""
    left = max(0, k / iterations - hold) / (1 - hold)
    return min(1, (k + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * left))


def train(name, networks, lr, iterations, loss_of, hold=0.0, ema=None, every=500):
    """Adam on the first of the losses, and averages of its weights; saved in WORK every so often.

    loss_of(k) -> a dict of losses, "loss" first, which is what falls.
    """
    path = WORK / f"{name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    trained = [p for network in networks for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr, betas=(0.9, 0.99), fused=True)
    stored = [*networks, *(ema or []), optimizer]
    first, spent = 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        first, spent = saved["iteration"], saved["seconds"]
        for part, state in zip(stored, saved["states"]):
            part.load_state_dict(state)
    start, tally = time.process_time() - spent, {}
    for k in range(first, iterations):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate_of(k, iterations, hold)
        losses = loss_of(k)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, error_if_nonfinite=True)
        optimizer.step()
        for kept, network in zip(ema or [], networks):
            update_ema(kept, network, min(0.999, (k + 1) / (k + 20)))
        for key, value in losses.items():
            tally.setdefault(key, []).append(value.detach())
        if (k + 1) % 100 == 0:
            means = {key: torch.stack(values).mean().item() for key, values in tally.items()}
            print(f"{name} {k + 1} {time.process_time() - start:.0f}s",
                  *(f"{key} {value:.4f}" for key, value in means.items()), flush=True)
            tally = {}
        if (k + 1) % every == 0 or k + 1 == iterations:
            write_atomically(path, partial(torch.save, {
                "iteration": k + 1, "seconds": time.process_time() - start,
                "states": [part.state_dict() for part in stored]}))


@torch.no_grad()
def update_ema(kept, network, decay):
    torch._foreach_lerp_(list(kept.parameters()), list(network.parameters()), 1 - decay)


# Autoencoder --------------------------------------------------------------------------------


def new_vae():
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        sample_size=emoji.SIDE)


def edges(x):
    return x.diff(dim=2), x.diff(dim=3)


def reconstruction_loss(decoded, x, weight):
    """Absolute differences of pixels and of edges, which blur would lose; weighted by pixel."""
    pixels = (weight * (decoded - x).abs()).mean()
    return pixels + sum((a - b).abs().mean() for a, b in zip(edges(decoded), edges(x)))


def vae_batch(k, batch):
    """Pictures in [-1,1] and pixel weights: what stands there counts, its background less."""
    scenes = emoji.draw_scenes(batch, generator(1, k))
    x = to_float(emoji.paint(scenes))
    empty = to_float(torch.tensor(list(emoji.BACKGROUNDS.values())))[scenes.background]
    drawn = (x - empty[:, :, None, None]).abs().amax(1, keepdim=True) > 0.02
    return x, 0.5 + 1.5 * drawn


def make_vae(iterations=2500, decoder_iterations=2500, batch=32):
    vae = new_vae().to(memory_format=torch.channels_last)

    def joint(k):
        x, weight = vae_batch(k, batch)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator(2, k))
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        reconstruction = reconstruction_loss(decoded, x, weight)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": reconstruction + 1e-3 * kl, "kl": kl, "dB": decibel(decoded, x)}

    train("vae", [vae], 2e-3, iterations, joint)
    make_decoder(decoder_iterations, batch)


def make_decoder(iterations, batch):
    """The decoder alone on latents that stay, with a little noise, as a U-Net's have."""
    vae = load_vae().to(memory_format=torch.channels_last)
    trained = [vae.decoder, vae.post_quant_conv]
    for part in trained:
        part.requires_grad_(True)

    def loss_of(k):
        x, weight = vae_batch(1_000_000 + k, batch)             # not the pictures of before
        with torch.no_grad():
            latents = vae.encode(x).latent_dist.mean
            noise = torch.randn(latents.shape, generator=generator(2, 1_000_000 + k))
            latents = latents + 0.1 * latents.std() * noise
        decoded = vae.decode(latents).sample
        return {"loss": reconstruction_loss(decoded, x, weight), "dB": decibel(decoded, x)}

    train("decoder", trained, 1e-3, iterations, loss_of)


def decibel(decoded, x):
    """Peak signal to noise, of pixels in [-1,1]."""
    return -10 * torch.log10(F.mse_loss(decoded.detach(), x) / 4)


def load_vae():
    """The autoencoder as far as it is trained."""
    if not (WORK / "vae.pt").exists():
        raise UserError(f"no autoencoder in {WORK}: python -m experiments.make_emoji vae")
    vae = new_vae()
    vae.load_state_dict(trained_states("vae")[0])
    if (WORK / "decoder.pt").exists():
        for part, state in zip((vae.decoder, vae.post_quant_conv), trained_states("decoder")):
            part.load_state_dict(state)
    return vae.eval().requires_grad_(False)


def trained_states(name):
    return torch.load(WORK / f"{name}.pt", weights_only=True)["states"]


# Text encoder -------------------------------------------------------------------------------


LENGTH = 20                                 # tokens of a caption: its words, begin and end


def words():
    said = " ".join([*emoji.names(), *emoji.COLOURS, *emoji.WORDINGS, "a an and ,"])
    return sorted(set(re.findall(r"[a-z]+|,", re.sub(r"{.*?}", "", said))))


def byte_pairs(vocabulary):
    """The merges that make one token of every word: the commonest pair first."""
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in vocabulary}
    merges = []
    while any(len(parts) > 1 for parts in split.values()):
        counts = Counter(pair for parts in split.values() for pair in zip(parts, parts[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for word, parts in split.items():
            split[word] = merged(parts, best)
    return merges


def merged(parts, pair):
    """The parts of a word with every neighbouring `pair` joined, from the left."""
    joined = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def new_tokenizer():
    """CLIP's kind, with our words whole; any other word falls into bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer
    letters = sorted(ByteLevel.alphabet())
    merges = byte_pairs(words())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges),
              "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def new_text_encoder(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel
    torch.manual_seed(0)
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def token_ids(tokenizer, texts):
    return tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH,
                     return_tensors="pt").input_ids


def teach_names(text_encoder, tokenizer, iterations=800, batch=128):
    """Say from a caption's last token what it names; without it cross-attention finds nothing."""
    G, B = len(emoji.names()), len(emoji.COLOURS)
    torch.manual_seed(0)
    answer = torch.nn.Linear(text_encoder.config.hidden_size, G + (G + 1) + B)

    def loss_of(k):
        scenes = emoji.draw_scenes(batch, generator(3, k))
        said = text_encoder(token_ids(tokenizer, emoji.captions(scenes)))[0][:, -1]
        first, second, background = answer(said).split([G, G + 1, B], 1)
        return {"loss": F.cross_entropy(first, scenes.emoji[:, 0])
                + F.cross_entropy(second, scenes.emoji[:, 1] % (G + 1))         # -1: the last
                + F.cross_entropy(background, scenes.background)}

    train("text", [text_encoder, answer], 2e-3, iterations, loss_of)


# Teacher ------------------------------------------------------------------------------------


def new_unet():
    from diffusers import UNet2DConditionModel
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=emoji.SIDE // 4, in_channels=4, out_channels=4, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=96,
        attention_head_dim=4)               # the number of heads, whatever its name says


def noise_table():
    """The 1000 noise levels of Stable Diffusion, x_t = x0 + sigma eps."""
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64).square()
    kept = (1 - betas).cumprod(0)
    return ((1 - kept) / kept).sqrt().float()


def teacher_loss(unet, text_encoder, x0, ids, eps, t, sigmas, most=1.0):
    """Epsilon error of the noised latents x0 [B,4,8,8], counting more where noise is high."""
    sigma = sigmas[t][:, None, None, None]
    x_t = (x0 + sigma * eps) / (1 + sigma.square()).sqrt()
    predicted = unet(x_t, t, text_encoder(ids)[0]).sample
    return ((1 + sigma.square()).clamp_max(most) * (predicted - eps).square()).mean()


@torch.no_grad()
def encode(vae, scenes):
    """Latents [N,4,8,8] of these pictures, not scaled."""
    return torch.cat([vae.encode(to_float(emoji.paint(scenes.take(part)))).latent_dist.mean
                      for part in torch.arange(len(scenes.background)).split(128)])


def load_text_encoder(tokenizer):
    text_encoder = new_text_encoder(tokenizer)
    text_encoder.load_state_dict(trained_states("text")[0])
    return text_encoder


def make_teacher(iterations=10_000, most=12.0, batch=64, lr=1e-3, name="teacher", hold=0.5):
    """U-Net and text encoder together, on latents that are encoded once."""
    tokenizer, vae = new_tokenizer(), load_vae()
    teach_names(new_text_encoder(tokenizer), tokenizer)
    text_encoder, unet, sigmas = load_text_encoder(tokenizer), new_unet(), noise_table()
    scenes = emoji.draw_scenes(POOL, generator(4, 0))
    latents, ids = encode(vae, scenes), token_ids(tokenizer, emoji.captions(scenes))
    latents /= latents.std()
    unknown = token_ids(tokenizer, [""])

    def loss_of(k):
        rng = generator(5, k)
        chosen = torch.randint(POOL, (batch,), generator=rng)
        dropped = torch.rand(batch, 1, generator=rng) < 0.1
        t = torch.randint(1000, (batch,), generator=rng)
        eps = torch.randn(batch, *latents[0].shape, generator=rng)
        return {"loss": teacher_loss(unet, text_encoder, latents[chosen],
                                     torch.where(dropped, unknown, ids[chosen]), eps, t, sigmas,
                                     most)}

    train(name, [unet, text_encoder], lr, iterations, loss_of, hold,
          ema=[copy.deepcopy(unet), copy.deepcopy(text_encoder)])


# Pipeline -----------------------------------------------------------------------------------


def save_pipeline(folder=PIPELINE, name="teacher"):
    """All parts in half precision, as diffusers loads them."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    tokenizer, vae, unet = new_tokenizer(), load_vae(), new_unet()
    text_encoder = new_text_encoder(tokenizer)
    unet_state, text_state = trained_states(name)[2:4]                  # the averages
    unet.load_state_dict(unet_state)
    text_encoder.load_state_dict(text_state)
    latents = encode(vae, emoji.draw_scenes(POOL, generator(4, 0)))
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                              clip_sample=False, set_alpha_to_one=False,
                              timestep_spacing="trailing")
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)                   # they are written for the owner alone
    print(f"{sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()):,} bytes in {folder}")


PARTS = {"glyphs": make_glyphs, "vae": make_vae, "teacher": make_teacher,
         "pipeline": save_pipeline}


def main():
    parser = Parser(prog="python -m experiments.make_emoji", description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=list(PARTS))
    part = parser.parse_args().part
    torch.set_num_threads(1)                # sums split over threads round differently
    PARTS[part]()


if __name__ == "__main__":
    run(main)
