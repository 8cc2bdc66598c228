"""Process group and device mesh of the processes that torchrun started."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store, _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from ..validation import check_integer, invalid

WHERE = "parallel.start"
# Outermost first: ranks of a context exchange most, and are on one machine.
DIMENSIONS = ("data", "guidance", "context")
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(minutes=10)  # longer than the first step of a compiled model


def start(
    guidance: int = 1,
    context: int | None = None,
    data: int = 1,
    device: str | None = None,
    timeout: timedelta = TIMEOUT,
) -> DeviceMesh:
    """Start torch.distributed and arrange its processes in a mesh.

    Args:
        guidance: groups of ranks for the two predictions of guidance, 1 or 2.
        context: ranks that share a sequence; by default all that are left.
        data: groups that make videos of their own.
        device: "cuda", with NCCL, or "cpu", with gloo; by default "cuda" if there is a GPU. A
            process takes the GPU of its number on its machine.
        timeout: of a message. A rank that is frozen ends the others after it.

    Returns:
        A mesh of three dimensions, "data", "guidance" and "context". A process group that has been
        started already is used as it is.

    Raises:
        RuntimeError: the processes were not started by torchrun, or by one that cannot start those
            of several machines again; or there are fewer GPUs than processes on this machine.
        ValueError: the product of the sizes is not the number of processes.
    """
    guidance, data = check_integer(WHERE, "guidance", guidance), check_integer(WHERE, "data", data)
    if guidance not in (1, 2):
        raise invalid(WHERE, "guidance", "1 or 2, the predictions of guidance", guidance)
    if device not in (None, "cpu", "cuda"):
        raise invalid(WHERE, "device", '"cpu", "cuda" or None', repr(device))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    world = world_size()
    if context is None:
        context = max(1, world // (guidance * max(1, data)))
    sizes = data, guidance, check_integer(WHERE, "context", context)
    if min(sizes) < 1 or data * guidance * context != world:
        product = f"{data} x {guidance} x {context} = {data * guidance * context}"
        wanted = f"the number of processes, {world}"
        raise invalid(WHERE, "data x guidance x context", wanted, product)
    given = dist.group.WORLD
    if given is None:
        prefix = _prefix_of_attempt()
        if kind == "cuda":
            _take_gpu()
        # Objects are sent by gloo, tensors of a GPU by NCCL.
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        found, rank, _ = next(rendezvous("env://", timeout=timeout))
        store: Store = PrefixStore(prefix, found) if prefix else found
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    mesh = init_device_mesh(kind, sizes, mesh_dim_names=DIMENSIONS)
    # made here, so that `vae_parallel` finds it with this timeout; a mesh gives its groups torch's
    of_a_video = mesh[DIMENSIONS[1:]]._flatten()
    for group in (*mesh.get_all_groups(), of_a_video.get_group()):
        if group is not given:
            _set_pg_timeout(timeout, group)
    return mesh


def stop() -> None:
    """End the process group, after the last message. Not after an error: it would wait."""
    if dist.is_initialized():
        dist.destroy_process_group()


def launched() -> bool:
    """True in a process of torchrun, or of a process group."""
    return dist.is_initialized() or not _missing()


def rank() -> int:
    """Number of this process, before or after `start`; 0 without other processes."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if launched() else 0


def world_size() -> int:
    """Number of processes. Raises RuntimeError if torchrun did not start this one."""
    if dist.is_initialized():
        return dist.get_world_size()
    if missing := _missing():
        raise RuntimeError(
            f"{WHERE}: must be called by processes of torchrun; {', '.join(missing)} not set. Type "
            "torchrun --nproc-per-node GPUS program.py"
        )
    return int(os.environ["WORLD_SIZE"])


def attempt() -> tuple[int, int]:
    """Number of torchrun's attempt, from 0, and of its last one; (0, 0) without torchrun."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
    now, last = (int(os.environ.get(name, 0)) for name in counts)
    return now, last


def is_other_rank() -> bool:
    """True in a process of torchrun that is not the first; torchrun reports its error."""
    return dist.is_torchelastic_launched() and rank() > 0


def _missing() -> list[str]:
    return [name for name in VARIABLES if name not in os.environ]


def _prefix_of_attempt() -> str:
    """Prefix of keys in a store that torchrun 2.13 keeps for the next attempt; else "".

    It holds addresses of the dead. Agents number attempts each for itself, so that machines that
    share a store do not agree on a prefix.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return ""
    now, last = attempt()
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        return str(now)
    if last:
        raise RuntimeError(
            f"{WHERE}: must have a new store for each attempt of several machines; torchrun with "
            "--max-restarts shares one: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, on "
            "each machine"
        )
    return ""


def _take_gpu() -> None:
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        raise RuntimeError(
            f"{WHERE}: must have a GPU for each process of this machine; got {count} for process "
            f"{local + 1}: lower torchrun's --nproc-per-node"
        )
    torch.cuda.set_device(local)
