"""DMD2's published students of text to image: a U-Net's file or a LoRA's, for its base pipeline."""

import zipfile

from base.distributed import say
from base.files import load_tensors, shown
from text_to_image import reading
from weights.checkpoint import build_network
from weights.lora import merge, parts_in, tensors_in
from weights.pipeline import load_teacher, teacher_configuration

TIMESTEPS = {"sd": [999], "xl": [999, 749, 499, 249], "xl-1step": [399]}


def tensors_of(path):
    """The tensors of any safetensors file, or of a .bin file with a U-Net's under diffusers' names;
    else None."""
    if path.suffix == ".safetensors" and path.is_file():
        return tensors_in(path)
    if path.suffix == ".bin" and zipfile.is_zipfile(path):
        with reading(path):
            found = load_tensors(path, mmap=True)
        if isinstance(found, dict) and "conv_in.weight" in found:
            return found
    return None


def open_published(tensors, path, base, sigmas):
    """(network, sigmas); the noise levels are DMD2's, unless they are given."""
    if "conv_in.weight" in tensors:
        network = build_network(teacher_configuration(base), {
            f"unet.{name}": value for name, value in tensors.items()}, path).eval()
    else:
        network = merge(load_teacher(base), parts_in(tensors, path), path)
    if sigmas:
        return network, sigmas
    kind = "sd" if not any(network.y_rest) else (
        "xl-1step" if "1step" in str(path) else "xl")           # so are files and folders named
    timesteps = TIMESTEPS[kind]
    say(f"{shown(path)} does not say its timesteps: taken for DMD2's, {timesteps}; --sigmas gives "
        "others")
    return network, network.levels.table[timesteps].tolist()
