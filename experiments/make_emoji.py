"""Makes what the emoji need in assets/emoji/; the same command again goes on where it stopped.

    python -m experiments.make_emoji glyphs      the emoji, from Debian's fonts-noto-color-emoji
    python -m experiments.make_emoji vae         the autoencoder
    python -m experiments.make_emoji teacher     text encoder and U-Net
    python -m experiments.make_emoji pipeline    all of them in assets/emoji/pipeline
"""

import copy
import math
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from base.errors import Parser, UserError, run
from base.files import write_atomically
from experiments.emoji_glyphs import make_glyphs
from experiments.emoji_text import new_text_encoder, new_tokenizer, token_ids
from images import emoji
from models import from_uint8
from text_to_image import SD_LEVELS

WORK = Path("runs/emoji-pipeline")          # what is half done
PIPELINE = emoji.GLYPHS.with_name("pipeline")
POOL = 40_000                               # pictures whose latents are encoded once

# ---- Training ----

def generator(stream, k):
    """For iteration k of one of several streams: the same however often the run was stopped."""
    return torch.Generator().manual_seed(stream * 1_000_000_007 + k)


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
            average(kept, network, min(0.999, (k + 1) / (k + 20)))
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
def average(kept, network, decay):
    torch._foreach_lerp_(list(kept.parameters()), list(network.parameters()), 1 - decay)


# ---- Autoencoder ----

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
    x = from_uint8(emoji.paint(scenes))
    empty = from_uint8(torch.tensor(list(emoji.BACKGROUNDS.values())))[scenes.background]
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


# ---- Teacher ----

def new_unet():
    from diffusers import UNet2DConditionModel
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=emoji.SIDE // 4, in_channels=4, out_channels=4, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=96,
        attention_head_dim=4)               # the number of heads, whatever its name says


def teacher_loss(unet, text_encoder, x0, ids, eps, t, sigmas, most=1.0):
    """Epsilon error of the noised latents x0 [B,4,8,8], counting more where noise is high."""
    sigma = sigmas[t][:, None, None, None]
    x_t = (x0 + sigma * eps) / (1 + sigma.square()).sqrt()
    predicted = unet(x_t, t, text_encoder(ids)[0]).sample
    return ((1 + sigma.square()).clamp_max(most) * (predicted - eps).square()).mean()


@torch.no_grad()
def encode(vae, scenes):
    """Latents [N,4,8,8] of these pictures, not scaled."""
    return torch.cat([vae.encode(from_uint8(emoji.paint(scenes.take(part)))).latent_dist.mean
                      for part in torch.arange(len(scenes.background)).split(128)])


def load_text_encoder(tokenizer):
    text_encoder = new_text_encoder(tokenizer)
    text_encoder.load_state_dict(trained_states("text")[0])
    return text_encoder


def make_teacher(iterations=10_000, most=12.0, batch=64, lr=1e-3, name="teacher", hold=0.5):
    """U-Net and text encoder together, on latents that are encoded once."""
    tokenizer, vae = new_tokenizer(), load_vae()
    teach_names(new_text_encoder(tokenizer), tokenizer)
    text_encoder, unet, sigmas = load_text_encoder(tokenizer), new_unet(), SD_LEVELS.table.float()
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


# ---- Pipeline ----

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
