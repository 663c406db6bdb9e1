"""The networks of a run and what they start from: teacher, student, adapted, previous, average."""

import copy
from pathlib import Path
from types import SimpleNamespace

import torch

from weights import checkpoint
from base import distributed
from edm_networks import EDMPrecond
from base.errors import UserError
from models import AdaptedWithHead
from weights.opening import compile_network, open_network, steps_text
from training.cost import has_previous
from presets import NETWORKS
from weights.pretrained import PUBLISHED_NETWORKS

HERE = Path(__file__).resolve().parents[1]


def load_teacher(config, options):
    """A published network, a file in one of the published formats, or a stage 0 of ours."""
    source = config.teacher
    if source not in PUBLISHED_NETWORKS:
        source = Path(source) if Path(source).exists() else HERE / source
        if not source.is_file():
            raise UserError(f"--teacher {config.teacher}: no such file and no published name; "
                            f"published: {', '.join(PUBLISHED_NETWORKS)}; or make one: "
                            f"python train.py --dataset {config.dataset} --stage 0")
    opened = open_network(source, teacher=True, dataset=config.dataset, cache=options.cache)
    if opened.sigmas:
        raise UserError(f"--teacher {config.teacher} is a student of {len(opened.sigmas)} steps")
    made, wanted = opened.network.config, NETWORKS[config.dataset]
    if any(made[k] != wanted[k] for k in ("img_resolution", "img_channels")):
        raise UserError(f"--teacher {config.teacher} makes images of {made['img_resolution']} "
                        f"pixels and {made['img_channels']} channels, {config.dataset} has "
                        f"{wanted['img_resolution']} and {wanted['img_channels']}")
    return opened.network


def starting_point(config, options):
    """The checkpoint that a later stage starts from, or None for the teacher."""
    path = Path(config.start_from) if config.start_from else None
    if path is None and config.method == "pmdd" and config.stage > 1:
        path = options.folder.parent / f"stage{config.stage - 1}" / "best.pt"
    if path is None:
        return None
    if not path.is_file():
        how = (f"python train.py --dataset {config.dataset} --stage {config.stage - 1} "
               f"--folder {options.folder.parent} makes it" if not config.start_from else
               "the run before it has to be made first, or --start-from has to name another")
        raise UserError(f"stage {config.stage} starts from {path}, which is not there; {how}")
    payload = checkpoint.load(path, needs=checkpoint.SAMPLED)
    if payload["dataset"] != config.dataset:
        raise UserError(f"{path} is of dataset {payload['dataset']}, this run of {config.dataset}")
    earlier = list(config.sigmas[:len(payload["sigmas"])])
    if list(payload["sigmas"]) != earlier:
        raise UserError(f"{path} was trained for --sigmas {payload['sigmas']}, this run continues "
                        f"{earlier}; give the same ones")
    if has_previous(config) and len(earlier) < len(config.sigmas) - 1:
        raise UserError(f"{path} was trained for {steps_text(len(earlier))}, stage {config.stage} "
                        f"starts from {len(config.sigmas) - 1}: train the stage between first")
    if "adapted" not in payload:
        raise UserError(f"{path} holds a student but no adapted network; start from a best.pt of "
                        "a run")
    return payload


def load_roles(config, options, device):
    """Every network once: the teacher and the previous student frozen, the average a copy."""
    teacher = load_teacher(config, options)
    begin = starting_point(config, options)
    made_from = {"teacher": checkpoint.weights_digest(teacher.state_dict())}
    network = teacher
    if begin:
        made_from["start"] = checkpoint.weights_digest(begin["ema"])
        if begin["network"] != teacher.config:
            raise UserError(f"the checkpoint that stage {config.stage} starts from has another "
                            f"architecture than the teacher {config.teacher}")
        network = checkpoint.network_from(begin)
    student, adapted = copy.deepcopy(network), copy.deepcopy(teacher)
    if config.gan_weight:
        torch.manual_seed(config.seed)                   # the head's first weights
        adapted = AdaptedWithHead(adapted)
    if begin:
        bare(adapted).load_state_dict(begin["adapted"])
        if config.gan_weight and begin.get("head"):
            adapted.head.load_state_dict(begin["head"])
    # The previous student gives the inputs and the unforget targets of PMDD's later stages.
    previous = network if has_previous(config) else None
    ema = copy.deepcopy(student)
    for frozen in (teacher, previous, ema):
        if frozen is not None:
            frozen.requires_grad_(False)
    for trained in (student, adapted):
        make_trainable(trained)
    for role in (teacher, previous, student, adapted, ema):
        if role is not None:
            role.to(device).eval()                       # no dropout anywhere (Deviation 6)
            if options.compile:
                compile_network(role)
    return SimpleNamespace(teacher=teacher, previous=previous, student=student, adapted=adapted,
                           ema=ema, made_from=made_from)


