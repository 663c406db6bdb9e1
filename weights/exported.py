"""A student as a folder that diffusers samples, and back; a stage 0 as a pipeline of its own.

A U-Net or a LoRA in safetensors under diffusers' names, the scheduler that makes our alternation,
and a model card. sampling.json holds what sampling needs besides: the timesteps, the base
pipeline's name, and of a LoRA the hash of the base's weights.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch

from base.files import ASSETS, ROOT, hidden_beside
from text_to_image import build, library, reading, require
from weights.pipeline import load_unet, locate, read_json
from weights import checkpoint
from weights.lora import LORA_FILE, as_diffusers, merged, parts_in, tensors_in

CARD = ASSETS / "model_card.md"
LICENCES = {"stable-diffusion-v1": "creativeml-openrail-m", "stable-diffusion-2": "openrail++",
            "stable-diffusion-xl": "openrail++"}


# What the card says of each.
WHOLE = dict(kind="U-Net", imports=", UNet2DConditionModel", lora="",
             unet="unet=UNet2DConditionModel.from_pretrained(folder),\n    ")
ADAPTERS = dict(kind="LoRA", imports="", unet="",
                lora="pipeline.load_lora_weights(folder)      # it takes: pip install peft\n")


def lcm_scheduler(schedule, prediction_type, timesteps):
    """diffusers' LCMScheduler, so set that it makes our alternation at these timesteps."""
    levels = schedule["num_train_timesteps"]
    # It warns of timesteps off its grid of n: the coarsest that has them all.
    grid = next(n for n in range(1, levels + 1)
                if set(timesteps) <= {k * (levels // n) - 1 for k in range(1, n + 1)})
    return library("diffusers").LCMScheduler(
        **schedule, prediction_type=prediction_type, original_inference_steps=grid,
        timestep_scaling=1e6,           # its default of 10 mixes a little of x_t into x0
        steps_offset=1)                 # unused; pipelines complain where it is not 1


def licence(base):
    """What the base's own card says, else what its name is known for."""
    card = ROOT / base / "README.md"
    said = re.search(r"^license: *(\S+)", card.read_text(), re.M) if card.is_file() else None
    known = [value for name, value in LICENCES.items() if name in str(base)]
    return said[1] if said else [*known, "other"][0]


def model_card(base, timesteps, facts, lora):
    counts, several = range(1, len(timesteps) + 1), "s" * (len(timesteps) > 1)
    return CARD.read_text().format(
        base=base, base_model="" if (ROOT / base).exists() else f"base_model: {base}\n",
        licence=licence(base),
        title=f"{Path(base).name}, distilled to {len(timesteps)} step{several}",
        steps=" or ".join(map(str, counts)) + f" step{several}",
        timesteps=timesteps,
        prefixes=", ".join(f"{n}: `{timesteps[:n]}`" for n in counts),
        facts="\n".join(f"- {name}: {value}" for name, value in facts.items()),
        **ADAPTERS if lora else WHOLE)


def export(network, base, sigmas, out, facts, lora=None):
    """Write the folder `out`, whole or not at all; returns the timesteps nearest to the sigmas.

    lora: (adapters, hash of the base's weights), in place of the network's own weights.
    """
    out = new_folder(out)
    timesteps = network.timestep(torch.tensor(sigmas, dtype=torch.float64)).tolist()
    with hidden_beside(out, folder=True) as temporary:
        if lora:
            library("safetensors.torch").save_file(as_diffusers(lora[0], network.unet),
                                                   temporary / LORA_FILE, {"format": "pt"})
        else:
            network.unet.save_pretrained(temporary)
        lcm_scheduler(network.config["schedule"], network.config["prediction_type"],
                      timesteps).save_pretrained(temporary / "scheduler")
        sampling = {"base": str(base), "timesteps": timesteps, "facts": facts}
        sampling |= {"base_sha256": lora[1]} if lora else {}
        (temporary / "sampling.json").write_text(json.dumps(sampling, indent=1) + "\n")
        (temporary / "README.md").write_text(model_card(base, timesteps, facts, lora))
        publish(temporary, out)
    return timesteps


def export_teacher(network, base, out):
    """A stage 0 as a pipeline: its U-Net and text encoder among the other parts of its base."""
    out = new_folder(out)
    with hidden_beside(out, folder=True) as temporary:
        for part in locate(base, "tokenizer", "vae").iterdir():
            if part.name not in ("unet", "text_encoder"):
                (shutil.copytree if part.is_dir() else shutil.copy)(part, temporary / part.name)
        network.unet.save_pretrained(temporary / "unet")
        network.text_encoder.save_pretrained(temporary / "text_encoder")
        publish(temporary, out)


def new_folder(out):
    out = Path(out)
    require(not out.exists(), f"{out} exists; give a new folder")
    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    return out


def publish(temporary, out):
    """Under its name, once it is whole and on the disk."""
    for path in temporary.rglob("*.*"):
        path.chmod(path.stat().st_mode | 0o644)         # safetensors writes for its owner alone
    os.sync()
    temporary.rename(out)


def load_exported(folder, base=None):
    """(network, sigmas, the base pipeline's name) of a folder that export() wrote.

    base: that of a LoRA, where it has moved."""
    folder = Path(folder)
    sampling = read_json(folder / "sampling.json")
    with reading(folder / "sampling.json"):
        require(type(sampling.get("base")) is str, "it names no base pipeline")
        timesteps = sampling.get("timesteps")
        require(type(timesteps) is list and timesteps and all(type(t) is int for t in timesteps)
                and timesteps == sorted(set(timesteps), reverse=True) and timesteps[-1] >= 0,
                f"its timesteps are {timesteps!r}; allowed: whole numbers that fall")
    if (folder / LORA_FILE).is_file():
        network = merged(base or sampling["base"], sampling.get("base_sha256"),
                         parts_in(tensors_in(folder / LORA_FILE), folder), folder)
    else:
        network = load_unet(folder, folder / "scheduler")
    with reading(folder / "sampling.json"):
        return network, network.levels.table[timesteps].tolist(), sampling["base"]


def main():
    """python text_to_image.py export BEST.pt OUT"""
    require(len(sys.argv) == 4 and sys.argv[1] == "export", f"usage: {main.__doc__}")
    out = new_folder(sys.argv[3])               # before gigabytes are read
    payload = checkpoint.load(sys.argv[2], needs=("network", "sigmas", "ema"))
    require("pipeline" in payload, f"{sys.argv[2]} is no student of text to image")
    lora = (payload["ema"], payload["made_from"]["teacher"]) if "lora" in payload else None
    network = build(payload["network"]) if lora else checkpoint.network_from(payload,
                                                                             source=sys.argv[2])
    if network.text_encoder is not None:
        export_teacher(network, payload["pipeline"], out)
        print(f"{out}: a pipeline; --teacher {out} distils it")
        return
    facts = {name: payload[name] for name in ("method", "stage", "iteration") if name in payload}
    facts |= {"LoRA's rank": payload["lora"]} if lora else {}
    timesteps = export(network, payload["pipeline"], payload["sigmas"], out, facts, lora)
    print(f"{out}: timesteps {timesteps}; its README.md has the code that samples it")
