"""Networks from published weights: EDM teachers, SiD and DMD2 students.

A published EDM or SiD network is a pickle that carries its own Python source. pickle_reader.py
reads it without running anything, and what it holds is kept as a plain file.
"""

import re
from pathlib import Path

import torch

from base.download import PUBLISHED, cache_folder, fetch_with_digest
from base.errors import UserError, out_of_memory
from base.files import file_digest, load_tensors, save_tensors, write_atomically
from weights.checkpoint import build_network, check_plain
from weights.pickle_reader import (MODULE_DICT, PERSISTENT, Record, UnsafePickle,
                                   read_pickle)

PUBLISHED_NETWORKS = tuple(n for n, entry in PUBLISHED.items() if entry.name.endswith(".pkl"))
INIT_ARGS = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max",
             "sigma_data", "model_type")  # EDMPrecond's arguments in their published order


def load_network(source, cache=None):
    """EDMPrecond in eval mode from a published name, a .pkl, or a .pt, .pth or .bin state dict."""
    if str(source) in PUBLISHED_NETWORKS:
        path, digest = fetch_with_digest(str(source), cache)
    else:
        path, digest = Path(source), None
        if not path.is_file():
            raise UserError(f"no file {path}, and no published network of that name; "
                            f"known: {', '.join(PUBLISHED_NETWORKS)}")
    if path.suffix == ".pkl":
        config, state = _read_converted(path, digest or file_digest(path), cache)
    elif path.suffix in (".pt", ".pth", ".bin"):
        config, state = _read_plain(path)
    else:
        raise UserError(f"{path}: a network is a .pkl, .pt, .pth or .bin file")
    return build_network(config, state, path).eval()


def _read_converted(path, digest, cache):
    """(config, state) of a pickle, by way of the plain file that the first use leaves behind."""
    plain = cache_folder(cache) / "converted" / f"{digest[:16]}.pt"
    if not plain.is_file():
        config, state = network_from_pickle(path)
        build_network(config, state, path)  # a network that cannot be built leaves no file
        data = {"config": config, "state": state}
        try:
            plain.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{plain}: cannot be written: {error}") from None
        write_atomically(plain, lambda temporary: save_tensors(data, temporary))
    return _read_plain(plain)


