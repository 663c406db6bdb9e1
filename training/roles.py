"""The networks of a run, each a role: what they start from, what is saved, how they resume."""

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import nn

from base import distributed
from base.devices import compile_network, recompute
from base.distributed import say
from base.errors import UserError
from base.files import lines_digest
from edm_networks import EDMPrecond
from images import emoji
from images.captioned import prompts_for
from metrics.judge import dataset_of
from models import AdaptedWithHead, Guided, unguided
from presets.config import both_betas
from training.run_folder import judged_by
from weights import checkpoint
from weights.lora import LoRA
from weights.opening import Opened, find_teacher, open_network, steps_text
from weights.pipeline import with_text_encoder


def load_teacher(config, options, device):
    """A published network or pipeline, a file in one of the published formats, or a stage 0."""
    text = "unet" in options.network
    prompts = text and prompts_of(config, options)      # before a pipeline is fetched
    source = config.teacher if text else find_teacher(config.teacher, config.dataset)
    opened = open_network(source, teacher=True, dataset=config.dataset, cache=options.cache)
    if opened.sigmas:
        raise UserError(f"--teacher {config.teacher} is a student of {len(opened.sigmas)} steps")
    if ("unet" in opened.network.config) != text:
        raise UserError(f"--teacher {config.teacher} is {'not ' if text else ''}a text-to-image "
                        f"network, --dataset {config.dataset} is {'' if text else 'not '}one")
    if text:
        if opened.network.text_encoder is not None:
            raise UserError(f"--teacher {source} is a stage 0; first make a pipeline of it: python "
                            f"text_to_image.py export {source} FOLDER")
        opened.serve(prompts, device)
        side = opened.pipeline.size
        dataset_of((3, side, side), config.dataset, f"--teacher {config.teacher}")
        return opened
    made, wanted = opened.network.config, options.network
    if any(made[k] != wanted[k] for k in ("img_resolution", "img_channels")):
        raise UserError(f"--teacher {config.teacher} makes images of {made['img_resolution']} "
                        f"pixels and {made['img_channels']} channels, {config.dataset} has "
                        f"{wanted['img_resolution']} and {wanted['img_channels']}")
    if made["label_dim"] not in (0, wanted["label_dim"]):
        raise UserError(f"--teacher {config.teacher} is of {made['label_dim']} classes, "
                        f"{config.dataset} has {wanted['label_dim']}")
    return opened


def check_teacher(config, teacher):
    """Refuse what cannot be asked of this teacher."""
    low, high = teacher.levels.table[[0, -1]].tolist()
    beyond = [s for s in config.sigmas if not low * 0.999 <= s <= high * 1.001]
    if beyond:
        raise UserError(f"--sigmas {beyond[0]:g}: the teacher knows the noise levels from "
                        f"{low:.4g} to {high:.4g}")
    if config.guidance != 1 and not teacher.conditions.count:
        raise UserError(f"--guidance {config.guidance:g}: this teacher has no classes or prompts")