def make_trainable(network):
    """All weights but those of augmentation labels, which nothing here gives: no gradient reaches
    them, and DistributedDataParallel would wait for one."""
    network.requires_grad_(True)
    for name, parameter in network.named_parameters():
        if "map_augment" in name:
            parameter.requires_grad_(False)


def new_teacher(config, options, network_config, device):
    """Stage 0: an untrained network as the student of the data, and its average."""
    torch.manual_seed(config.seed)
    student = EDMPrecond(**network_config).to(device)
    make_trainable(student)
    ema = copy.deepcopy(student).eval().requires_grad_(False)
    if options.compile:
        compile_network(student)
    return SimpleNamespace(teacher=None, previous=None, student=student, adapted=None, ema=ema,
                           made_from={})


def payload(config, roles, optimizers, iteration, best_fid, scores):
    """Everything that latest.pt holds."""
    with_head = isinstance(roles.adapted, AdaptedWithHead)
    whole = {"dataset": config.dataset, "method": config.method, "stage": config.stage,
             "sigmas": list(config.sigmas), "network": roles.student.config, "iteration": iteration,
             "fid": scores, "best_fid": best_fid, "made_from": roles.made_from,
             "ema": roles.ema.state_dict()}
    if roles.adapted is not None:
        whole["adapted"] = bare(roles.adapted).state_dict()
    if with_head:
        whole["head"] = roles.adapted.head.state_dict()
    if optimizers:
        whole["student"] = roles.student.state_dict()
        whole["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    return whole


def bare(adapted):
    """The adapted network without DMD2's head."""
    return adapted.network if isinstance(adapted, AdaptedWithHead) else adapted


def resume(config, options, roles, optimizers):
    """Load latest.pt into the roles. Returns iterations done, best FID, whether it has no score."""
    folder = options.folder

    def say(text):
        if distributed.rank() == 0:
            print(text, flush=True)

    needs = checkpoint.RESUMED
    saved = checkpoint.load_latest(folder, say=say, needs=needs)    # on the CPU, not twice on a GPU
    if saved is None:
        return 0, checkpoint.best_fid(folder), False
    for what, digest in saved.get("made_from", {}).items():
        if digest != roles.made_from.get(what) and not options.force:
            name = {"teacher": f"--teacher {config.teacher}",
                    "start": "the checkpoint that this stage starts from"}[what]
            raise UserError(f"{name} holds other weights than when {folder} was begun; put them "
                            "back, choose another --folder, or go on all the same with --force")
    with_head = isinstance(roles.adapted, AdaptedWithHead)
    if saved["network"] != roles.student.config or with_head != ("head" in saved):
        raise UserError(f"{folder} holds a run of another architecture; choose another --folder")
    networks = {"student": roles.student, "ema": roles.ema}
    if roles.adapted is not None:
        networks["adapted"] = bare(roles.adapted)
    if with_head:
        networks["head"] = roles.adapted.head
    try:
        for name, network in networks.items():
            network.load_state_dict(saved[name])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} holds a checkpoint whose weights do not fit its own "
                        "architecture; choose another --folder") from None
    for optimizer in optimizers:
        for group in optimizer.param_groups:            # a flag may have changed them
            group.update(betas=config.betas, weight_decay=config.weight_decay)
    say(f"resuming {folder} after {saved['iteration']} iterations")
    return saved["iteration"], checkpoint.best_fid(folder), not saved["fid"]
