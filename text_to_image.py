"""Text to image: diffusers' U-Nets as denoisers D(x_t, sigma, y), their prompts and pictures.

Stable Diffusion 1.x, 2.x and SDXL: a pipeline folder, or a name on the model hub. x are latents,
x_t = x0 + sigma eps as everywhere; y is one vector for each image, [B, tokens * width], in SDXL
with the pooled vector and six sizes behind. diffusers and transformers (requirements-text.txt) are
imported here alone, and only when a text model is asked for.

    python text_to_image.py export BEST.pt OUT      a student as a folder that diffusers samples
"""

import contextlib
import importlib
import json
import re
import sys
from pathlib import Path

import torch
from torch import nn

from base.errors import UserError, run
from models import Conditions, Levels, classes_as_conditions, from_uint8, sigma_grid, to_uint8

SIZES = 6                       # SDXL's height and width, crop, height and width again
WEIGHTS = "diffusion_pytorch_model"                     # a file's name, as diffusers saves it
BETAS = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
# Text encoders and tokenizers of each kind of pipeline: the ends of their folders' names.
PIPELINES = {"StableDiffusionPipeline": ("",), "StableDiffusionXLPipeline": ("", "_2")}


def library(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"text to image needs {name} ({error}): pip install -r "
                        "requirements-text.txt") from None


def require(ok, message):
    if not ok:
        raise UserError(message)


@contextlib.contextmanager
def reading(path):
    """Whatever the libraries raise at a file that is missing, damaged or of another kind."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:
        raise UserError(f"cannot load {path}: {reason(error)}") from None


def reason(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# ---- The U-Net as a denoiser. ----

def noise_table(beta_schedule, beta_start, beta_end, num_train_timesteps):
    """sigma = sqrt((1 - abar) / abar) of every timestep, ascending. [N] float64"""
    power = {"linear": 1.0, "scaled_linear": 0.5}.get(beta_schedule)
    require(power, f"beta_schedule is {beta_schedule!r}; allowed: linear, scaled_linear")
    roots = torch.linspace(beta_start ** power, beta_end ** power, num_train_timesteps,
                           dtype=torch.float64, device="cpu")   # also while built on "meta"
    abar = torch.cumprod(1 - roots ** (1 / power), 0)
    return ((1 - abar) / abar).sqrt()


def variance_preserving(table):
    """Levels of a network that sees c x_t, c = 1 / sqrt(1 + sigma^2), and begins with z itself."""
    def at(fraction):
        index = torch.as_tensor(fraction, dtype=torch.float64) * (len(table) - 1)
        levels, whole = table.to(index.device), index.round()
        low = index.floor().long().clamp(0, len(table) - 2)
        between = torch.lerp(levels[low].log(), levels[low + 1].log(), index - low).exp()
        sigma = torch.where((index - whole).abs() < 1e-9, levels[whole.long()], between)
        return sigma if torch.is_tensor(fraction) else sigma.item()

    return Levels(table, at, lambda sigma: (1 + sigma ** 2) ** 0.5, sigma_grid)


# Stable Diffusion v1.5's, as published; what is left out is diffusers' default.
SD_SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                   num_train_timesteps=1000)
SD_LEVELS = variance_preserving(noise_table(**SD_SCHEDULE))
SD15_NETWORK = dict(unet=dict(sample_size=64, cross_attention_dim=768), prediction_type="epsilon",
                    schedule=SD_SCHEDULE)


class TextDenoiser(nn.Module):
    """D(x_t, sigma, y) of an epsilon or v network; TextDenoiser(**config) builds another one."""

    def __init__(self, unet, prediction_type, schedule):
        super().__init__()
        require(prediction_type in ("epsilon", "v_prediction"),
                f"prediction_type is {prediction_type!r}; allowed: epsilon, v_prediction")
        self.config = dict(unet=unet, prediction_type=prediction_type, schedule=schedule)
        self.levels = variance_preserving(noise_table(**schedule))
        self.predicts_v = prediction_type == "v_prediction"
        # With it the denoising weight, sigma^-2 + sigma_data^-2, gives the error of epsilon or v.
        self.sigma_data = 1.0 if self.predicts_v else float("inf")
        self.unet = library("diffusers").UNet2DConditionModel.from_config(unet)
        self.measure(self.unet.config)
        self.midpoints = None
        self.conditions, self.pixels = classes_as_conditions(0), None   # until a pipeline serves

    def measure(self, config):
        """What the program asks of a network."""
        require(config.in_channels == config.out_channels,
                f"the U-Net has {config.in_channels} channels in and {config.out_channels} out; "
                "allowed: as many of both (no inpainting)")
        self.shape = (config.in_channels, config.sample_size, config.sample_size)
        self.encoder_channels = config.block_out_channels[-1]
        self.encoder_resolution = self.shape[-1] >> len(config.down_block_types) - 1
        # The parts of y behind the text: SDXL's pooled vector and sizes.
        self.text_width, self.y_rest = config.cross_attention_dim, [0, 0]
        if config.addition_embed_type == "text_time":
            sizes = SIZES * config.addition_time_embed_dim
            self.y_rest = [config.projection_class_embeddings_input_dim - sizes, SIZES]

    def forward(self, x_t, sigma, y, output="denoised"):
        """x_t [B,C,H,W] -> x0; with output="encoder" the middle block's output instead."""
        dtype = torch.promote_types(x_t.dtype, torch.float32)   # x0 is fp32 even under autocast
        x_t, sigma = x_t.to(dtype), sigma.to(dtype)
        c = (1 + sigma ** 2).rsqrt()
        x, t = (c * x_t).to(self.unet.dtype), self.timestep(sigma)
        y = y.to(self.unet.dtype).expand(len(x), -1)
        text, pooled, sizes = y.split([y.shape[1] - sum(self.y_rest), *self.y_rest], dim=1)
        text = text.unflatten(1, (-1, self.text_width))         # [B, tokens, width]
        added = {"text_embeds": pooled, "time_ids": sizes}      # SD takes no notice of them
        if output == "encoder":
            return self.encode(x, t, text, added).to(dtype)
        predicted = self.unet(x, t, text, added_cond_kwargs=added).sample.to(dtype)
        if self.predicts_v:
            return c ** 2 * x_t - c * sigma * predicted
        return x_t - sigma * predicted

    def timestep(self, sigma):
        """The nearest level's index, a whole number: bf16 would make 1000 of 999. [B or 1]"""
        if self.midpoints is None or self.midpoints.device != sigma.device:
            table = self.levels.table.to(sigma.device)          # no buffer: .bfloat16() spoils it
            self.midpoints = (table[1:] + table[:-1]) / 2
        return torch.bucketize(sigma.flatten().double(), self.midpoints)

    def encode(self, x, t, text, added):
        """The U-Net without its decoder, of its public parts."""
        emb = self.unet.time_embedding(self.unet.get_time_embed(x, t))
        more = self.unet.get_aug_embed(emb, text, added)
        emb = emb if more is None else emb + more
        x = self.unet.conv_in(x)
        for block in [*self.unet.down_blocks, self.unet.mid_block]:
            attends = getattr(block, "has_cross_attention", False)
            x = block(x, emb, encoder_hidden_states=text) if attends else block(x, emb)
            x = x[0] if type(x) is tuple else x                 # a down block gives skips besides
        return x


