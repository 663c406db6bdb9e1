"""What processes and threads do together; with one process every function on ranks is a no-op."""

import contextlib
import datetime
import os
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from base.devices import keep_freed_memory
from base.errors import UserError


def start(device=None):
    """The device of this process; joins the group when torchrun started us."""
    local_rank, here = (int(os.environ.get(f"LOCAL_{name}", default))
                        for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: no CUDA device is available here; use --device cpu")
        if here > torch.cuda.device_count():
            raise UserError(f"--nproc_per_node={here} is above the {torch.cuda.device_count()} "
                            "GPUs here")
        torch.cuda.set_device(local_rank)
    mine = torch.device("cuda", local_rank) if kind == "cuda" else None
    if launched() and "MASTER_ADDR" not in os.environ:
        raise UserError("RANK and WORLD_SIZE are set, MASTER_ADDR is not: start with torchrun, "
                        "which sets all of them, or unset these two")
    if launched() and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if mine else "gloo", **meeting_place(),
                                device_id=mine, timeout=datetime.timedelta(hours=6))
    if kind == "cpu":
        keep_freed_memory()
    return mine or torch.device("cpu")


def launched():
    """Whether torchrun started us."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def processes():
    """How many there will be, before they have met."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def meeting_place():
    """Where the processes find each other, if it has to be said.

    After --max-restarts torchrun's store still holds the addresses of the dead:
    each attempt gets names of its own. The attempts of several nodes are counted apart: not there.
    """
    env = os.environ
    if (env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or "TORCHELASTIC_RESTART_COUNT" not in env
            or env.get("LOCAL_WORLD_SIZE") != env["WORLD_SIZE"]):
        return {}
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(f"attempt {env['TORCHELASTIC_RESTART_COUNT']}", store)
    return {"store": store, "rank": int(env["RANK"]), "world_size": int(env["WORLD_SIZE"])}


def finish():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text):
    if rank() == 0:
        print(text, flush=True)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def parallel(module):
    """DistributedDataParallel without a second copy of the gradients; alone or sharded, itself."""
    if not dist.is_initialized() or sharded(module):
        return module
    return DistributedDataParallel(module, gradient_as_bucket_view=True,
                                   forward_sync_buffers=False)


def sync_gradients(module, last):
    """Forward and backward under this: gradients are summed over ranks at the last part only."""
    if hasattr(module, "set_requires_gradient_sync"):   # sharded
        module.set_requires_gradient_sync(last)
    alone = last or not isinstance(module, DistributedDataParallel)
    return contextlib.nullcontext() if alone else module.no_sync()


def shard(module, device, on_host=False):
    """torch's fully_shard, on the device: a rank has its share of every weight and, only while it
    computes, one block of them whole. With on_host the shares wait on the host."""
    from torch.distributed import fsdp      # most of a second, which no other run has to wait

    mesh = dist.init_device_mesh(device.type, (world_size(),))
    policy = fsdp.CPUOffloadPolicy(device.type == "cuda") if on_host else fsdp.OffloadPolicy()
    warnings.filterwarnings("ignore", "FSDP2-wrapped .* returned a view")       # none is written to
    for part in [*module.blocks, module]:
        fsdp.fully_shard(part, mesh=mesh, reshard_after_forward=True, offload_policy=policy)


def sharded(module):
    return hasattr(module, "set_requires_gradient_sync")        # of FSDPModule


def whole(value):
    """A sharded tensor gathered, on every rank at once; anything else as it is."""
    if hasattr(value, "full_tensor"):                   # a DTensor
        return value.to(value.device_mesh.device_type).full_tensor()
    return value


def whole_on_rank_zero(state):
    """Tensors of a state dict as `whole`, but kept on the host of rank 0 alone."""
    def take(value):
        gathered = whole(value)
        return value if gathered is value else gathered.cpu() if rank() == 0 else None

    return tree_map(take, state)


def share_of(value, like):
    """This rank's share of a tensor, where `like` is sharded; else the tensor."""
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh = like.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, like.placements, src_data_rank=None)


def any_rank(flag):
    """True on every rank if it is True on one; no device is waited for."""
    votes = torch.tensor(float(flag))
    if dist.is_initialized():
        dist.all_reduce(votes)
    return votes.item() > 0


def same_everywhere(value, what):
    """Refuse to begin where a rank sees something else than rank 0."""
    first = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(first)
    if first != [value]:
        raise UserError(f"{what} are others for process {rank()} than for the first one ({value}, "
                        f"{first[0]}): all need one folder that each of them sees")


def mean_over_ranks(values):
    """The mean of a tensor over the ranks, as a list of floats."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values.tolist()


def in_parallel(task, blocks, device):
    """task(block) for each block, in order.

    On CPU each block has one thread and several run at once: faster than dividing every operation
    between threads, and the number of cores cannot change the order of a sum.
    """
    workers, pending = torch.get_num_threads(), deque()
    if device.type != "cpu" or workers == 1:
        yield from map(task, blocks)
        return
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for block in blocks:
            pending.append(pool.submit(task, block))
            if len(pending) > 2 * workers:                  # memory does not grow with the work
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(workers)      # the workers' 1 has become the default of new threads


def from_rank_zero(load):
    """load() on rank 0 first, so that one process downloads and the others find the file."""
    for turn in (rank() == 0, rank() > 0):
        if turn:
            result = load()
        barrier()
    return result


def gather(value):
    """The values of all ranks, in order, on rank 0; on any other nothing."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def gathered(task, blocks, device):
    """The results of all blocks, shared over the ranks, in order on rank 0."""
    mine = in_parallel(task, blocks[rank()::world_size()], device)
    for _ in range(0, len(blocks), world_size()):
        yield from (part for part in gather(next(mine, None)) if part is not None)
