"""An iteration of a stage on the meta device: shapes alone, nothing is computed."""

import copy
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from base.devices import recompute
from images.real import Images
from models import Conditions, unguided
from training.draws import Sources, draw
from training.kept import Rows
from training.roles import Roles, assemble, bare, store_frozen, trainable
from weights.checkpoint import untrained

TOKENS = 77                             # of a prompt, as CLIP has them


class Pass(NamedTuple):
    """One pass of a network, as an iteration makes it."""
    role: str                   # teacher, previous, student, adapted; distance: the regression's
    batches: int                # stacked in this pass
    gradient: str               # "none"; "input": through frozen weights; "weights": into them
    output: str                 # "denoised", or the discriminator's "logits"


class Remembered(TorchDispatchMode):
    """The meta device's kernels are slow Python: what was asked before has the shapes of before."""

    made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if views_or_writes(function):
            return function(*args, **kwargs)
        asked = function, kind_of(args), kind_of(tuple(kwargs.items()))
        if asked not in self.made:
            result = function(*args, **kwargs)
            if ({one.device.type for one in tensors(result)} != {"meta"} or
                    not storages(result).isdisjoint(storages((args, kwargs)))):
                return result                       # a number on the host; an unsafe view
            self.made[asked] = result
        return tree_map_only(torch.Tensor, anew, self.made[asked])


@cache
def views_or_writes(function):
    schema = function._schema
    return any(one.alias_info for one in (*schema.arguments, *schema.returns))


def tensors(tree):
    return [one for one in tree_leaves(tree) if isinstance(one, torch.Tensor)]


def storages(tree):
    return {one.untyped_storage()._cdata for one in tensors(tree)}


def kind_of(value):
    """What the shapes of a result depend on."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple(map(kind_of, value))
    return type(value), value


def anew(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class Unmoved:
    """What AdamW holds of a network: two moments of each trained weight."""

    def __init__(self, network, keeps_gradients=False):
        self.param_groups = [{"params": list(network.parameters())}]
        self.found_inf = torch.zeros((), device=self.param_groups[0]["params"][0].device)
        self.keeps_gradients = keeps_gradients
        self.moments = []

    def step(self):
        trained = [p for p in self.param_groups[0]["params"] if p.requires_grad]
        self.moments = self.moments or [torch.empty_like(p) for p in trained for _ in range(2)]

    def zero_grad(self, set_to_none):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = parameter.grad if self.keeps_gradients else None


def shapes_alone(network, device="meta"):
    """A network, as a rule on the meta device, that can be asked without a pipeline."""
    with torch.device(device):
        built = untrained(network).eval()
        if "unet" in network:
            width = TOKENS * built.text_width + sum(built.y_rest)
            built.conditions = Conditions(
                2 ** 20, lambda index: torch.empty(len(index), width, device="meta"),
                torch.empty(1, width), on_host=True)
    return built


class Rehearsal:
    """A stage's networks and sources, as a rule on the meta device, and the iteration that runs on
    them."""

    def __init__(self, iterate, config, network, precision="fp32", recomputed=False,
                 device="meta"):
        self.iterate, self.config, self.passes = iterate, config, []
        with torch.device(device):
            teacher = shapes_alone(network, device)
            self.roles = roles = (assemble(config, teacher) if config.stage else
                                  Roles(trainable(teacher), copy.deepcopy(teacher)))
        roles.previous = roles.previous and copy.deepcopy(roles.previous)
        roles.distance = self.distance
        roles.student_ddp, roles.adapted_ddp = roles.student, roles.adapted
        for name in ("teacher", "previous", "student", "adapted"):
            if network := unguided(getattr(roles, name)):
                network.requires_grad_(name in ("student", "adapted"))
                network.register_forward_hook(self.hook(name), with_kwargs=True)
                if recomputed:                          # a mode does not reach into a backward pass
                    recompute(bare(network).blocks,
                              context_fn=lambda: (nullcontext(), self.autocast))
        roles.ema.requires_grad_(False)
        store_frozen(roles, precision)

        # Stand-ins for files: blank images, and one pair for all.
        shape, images, pair = teacher.shape, None, None
        if config.gan_weight or config.stage == 0:
            blank = np.zeros(shape, np.uint8)
            images = Images("blank", shape, np.zeros(2 ** 20, np.int64), lambda index: blank, 1)
        if config.regression_weight:
            row = np.zeros(1, [("z", np.float32, shape), ("image", np.float16, shape),
                               ("index", np.int64)])
            pair = Rows([np.broadcast_to(row, config.regression_pairs)], config.regression_pairs)
        self.sources = Sources(shape, teacher.levels.to(device), teacher.conditions, images, pair)

    def hook(self, role):
        def record(network, inputs, options, output):
            trained = any(p.requires_grad for p in network.parameters())
            gradient = ("none" if not torch.is_grad_enabled() else "weights" if trained else
                        "input" if inputs[0].requires_grad else "none")
            self.passes.append(Pass(role, len(inputs[0]), gradient,
                                    options.get("output", "denoised")))
        return record

    def distance(self, x, y):
        """In place of LPIPS, whose own memory and FLOPs are not counted."""
        self.passes.append(Pass("distance", len(x), "input", "denoised"))
        return (x - y).square().mean((1, 2, 3))

    def run(self, step, optimizers, world_size=1, batch_per_gpu=1, parts=1, autocast=nullcontext):
        """The passes of this iteration, of a few of a rank's parts."""
        share = SimpleNamespace(world_size=world_size, batch_per_gpu=batch_per_gpu)
        every_part = draw(self.config, step, self.sources, share)
        self.passes = []

        def entered():
            self.autocast = autocast()
            return self.autocast

        self.iterate(self.config, self.roles, optimizers, every_part[:parts],
                     step % self.config.ttur == 0, entered)
        return self.passes

    def optimizers(self, keep_gradients=False):
        return [Unmoved(network, keep_gradients) for network in (self.roles.student,
                                                                  self.roles.adapted) if network]