def build(config):
    """The network without weights: for load_state_dict(..., assign=True), or to count."""
    with torch.device("meta"):
        return TextDenoiser(**config).eval()


# ---- A published pipeline: its network, its prompts, its pictures. ----

def locate(source, *parts):
    """A pipeline's folder: `source` itself, or these parts of it from the model hub."""
    if Path(source).is_dir():
        return Path(source)
    hub = library("huggingface_hub")
    wanted = ["model_index.json", "scheduler/*.json", "unet/config.json"] + [
        f"{part}/*.{kind}" for part in parts for kind in ("json", "txt", "safetensors")]
    try:
        return Path(hub.snapshot_download(str(source), allow_patterns=wanted,
                                          ignore_patterns=["*.fp16*", "*.non_ema*"]))
    except Exception as error:
        raise UserError(
            f"no pipeline {str(source)!r}: it is no folder, and {', '.join(parts)} cannot be had "
            f"from the model hub into {hub.constants.HF_HUB_CACHE} ({reason(error)}); a pipeline "
            "folder downloaded elsewhere can be given in its place, or put there") from None


def read_json(path):
    with reading(path):
        values = json.loads(path.read_text())
        require(type(values) is dict, "no JSON object")
    return values


def read_index(folder):
    """model_index.json: the class of the pipeline, and of each of its parts."""
    path = folder / "model_index.json"
    require(path.is_file(), f"{folder} is no pipeline folder: it holds no {path.name}; allowed: "
            "what diffusers' save_pretrained writes, or a name on the model hub")
    index = read_json(path)
    kind = index.get("_class_name")
    require(kind in PIPELINES, f"{folder} is a {kind}, not a pipeline of Stable Diffusion 1.x, 2.x "
            f"or SDXL; allowed: {' or '.join(PIPELINES)}")
    return index


def weight_files(folder, name):
    files = [path for path in folder.glob("*.safetensors")
             if re.fullmatch(rf"{name}(-\d+-of-\d+)?", path.stem)]
    pickles = [path.name for path in folder.glob("*") if path.suffix in (".bin", ".ckpt", ".pt")]
    require(files, f"{folder} holds no {name}.safetensors" + (
        f", and {pickles[0]} is a pickle, which could run anything; save the pipeline with "
        "safe_serialization=True" if pickles else ""))
    return files


def load_unet(folder, scheduler_folder):
    """A denoiser, fp32, of a U-Net and its scheduler's noise levels."""
    files, load_file = weight_files(folder, WEIGHTS), library("safetensors.torch").load_file
    unet = read_json(folder / "config.json")
    scheduler = read_json(scheduler_folder / "scheduler_config.json")
    with reading(scheduler_folder):
        odd = [name for name in ("trained_betas", "rescale_betas_zero_snr") if scheduler.get(name)]
        require(not odd, f"the noise schedule has {', '.join(odd)}; allowed: betas alone")
        schedule = {name: scheduler[name] for name in BETAS}
    with reading(folder):
        network = build(dict(unet={k: v for k, v in unet.items() if not k.startswith("_")},
                             prediction_type=scheduler.get("prediction_type", "epsilon"),
                             schedule=schedule))
        state = {name: value.float() for file in files for name, value in load_file(file).items()}
        network.unet.load_state_dict(state, strict=True, assign=True)
    return network