def starting_point(config, options, teacher, digest):
    """The checkpoint that a later stage starts from, or None for the teacher, of this digest."""
    path = Path(config.start_from) if config.start_from else None
    if path is None and config.method == "pmdd" and config.stage > 1:
        path = options.folder.parent / f"stage{config.stage - 1}" / "best.pt"
    if path is None:
        return None
    if not path.is_file():
        how = (f"python train.py --dataset {config.dataset} --stage {config.stage - 1} "
               f"--folder {options.folder.parent} makes it" if not config.start_from else
               "--start-from has to name the best.pt of a run that was made before")
        raise UserError(f"stage {config.stage} starts from {path}, which is no file; {how}")
    payload = checkpoint.load(path, needs=checkpoint.SAMPLED)
    if payload["dataset"] != config.dataset:
        raise UserError(f"{path} is of dataset {payload['dataset']}, this run of {config.dataset}")
    earlier = list(config.sigmas[:len(payload["sigmas"])])
    if list(payload["sigmas"]) != earlier:
        raise UserError(f"{path} was trained for --sigmas {payload['sigmas']}, this run continues "
                        f"{earlier}; give the same ones")
    if config.has_previous and len(earlier) < len(config.sigmas) - 1:
        raise UserError(f"{path} was trained for {steps_text(len(earlier))}, stage {config.stage} "
                        f"starts from {len(config.sigmas) - 1}: train the stage between first")
    if "adapted" not in payload:
        raise UserError(f"{path} holds no student with its adapted network; start from a best.pt "
                        "of a run's stage 1 or later")
    if payload["network"] != teacher.config:
        raise UserError(f"{path}, which stage {config.stage} starts from, has another architecture "
                        f"than the teacher {config.teacher}")
    if payload.get("lora", 0) != config.lora:
        raise UserError(f"{path} was trained with --lora {payload.get('lora', 0)}, this run has "
                        f"--lora {config.lora}; give the same")
    if config.lora and payload["made_from"]["teacher"] != digest:
        raise UserError(f"{path} is a LoRA of another base than --teacher {config.teacher}, which "
                        "has other weights; give the one that it was trained over")
    return payload


@dataclass
class Roles:
    """Every network of a run once; stage 0 has a student of real images and its average alone."""
    student: nn.Module
    ema: nn.Module
    teacher: nn.Module | None = None
    previous: nn.Module | None = None       # the frozen student of the stage before
    adapted: nn.Module | None = None        # with DMD2's head, where there is a GAN
    opened: Opened | None = None            # where the teacher came from, with its pipeline
    class_names: tuple = ()
    distance: Callable | None = None        # DMD's, between the student's images and the teacher's
    made_from: dict = field(default_factory=dict)       # hashes of the weights that they began with

    @property
    def base(self):
        """Name of the pipeline around networks of text to image, else nothing."""
        return self.opened and self.opened.base

    def wrap(self):
        """The trained networks as DistributedDataParallel sees them; alone, themselves."""
        self.student_ddp = distributed.parallel(self.student)
        self.adapted_ddp = self.adapted and distributed.parallel(self.adapted)


def load_roles(config, options, device):
    """Loaded, copied and on the device; stage 0 has an untrained network."""
    if config.stage == 0 and "unet" in options.network:
        roles = text_teacher_roles(config, options, device)
    elif config.stage == 0:
        torch.manual_seed(config.seed)
        student = EDMPrecond(**options.network)
        roles = Roles(trainable(student, augmented=config.augment > 0), copy.deepcopy(student))
    else:
        opened = load_teacher(config, options, device)
        teacher = opened.network
        check_teacher(config, teacher)
        made_from = {"teacher": checkpoint.weights_digest(teacher.state_dict())}
        begin = starting_point(config, options, teacher, made_from["teacher"])
        if begin:
            made_from["start"] = checkpoint.weights_digest(begin["ema"])
        roles = assemble(config, teacher, begin)
        roles.made_from, roles.opened = made_from, opened
        if opened.base:
            made_from["prompts"] = lines_digest(opened.network.conditions.texts)
    roles.class_names = options.class_names
    if options.compile:
        say("compiling the networks: the first iterations can take minutes")
    for network in (roles.teacher, roles.previous, roles.ema):
        if network is not None:
            network.requires_grad_(False)
    store_frozen(roles, options.precision)
    place(roles, options, device)
    return roles


def text_teacher_roles(config, options, device):
    """Stage 0 of text to image goes on from a pipeline's own U-Net and text encoder."""
    opened = load_teacher(config, options, device)
    student = with_text_encoder(opened.network, opened.pipeline)
    digest = checkpoint.weights_digest(student.state_dict())
    return Roles(trainable(student), copy.deepcopy(student), opened=opened,
                 made_from={"teacher": digest})


