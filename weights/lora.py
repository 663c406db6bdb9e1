"""Low-rank adapters (LoRA, arXiv:2106.09685): a few trained weights beside each of a frozen base's.

Teacher, student, adapted network, average and previous student then share one U-Net's weights. A
file of adapters is read in two namings, of diffusers and of DMD2's published ones.
"""

import copy
import json
import math

import torch
import torch.nn.functional as F
from torch import nn

from text_to_image import library, reading, require
from weights.checkpoint import weights_digest
from weights.pipeline import load_teacher

LORA_FILE = "pytorch_lora_weights.safetensors"          # as diffusers' load_lora_weights finds it
# down, up of one layer; diffusers (by peft) and DMD2 (as Kohya's scripts) call them so.
ENDS = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_down.weight": "down",
        "lora_up.weight": "up", "alpha": "alpha"}


def adapted_layers(unet):
    """All that is linear in the U-Net's blocks, by name: the layers that DMD2 chose."""
    return {name: layer for name, layer in unet.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d))
            and name.startswith(("down_blocks.", "mid_block.", "up_blocks."))}


def key(name):
    """Of a layer where no dot may be: in a ModuleDict, and in DMD2's files."""
    return name.replace(".", "_")


class Change(nn.Module):
    """What is added to one layer: of low rank, and zero at first."""

    def __init__(self, layer, rank):
        super().__init__()
        weight = layer.weight
        self.down = nn.Parameter(torch.empty(rank, *weight.shape[1:], device=weight.device))
        self.up = nn.Parameter(torch.zeros(len(weight), rank, *(1,) * (weight.ndim - 2),
                                           device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))     # as a linear layer of torch begins

    def forward(self, x, layer):
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)   # bf16 outside of autocast
        if isinstance(layer, nn.Linear):
            return F.linear(F.linear(x, down), up)
        return F.conv2d(F.conv2d(x, down, None, layer.stride, layer.padding), up)


class Changed(nn.Module):
    """A layer of the base, and its change."""

    def __init__(self, layer, change):
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, x):
        return self.layer(x) + self.change(x, self.layer)


class LoRA(nn.Module):
    """A denoiser like the base, around the base's own weights, with changes that are its alone.

    Modules as of a copy, so that nothing is switched between roles, and what --recompute computes
    again is computed with the same changes. Registered, and so trained, averaged and saved, are the
    changes only.
    """

    def __init__(self, base, rank):
        super().__init__()
        shared = {id(weight): weight for weight in base.parameters()}   # deepcopy takes these as
        network = copy.deepcopy(base, shared)                           # copied already
        self.changes = nn.ModuleDict()
        for name, layer in adapted_layers(network.unet).items():
            self.changes[key(name)] = Change(layer, rank)
            network.unet.set_submodule(name, Changed(layer, self.changes[key(name)]))
        self.__dict__ |= {"base": base, "network": network, "rank": rank}       # not registered

    def forward(self, *inputs, **options):
        return self.network(*inputs, **options)

    def __getattr__(self, name):
        """What a denoiser tells of itself the base knows: shape, levels, conditions, .."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["network"], name)

    def __deepcopy__(self, memo):
        twin = LoRA(self.base, self.rank)
        twin.load_state_dict(self.state_dict())
        return twin


# ---- The changes of one role, as they are kept: key(layer) -> its parts. ----

def tensors_in(path):
    """Of a safetensors file; the alpha that diffusers writes beside a LoRA's, with each layer's."""
    with reading(path), library("safetensors").safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        told = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        require(not told.get("unet.use_rslora") and not told.get("unet.alpha_pattern"),
                "its scale is not one for all layers, nor alpha / rank")
        if alpha := told.get("unet.lora_alpha"):
            tensors |= {name.replace("lora_A.weight", "alpha"): torch.tensor(alpha)
                        for name in tensors if name.endswith(".lora_A.weight")}
    return tensors


def parts_of(state):
    """Of a role's state dict."""
    parts = {}
    for name, value in state.items():
        _, layer, side = name.split(".")
        parts.setdefault(layer, {})[side] = value
    return parts


def parts_in(tensors, source):
    """Of a file's tensors; those of text encoders are refused, as none of ours is changed."""
    found = {}
    for name, value in tensors.items():
        end = next((end for end in ENDS if name.endswith("." + end)), None)
        layer = key(name.removesuffix(f".{end}")).removeprefix("lora_")
        require(end and layer.startswith("unet_"), f"{source}: {name[:100]} is no change of a "
                "U-Net's layer; allowed: LoRA files as diffusers or DMD2 write them")
        found.setdefault(layer.removeprefix("unet_"), {})[ENDS[end]] = value
    return found


def as_diffusers(state, unet):
    """A role's state dict under the names that load_lora_weights knows."""
    parts = parts_of(state)
    return {f"unet.{name}.lora_{letter}.weight": parts[key(name)][side].contiguous()
            for name in adapted_layers(unet) for letter, side in (("A", "down"), ("B", "up"))}


@torch.no_grad()
def merge(network, parts, source):
    """The network with the changes added to its own weights: W + alpha / rank up down."""
    layers = {key(name): layer for name, layer in network.unet.named_modules()
              if isinstance(layer, (nn.Linear, nn.Conv2d))}
    for name, change in parts.items():
        fits = name in layers and {"down", "up"} <= change.keys()
        if fits:
            weight = layers[name].weight
            down, up = change["down"].float(), change["up"].float()
            scale = change["alpha"].item() / len(down) if "alpha" in change else 1
            fits = (up.flatten(1).shape == (len(weight), len(down))
                    and down.shape[1:] == weight.shape[1:])
        require(fits, f"{source} is a LoRA of another base: its change of {name} does not fit this "
                "one's U-Net")
        weight += scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return network


def merged(base, digest, parts, source):
    """A student that is kept as changes, of the base with these very weights."""
    network = load_teacher(base)
    require(weights_digest(network.state_dict()) == digest, f"{source} is a LoRA of another base: "
            f"{base} has other weights than those that it was trained over; --base names the right "
            "pipeline")
    return merge(network, parts, source)


def student_of(payload, base, source):
    """That of a checkpoint; base: its pipeline, where that has moved."""
    return merged(base or payload["pipeline"], payload["made_from"]["teacher"],
                  parts_of(payload["ema"]), source)