def _read_plain(path):
    try:
        data = load_tensors(path)
    except Exception as error:  # torch has no one exception for a bad file
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: not a file of plain tensors ({reason})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a state dict of tensors")
    if set(data) == {"config", "state"}:
        return data["config"], data["state"]
    try:
        return config_from_state_dict(data), generator_state(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def network_from_pickle(path):
    """(config, state dict) of the network that a published EDM or SiD pickle holds as "ema"."""
    data = read_pickle(path)
    try:
        network = data.get("ema") if type(data) is dict else None
        if not _is_persistent(network):
            raise UnsafePickle("holds no network under 'ema'")
        kind, top = network.args[0].get("class_name"), network.args[0].get("state")
        if type(kind) is not str or kind != "EDMPrecond":
            kind = repr(kind[:40]) if type(kind) is str else "that is no text"
            raise UnsafePickle(f"holds a network of class {kind}; allowed: EDMPrecond")
        args, kwargs = top.get("_init_args", ()), top.get("_init_kwargs", {})
        if type(args) is not tuple or len(args) > len(INIT_ARGS) or type(kwargs) is not dict:
            raise UnsafePickle("its constructor arguments cannot be read")
        config = {**dict(zip(INIT_ARGS, args)), **kwargs}
        check_plain(config)
        state = {}
        _collect(network, "", state, seen=set())
    except UserError as error:
        raise UnsafePickle(f"{path}: {error}") from None
    return config, state


def _is_persistent(value):
    """Whether value is a record of an EDM network or layer, with a state that can be read."""
    return (type(value) is Record and value.name == PERSISTENT
            and type(value.args[0].get("state")) is dict)


def _collect(module, prefix, state, seen):
    """Add the module's parameters and persistent buffers to `state`, under their full names."""
    where = f"layer {prefix[:-1]!r}"
    if id(module) in seen or prefix.count(".") > 20:
        raise UnsafePickle(f"{where} is shared, nested in itself or nested too deep")
    seen.add(id(module))
    if _is_persistent(module):
        fields = module.args[0]["state"]
    elif type(module) is Record and module.name == MODULE_DICT and type(module.state) is dict:
        fields = module.state
    else:
        raise UnsafePickle(f"{where} is of an unknown kind")
    parameters, buffers, modules = (
        fields.get(name, {}) for name in ("_parameters", "_buffers", "_modules"))
    dropped = fields.get("_non_persistent_buffers_set", set())
    if not (type(parameters) is type(buffers) is type(modules) is dict and type(dropped) is set):
        raise UnsafePickle(f"{where} has no readable state")
    for name, value in [*parameters.items(), *buffers.items(), *modules.items()]:
        if type(name) is not str or not re.fullmatch(r"[A-Za-z0-9_]{1,100}", name):
            raise UnsafePickle(f"{where} has an entry without a proper name")
        full = prefix + name
        if value is None or (name in dropped and name in buffers):
            continue
        if name in modules:
            _collect(value, f"{full}.", state, seen)
        elif not isinstance(value, torch.Tensor) or id(value) in seen or full in state:
            raise UnsafePickle(f"{full!r} is not a tensor of its own")
        else:
            seen.add(id(value))
            state[full] = value


# ------------------------------------------------------------------------------------------------
# State dicts without a configuration

UNET_PARTS = ("map_noise", "map_augment", "map_layer0", "map_layer1", "map_label", "enc", "dec",
              "out_norm", "out_conv")


def generator_state(state):
    """The generator's own weights, named as in EDMPrecond; a GAN head or a critic is left out."""
    anchor = "map_layer0.weight"
    roots = [name[:-len(anchor)] for name in map(str, state) if f".{name}".endswith(f".{anchor}")]
    if len(roots) > 1:  # a whole DMD2 training state: generator, adapted network, teacher
        roots = [root for root in roots if "feedforward_model." in root] or roots
    if len(roots) != 1:
        raise UserError(f"{len(roots)} U-Nets in the state dict; expected 1"
                        + (f", not {', '.join(roots)[:200]}" if roots else ""))
    root, = roots
    return {f"model.{name[len(root):]}": tensor for name, tensor in state.items()
            if type(name) is str and name.startswith(root)
            and name[len(root):].split(".")[0] in UNET_PARTS}


def config_from_state_dict(state):
    """The constructor's arguments that give these names and shapes; dropout cannot be known: 0."""
    unet = {name[len("model."):]: tensor for name, tensor in generator_state(state).items()}
    try:
        return _infer_config(unet)
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError("the state dict is not of a DDPM++, NCSN++ or ADM U-Net "
                        f"({type(error).__name__}: {str(error)[:80]})") from None


def _infer_config(unet):
    shape = {name: tuple(tensor.shape) for name, tensor in unet.items()}
    found = [re.match(r"dec\.(\d+)x\1_block(\d+)\.conv1\.weight$", name) for name in unet]
    found = [(int(m[1]), int(m[2])) for m in found if m]
    levels = sorted({res for res, _ in found}, reverse=True)
    last = max(i for _, i in found)  # num_blocks + 1 blocks at each level of the decoder
    res, adm = levels[0], "out_conv.weight" in unet
    first_width, img_channels = shape[f"enc.{res}x{res}_conv.weight"][:2]
    emb_width, noise_width = shape["map_layer0.weight"]
    width = noise_width if adm else first_width
    config = {
        "img_resolution": res, "img_channels": img_channels,
        "label_dim": shape.get("map_label.weight", (0, 0))[1],
        "augment_dim": shape.get("map_augment.weight", (0, 0))[1],
        "model_type": "DhariwalUNet" if adm else "SongUNet",
        "model_channels": width, "channel_mult_emb": emb_width // width,
        "num_blocks": last, "dropout": 0.0,
        "channel_mult": [shape[f"dec.{r}x{r}_block0.conv1.weight"][0] // width for r in levels],
        "attn_resolutions": [r for r in levels if f"dec.{r}x{r}_block{last}.qkv.weight" in unet]}
    if not adm:
        residual = any(name.endswith("_aux_residual.weight") for name in unet)
        filters = [tensor for name, tensor in unet.items() if name.endswith("resample_filter")]
        config |= {
            "embedding_type": "fourier" if "map_noise.freqs" in unet else "positional",
            "encoder_type": "residual" if residual else "standard", "decoder_type": "standard",
            "channel_mult_noise": noise_width // width,
            "resample_filter": _filter_taps(filters[0]) if filters else [1, 1]}
    return config


def _filter_taps(kernel):
    """f, up to its scale, of the kernel f f^T / (sum f)^2 [1,1,k,k]; whole numbers if it can be."""
    row = kernel[0, 0].double().sum(0)
    taps = (row / row[row != 0].abs().min()).tolist()
    return [round(tap) if abs(tap - round(tap)) < 1e-4 else tap for tap in taps]