def place(roles, options, device):
    """Each network on the device, or sharded over those of all processes."""
    if (options.shard or options.recompute) and not roles.student.blocks:
        raise UserError(f"--{'shard' if options.shard else 'recompute'}: this teacher's network "
                        "cannot be divided; allowed: one with residual blocks as of EDM, Stable "
                        "Diffusion or SDXL")
    for name in ("teacher", "previous", "student", "adapted", "ema"):
        if (network := getattr(roles, name)) is not None:
            network.eval()                              # no dropout while distilling (Deviation 6)
            on_host = options.ema_on_host and name == "ema"
            if options.recompute and name not in ("previous", "ema"):       # these never go back
                recompute(bare(network).blocks)
            if options.shard:
                distributed.shard(network, device, on_host)
            else:
                network.to("cpu" if on_host else device)
            if options.compile:
                compile_network(network)


def whole_network(network, device):
    """Itself where a rank can use it alone; of what is sharded or waits on the host a copy, whole
    and on the device. Where it is sharded all ranks ask for theirs."""
    first = next(network.parameters())
    if not distributed.sharded(network) and first.device.type == torch.device(device).type:
        return network
    inner = unguided(network)
    state = {name: distributed.whole(value) for name, value in inner.state_dict().items()}
    copied = checkpoint.build_network(inner.config, state, "the run's own network").to(first.dtype)
    copied.conditions, copied.pixels = inner.conditions, inner.pixels
    copied = Guided(copied, network.weight) if inner is not network else copied
    return copied.to(device).eval().requires_grad_(False)


def store_frozen(roles, precision):
    """With bf16 what never learns is kept in it too, but for EDM's, which scale in their own type.

    The trained networks stay fp32: at these rates a bf16 weight would not move.
    """
    if precision == "bf16" and "unet" in roles.student.config:
        for network in (roles.teacher, roles.previous, roles.opened and roles.opened.pipeline):
            if network is not None:
                network.to(torch.bfloat16)


def assemble(config, teacher, begin=None):
    """The networks of a stage that starts from the teacher, or from a checkpoint (Deviation 9)."""
    start = teacher
    if config.lora:
        torch.manual_seed(config.seed)                  # the adapters' first weights
        start = LoRA(teacher, config.lora)
    adapted = copy.deepcopy(start)
    if begin and config.lora:
        start.load_state_dict(begin["ema"])
    elif begin:
        start = checkpoint.network_from(begin)
    for asked in ("conditions", "pixels"):              # of its pipeline, where it has one
        setattr(start, asked, getattr(teacher, asked))
    if config.gan_weight:
        torch.manual_seed(config.seed)                  # the head's first weights
        adapted = AdaptedWithHead(adapted)
    if begin:
        bare(adapted).load_state_dict(begin["adapted"])
        if config.gan_weight and begin.get("head"):
            adapted.head.load_state_dict(begin["head"])
    guided = teacher if config.guidance == 1 else Guided(teacher, config.guidance)
    return Roles(trainable(copy.deepcopy(start)), copy.deepcopy(start), guided,
                 start if config.has_previous else None, trainable(adapted))


def prompts_of(config, options):
    prompts = prompts_for(config.dataset, options.prompts, emoji.PICTURES)
    if not prompts:
        raise UserError("text to image is trained on prompts: give --prompts FILE, one a line")
    return prompts


def trainable(network, augmented=False):
    """All weights, but those of augmentation labels where nothing gives these: no gradient reaches
    them, and DistributedDataParallel would wait for one."""
    network.requires_grad_(True)
    for name, parameter in network.named_parameters():
        if "map_augment" in name and not augmented:
            parameter.requires_grad_(False)
    return network


def bare(adapted):
    """The adapted network without DMD2's head."""
    return adapted.network if isinstance(adapted, AdaptedWithHead) else adapted


