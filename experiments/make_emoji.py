"""Makes what the emoji need in assets/emoji/; the same command again goes on where it stopped.

    python -m experiments.make_emoji glyphs      the emoji, from Debian's fonts-noto-color-emoji
    python -m experiments.make_emoji vae         the autoencoder
    python -m experiments.make_emoji start       a pipeline with an untrained U-Net
    python train.py --dataset emoji --stage 0 --teacher runs/emoji/start --folder runs/emoji
    python -m experiments.make_emoji decoder     the autoencoder's decoder alone, at the same time
    python -m experiments.make_emoji pipeline    all of them in assets/emoji/pipeline
    python train.py --dataset emoji              its student, in stages 1, 2, 3
    python -m experiments.make_emoji student     the last of them in assets/emoji/student
"""

import json
import math
import shutil
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
from presets.datasets import DATASETS
from text_to_image import TextDenoiser
from weights.checkpoint import SAMPLED, load, network_from
from weights.exported import export

WORK = Path("runs/emoji")                   # what is half done
START, STAGE0 = WORK / "start", WORK / "stage0" / "best.pt"
PIPELINE, STUDENT = (emoji.GLYPHS.with_name(name) for name in ("pipeline", "student"))

# ---- Training ----

def generator(stream, k):
    """For iteration k of one of several streams: the same however often the run was stopped."""
    return torch.Generator().manual_seed(stream * 1_000_000_007 + k)


def rate_of(k, iterations):
    """One after a short warm-up, then a cosine to zero."""
    return min(1, (k + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * k / iterations))


def train(name, networks, lr, iterations, loss_of, every=500):
    """Adam on the first of the losses; saved in WORK every so often.

    loss_of(k) -> a dict of losses, "loss" first, which is what falls.
    """
    path = WORK / f"{name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    trained = [p for network in networks for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr, betas=(0.9, 0.99), fused=True)
    stored = [*networks, optimizer]
    first, spent = 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        first, spent = saved["iteration"], saved["seconds"]
        for part, state in zip(stored, saved["states"]):
            part.load_state_dict(state)
    start, tally = time.process_time() - spent, {}
    for k in range(first, iterations):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate_of(k, iterations)
        losses = loss_of(k)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, error_if_nonfinite=True)
        optimizer.step()
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


def make_vae(iterations=2500, batch=32):
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


def make_decoder(iterations=2500, batch=32):
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


# ---- Pipeline ----

def make_start():
    """What stage 0 goes on from: all but the U-Net is trained."""
    tokenizer, vae = new_tokenizer(), load_vae()
    text_encoder = new_text_encoder(tokenizer)
    teach_names(text_encoder, tokenizer)
    scenes = emoji.draw_scenes(2000, generator(4, 0))
    deviation = vae.encode(from_uint8(emoji.paint(scenes))).latent_dist.mean.std().item()
    vae.register_to_config(scaling_factor=round(1 / deviation, 5))
    torch.manual_seed(0)
    network = TextDenoiser(**DATASETS["emoji"].network)
    save(START, vae, text_encoder, tokenizer, network)


def make_pipeline():
    """Stage 0's averages, and the decoder's second part."""
    network = network_from(load(STAGE0, needs=SAMPLED))
    vae, tokenizer = load_vae(), new_tokenizer()
    vae.register_to_config(scaling_factor=json.loads(
        (START / "vae" / "config.json").read_text())["scaling_factor"])
    save(PIPELINE, vae, network.text_encoder, tokenizer, network, torch.float16)
    print(f"{sum(p.stat().st_size for p in PIPELINE.rglob('*') if p.is_file()):,} bytes in "
          f"{PIPELINE}")


def make_student():
    """The three-step student that `train.py --dataset emoji` left, in half precision."""
    payload = load(Path("runs") / "emoji-pmdd" / "stage3" / "best.pt", needs=SAMPLED)
    network = network_from(payload)
    network.unet.half()
    facts = {name: payload[name] for name in ("method", "stage", "iteration")}
    shutil.rmtree(STUDENT, ignore_errors=True)          # export() replaces no folder
    print(export(network, payload["pipeline"], payload["sigmas"], STUDENT, facts))


def save(folder, vae, text_encoder, tokenizer, network, dtype=torch.float32):
    """As diffusers loads them."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    scheduler = DDIMScheduler(**network.config["schedule"], clip_sample=False,
                              set_alpha_to_one=False, timestep_spacing="trailing",
                              prediction_type=network.config["prediction_type"])
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=network.unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
    pipeline.to(dtype=dtype).save_pretrained(folder)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)                   # they are written for the owner alone


PARTS = {"glyphs": make_glyphs, "vae": make_vae, "start": make_start, "decoder": make_decoder,
         "pipeline": make_pipeline, "student": make_student}


def main():
    parser = Parser(prog="python -m experiments.make_emoji", description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=list(PARTS))
    part = parser.parse_args().part
    torch.set_num_threads(1)                # sums split over threads round differently
    PARTS[part]()


if __name__ == "__main__":
    run(main)