def load_teacher(source):
    """The network of a pipeline folder or hub name."""
    folder = locate(source, "unet")
    read_index(folder)
    return load_unet(folder / "unet", folder / "scheduler")


def load_frozen(kind, folder, name, **options):
    """A text encoder or VAE: their own loaders know the files' old names, but forgive gaps."""
    weight_files(folder, name)
    with reading(folder):
        model, found = kind.from_pretrained(
            folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True,
            output_loading_info=True, **options)
        gaps = [*found["missing_keys"], *found["mismatched_keys"]]
        require(not gaps, f"{len(gaps)} weights are missing, the first is {str(gaps[:1])[1:-1]}")
    return model.eval().requires_grad_(False)


class Pipeline(nn.Module):
    """What is frozen around the network: prompts -> y, latents <-> pictures."""

    def __init__(self, source):
        super().__init__()
        diffusers, transformers = library("diffusers"), library("transformers")
        folder = locate(source, "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "vae")
        index = read_index(folder)
        ends = PIPELINES[index["_class_name"]]
        self.xl = len(ends) == 2
        self.zero_null = self.xl and index.get("force_zeros_for_empty_prompt", True)
        transformers.utils.logging.disable_progress_bar()
        self.text_encoders, self.tokenizers = nn.ModuleList(), []
        for end in ends:
            with reading(folder / f"tokenizer{end}"):
                kind = getattr(transformers, index[f"text_encoder{end}"][-1])
                self.tokenizers.append(transformers.CLIPTokenizer.from_pretrained(
                    folder / f"tokenizer{end}", local_files_only=True))
            self.text_encoders.append(load_frozen(kind, folder / f"text_encoder{end}", "model"))
        self.vae = load_frozen(diffusers.AutoencoderKL, folder / "vae", WEIGHTS,
                               low_cpu_mem_usage=False)     # its other way needs accelerate
        self.vae.enable_slicing()       # one by one: less memory, and no picture knows its batch
        finer = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.size = finer * read_json(folder / "unet" / "config.json")["sample_size"]
        self.cut = False                # whether it was said that a prompt is too long

    @torch.no_grad()
    def embed(self, prompts):
        """y of a list of prompts, bit for bit what diffusers' own pipeline makes of them. [B, D]"""
        states = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders):
            tokens = tokenizer(prompts, padding="max_length", truncation=True,
                               max_length=tokenizer.model_max_length, return_tensors="pt")
            if not self.cut and any(encoding.overflowing for encoding in tokens.encodings):
                self.cut = True
                print(f"a prompt has more than {tokenizer.model_max_length} tokens: it is cut "
                      "there, as every long one is", file=sys.stderr)
            output = encoder(tokens.input_ids.to(self.vae.device), output_hidden_states=self.xl)
            states.append(output.hidden_states[-2] if self.xl else output[0])
        y = torch.cat(states, dim=-1).flatten(1)
        if not self.xl:
            return y
        sizes = y.new_tensor([self.size, self.size, 0, 0, self.size, self.size])
        return torch.cat([y, output.text_embeds, sizes.expand(len(y), -1)], dim=1)

    def conditions(self, prompts):
        """The prompts by their index; none is "", for SDXL zeros beside the sizes."""
        null = self.embed([""])
        if self.zero_null:
            null[:, :-SIZES] = 0
        return Conditions(
            len(prompts), lambda index: self.embed([prompts[i] for i in index.tolist()]), null,
            on_host=True)

    def serve(self, network, prompts):
        """The network, asked for these prompts, shows its latents as pictures."""
        self.prompts, network.conditions = prompts, self.conditions(prompts)
        network.pixels = lambda latents: self.decode(latents)   # a method would be copied with it
        return network

    def decode_float(self, latents):
        """Pictures in [-1, 1]; the gradient reaches the latents."""
        require(not (self.vae.config.force_upcast and self.vae.dtype == torch.float16),
                "the VAE of SDXL overflows in fp16; allowed: fp32, bf16")
        latents = latents / self.vae.config.scaling_factor
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()

    @torch.no_grad()
    def decode(self, latents):
        """uint8 [B,3,H,W], rounded to the nearest level as every image here, and by diffusers."""
        return to_uint8(self.decode_float(latents))

    @torch.no_grad()
    def encode(self, images, generator=None):
        """Latents of uint8 pictures: a draw of the VAE's posterior, as in DMD2, or its mode."""
        pixels = from_uint8(images).to(self.vae.device, self.vae.dtype)
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.sample(generator) if generator else posterior.mode()
        return latents.float() * self.vae.config.scaling_factor


if __name__ == "__main__":
    from weights.exported import main   # a higher room, which only the command enters

    run(main)