def saved_networks(roles):
    """What a checkpoint holds of each trained network, by name."""
    networks = {"student": roles.student, "ema": roles.ema}
    if roles.adapted is not None:
        networks["adapted"] = bare(roles.adapted)
    if isinstance(roles.adapted, AdaptedWithHead):
        networks["head"] = roles.adapted.head
    return networks


def payload(config, roles, optimizers, iteration, seconds, best_fid, scores):
    """Everything that latest.pt holds. Of a sharded run all ranks call it, and rank 0 has it."""
    content = {"dataset": config.dataset, "method": config.method, "stage": config.stage,
               "sigmas": list(config.sigmas), "network": roles.student.config,
               "iteration": iteration, "seconds": seconds, "fid": scores, "best_fid": best_fid,
               "made_from": roles.made_from, "teacher": config.teacher,
               "class_names": list(roles.class_names)}
    if config.lora:
        content["lora"] = config.lora
    for name, network in saved_networks(roles).items():
        content[name] = distributed.whole_on_rank_zero(network.state_dict())
    if roles.base:
        content["pipeline"] = roles.base
    content["optimizers"] = [distributed.whole_on_rank_zero(optimizer.state_dict())
                             for optimizer in optimizers]
    return content


def load_network(network, state):
    """Whole weights into a network, which may be sharded."""
    own = network.state_dict()
    network.load_state_dict({name: distributed.share_of(value, own.get(name))
                             for name, value in state.items()})


def load_optimizer(optimizer, state):
    """Likewise; of AdamW's three values for a weight the step is one number."""
    weights = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    optimizer.load_state_dict(state | {"state": {
        k: {name: distributed.share_of(value, weights.get(k) if value.dim() else None)
            for name, value in moments.items()} for k, moments in state["state"].items()}})


class Before(NamedTuple):
    """What a run has behind it when it goes on."""
    iterations: int = 0
    seconds: float = 0.0
    best_fid: float = math.inf
    unscored: bool = False              # stopped before it could be evaluated
    lost: bool = False                  # done, and its best.pt is gone


def resume(config, options, roles, optimizers):
    """Load latest.pt into the roles; returns what came before."""
    folder = options.folder
    saved = checkpoint.load_latest(folder, say=say, needs=checkpoint.RESUMED)   # on the CPU
    distributed.same_everywhere(saved and saved["iteration"], f"the checkpoints in {folder}")
    best_fid = checkpoint.best_fid(folder, judged_by(config, options))
    if saved is None:
        return Before(best_fid=best_fid)
    for what, digest in saved.get("made_from", {}).items():
        if digest != roles.made_from.get(what) and not options.force:
            name = {"teacher": f"--teacher {config.teacher}",
                    "start": "the checkpoint that this stage starts from",
                    "prompts": f"--prompts {options.prompts}"}[what]
            held = "prompts" if what == "prompts" else "weights"
            raise UserError(f"{name} holds other {held} than when {folder} was begun; put them "
                            "back, choose another --folder, or go on all the same with --force")
    networks = saved_networks(roles)
    if (saved["network"] != roles.student.config or saved.get("lora", 0) != config.lora
            or ("head" in networks) != ("head" in saved)):
        raise UserError(f"{folder} holds a run of another architecture; choose another --folder")
    try:
        for name, network in networks.items():
            load_network(network, saved[name])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            load_optimizer(optimizer, state)
    except (RuntimeError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} holds a checkpoint whose weights do not fit its own "
                        "architecture; choose another --folder") from None
    for optimizer, betas in zip(optimizers, both_betas(config)):
        for group in optimizer.param_groups:            # a flag may have changed them
            group.update(betas=betas, weight_decay=config.weight_decay)
    say(f"resuming {folder} after {saved['iteration']} iterations")
    seconds = saved.get("seconds", 0.0)                 # 0 of a run that did not keep them yet
    lost = saved["iteration"] >= config.iterations and not (folder / "best.pt").exists()
    return Before(saved["iteration"], seconds, best_fid, not saved["fid"] or lost, lost)
