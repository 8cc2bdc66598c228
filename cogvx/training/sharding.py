"""World of a training: FSDP2, DDP, and checkpoints that any number of ranks reads (DCP)."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from cogvx_kernels.context_parallel import Context

from .. import parallel
from ..transformer import ExpertTransformer
from ..transformer.module_utils import is_sharded
from .recipe import TransformerTraining

TIMEOUT = timedelta(minutes=30)  # of ranks that wait for rank 0 to write samples


@dataclass(frozen=True)
class World:
    """This process and the others of a training.

    device   of this one
    rank     number of this one, of `size`
    context  ranks that share a clip; each group of them has clips of its own
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    context: int = 1

    @property
    def main(self) -> bool:
        """True on the rank that writes files and reports progress."""
        return self.rank == 0

    @property
    def data(self) -> tuple[int, int]:
        """Number of this rank's group, whose ranks have the same clips, and of groups."""
        return self.rank // self.context, self.size // self.context

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


def start(device: torch.device) -> World:
    """Join the ranks that torchrun, or what sets its variables, started; else this process alone.

    device  "cuda" is the GPU of the rank's number on its machine
    """
    if not parallel.launched():
        return World(device)
    parallel.start(device=device.type, timeout=TIMEOUT)
    if device.type == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank())
    return World(device, dist.get_rank(), dist.get_world_size())


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of a tensor over all ranks, on each of them; without gradient."""
    if not dist.is_initialized():
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def make_context(world: World) -> Context | None:
    """Context of the ranks that share this one's clips; None if it has them alone."""
    if world.context == 1:
        return None
    sizes, names = (world.size // world.context, world.context), ("data", "context")
    return Context.of(init_device_mesh(world.device.type, sizes, mesh_dim_names=names)["context"])


def shard(transformer: ExpertTransformer, world: World, options: TransformerTraining) -> None:
    """Keep a part of each block's weights, gradients and optimizer state on each rank (FSDP2).

    With the precision bfloat16 weights are gathered in it, and gradients summed in float32. Inputs
    are left to autocast, since cos and sin must stay in float32.
    """
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if options.precision == "bfloat16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # Gates are views of a product, and nothing writes into them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in transformer.transformer_blocks:
        if options.compile:
            block.compile(dynamic=False)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # True, or the root's weights would stay whole after samples, and miss the copy of EMA or back.
    fully_shard(transformer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def replicate(loss: nn.Module, world: World) -> nn.Module:
    """Average gradients over ranks (DDP), unless FSDP2 does it or this rank is alone."""
    if world.size == 1 or any(map(is_sharded, loss.parameters())):
        return loss
    return DistributedDataParallel(loss)


def no_sync(loss: nn.Module) -> AbstractContextManager[Any]:
    """Leave gradients on their rank, before the last part of a step.

    FSDP2 reduces those of each part: whole ones would take the memory that sharding saves.
    """
    return loss.no_sync() if isinstance(loss, DistributedDataParallel) else nullcontext()


def whole_weights(loss: nn.Module) -> dict[str, Tensor]:
    """Trained weights and buffers, whole, on the CPU of rank 0; every rank must call this."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights: dict[str, Any] = get_model_state_dict(loss, options=options)
    return weights


def training_state(loss: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Tensors of the trained weights, buffers and optimizers by name, without copies."""
    options = StateDictOptions(ignore_frozen_params=True)
    return {
        "model": get_model_state_dict(loss, options=options),
        "optimizer": get_optimizer_state_dict(loss, optimizers)["state"],
    }


def save_state(state: dict[str, Any], folder: Path) -> None:
    """Write tensors to a folder; every rank must call this, and writes a part."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # by a rank alone
        save(state, checkpoint_id=folder)


def load_state(state: dict[str, Any], folder: Path) -> None:
    """Read tensors in place, whatever the number of ranks that wrote them.

    Raises ValueError for a folder of another format.
    """
    if not (folder / ".metadata").is_file():
        raise ValueError(
            f"{folder}: is no checkpoint of this version of cogvx, whose format is that of "
            "torch.distributed.checkpoint; finish the training with the version that began it, or "
            f"remove {folder.parent} to train this stage from its start"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(state, checkpoint_id=folder)
