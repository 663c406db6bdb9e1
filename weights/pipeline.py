"""A published pipeline of text to image: its U-Net as a denoiser, its prompts, its pictures.

Stable Diffusion 1.x, 2.x and SDXL, as diffusers saves them: a folder, or a name on the model hub.
"""

import json
import re
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

from base.errors import UserError
from base.files import ROOT
from models import Conditions, from_uint8, to_uint8
from text_to_image import SIZES, build, library, reading, reason, require

WEIGHTS = "diffusion_pytorch_model"                     # a file's name, as diffusers saves it
BETAS = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
# Text encoders and tokenizers of each kind of pipeline: the ends of their folders' names.
PIPELINES = {"StableDiffusionPipeline": ("",), "StableDiffusionXLPipeline": ("", "_2")}


def name_of(source):
    """What a folder that the user names is found by from any other, by locate(): its path in this
    repository, or its whole path; names of the model hub stay."""
    for folder in (Path(source), ROOT / source):
        if folder.is_dir():
            folder = folder.resolve()
            return str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder)
    return str(source)


def locate(source, *parts):
    """A pipeline's folder: `source` itself, or these parts of it from the model hub."""
    for folder in (ROOT / source, Path(source)):
        if folder.is_dir():
            return folder
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
    half = [path.name for path in folder.glob(f"{name}.fp16*.safetensors")]
    require(files, f"{folder} holds no {name}.safetensors" + (
        f", only {half[0]}; save the pipeline without variant=\"fp16\"" if half else
        f", and {pickles[0]} is a pickle, which could run anything; save the pipeline with "
        "safe_serialization=True" if pickles else ""))
    return files


def configuration(folder, scheduler_folder):
    """Of the denoiser that a U-Net is, with its scheduler's noise levels."""
    unet = read_json(folder / "config.json")
    scheduler = read_json(scheduler_folder / "scheduler_config.json")
    with reading(scheduler_folder):
        odd = [name for name in ("trained_betas", "rescale_betas_zero_snr") if scheduler.get(name)]
        require(not odd, f"the noise schedule has {', '.join(odd)}; allowed: betas alone")
        schedule = {name: scheduler[name] for name in BETAS}
    return dict(unet={k: v for k, v in unet.items() if not k.startswith("_")},
                prediction_type=scheduler.get("prediction_type", "epsilon"), schedule=schedule)


def load_unet(folder, scheduler_folder):
    """A denoiser, fp32."""
    files, load_file = weight_files(folder, WEIGHTS), library("safetensors.torch").load_file
    config = configuration(folder, scheduler_folder)
    with reading(folder):
        network = build(config)
        state = {name: value.float() for file in files for name, value in load_file(file).items()}
        network.unet.load_state_dict(state, strict=True, assign=True)
    return network


def load_teacher(source):
    """The network of a pipeline folder or hub name."""
    folder = locate(source, "unet")
    read_index(folder)
    return load_unet(folder / "unet", folder / "scheduler")


def teacher_configuration(source):
    """Of that network, without its weights."""
    folder = locate(source, "scheduler")
    read_index(folder)
    return configuration(folder / "unet", folder / "scheduler")


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


def with_text_encoder(network, pipeline):
    """The network with the pipeline's own text encoder in it, to be trained together."""
    require(not pipeline.xl, "--stage 0 trains a U-Net and one text encoder; SDXL's has two")
    encoder, = pipeline.text_encoders
    both = build(network.config | {"text_encoder": encoder.config.to_diff_dict()})
    both.load_state_dict(network.state_dict() | {
        f"text_encoder.{name}": value for name, value in encoder.state_dict().items()},
        assign=True)
    return pipeline.serve(both, pipeline.prompts)


def unknown_words(tokenizer, prompts, encodings):
    """The words of which single letters or bytes are left, or the token of what is unknown."""
    found = {}
    for prompt, encoding in zip(prompts, encodings):
        pieces = {}
        for word, token in zip(encoding.word_ids, encoding.tokens):
            pieces.setdefault(word, []).append(token.removesuffix("</w>"))
        for word in pieces.keys() - {None}:             # None: begin, end and padding
            word, parts = prompt[slice(*encoding.word_to_chars(word))], pieces[word]
            if tokenizer.unk_token in parts or len(parts) > 1 and min(map(len, parts)) == 1:
                found[word] = None
    return list(found)


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
        self.spelled = False            # whether it was said that a word is not known

    def tokens(self, prompts, tokenizer):
        """Their numbers, [B, tokens]."""
        tokens = tokenizer(prompts, padding="max_length", truncation=True,
                           max_length=tokenizer.model_max_length, return_tensors="pt")
        if not self.cut and any(encoding.overflowing for encoding in tokens.encodings):
            self.cut = True
            print(f"a prompt has more than {tokenizer.model_max_length} tokens: it is cut "
                  "there, as every long one is", file=sys.stderr)
        if not self.spelled and (words := unknown_words(tokenizer, prompts, tokens.encodings)):
            self.spelled = True
            print(f"the tokenizer does not know {', '.join(map(repr, words[:5]))}: spelled out, "
                  "it may mean nothing to the network", file=sys.stderr)
        return tokens.input_ids.to(self.vae.device)

    @torch.no_grad()
    def embed(self, prompts):
        """y of a list of prompts, bit for bit what diffusers' own pipeline makes of them. [B, D]"""
        states = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders):
            output = encoder(self.tokens(prompts, tokenizer), output_hidden_states=self.xl)
            states.append(output.hidden_states[-2] if self.xl else output[0])
        y = torch.cat(states, dim=-1).flatten(1)
        if not self.xl:
            return y
        sizes = y.new_tensor([self.size, self.size, 0, 0, self.size, self.size])
        return torch.cat([y, output.text_embeds, sizes.expand(len(y), -1)], dim=1)

    def conditions(self, prompts, network=None):
        """The prompts by their index; none is "", for SDXL zeros beside the sizes."""
        embed = self.embed
        if getattr(network, "text_encoder", None) is not None:      # a stage 0
            embed = partial(self.tokens, tokenizer=self.tokenizers[0])
        null = embed([""])
        if self.zero_null:
            null[:, :-SIZES] = 0
        return Conditions(
            len(prompts), lambda index: embed([prompts[i] for i in index.tolist()]), null,
            on_host=True, texts=prompts)

    def serve(self, network, prompts):
        """The network, asked for these prompts, shows its latents as pictures."""
        self.prompts, network.conditions = prompts, self.conditions(prompts, network)
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
