"""The ranks that make one video, and what they share."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from cogvx_kernels.context_parallel import Context

from ..transformer import ExpertTransformer

T = TypeVar("T")
GRACE = timedelta(seconds=10)  # ranks that wait for another time out within it of each other
WITHIN = ("context", "guidance")  # dimensions of the ranks of one video, innermost first
CALLS = count()  # of `watched` in this process: the ranks of a video make the same ones
# Texts of gloo's errors, which are plain RuntimeErrors, and of those that torch makes of c10d's.
MESSAGES = re.compile(
    r"\bgloo/|\bc10d\b|\bNCCL\b|Application timeout caused pair closure|"
    r"Connection (?:closed|reset) by peer"
)


def context_parallel(model: Any, mesh: DeviceMesh | None) -> None:
    """Run a pipeline, or a transformer alone, on the ranks of a mesh of `start`.

    Each rank has the whole model, and calls it with the same arguments. The sequence is split over
    the dimension "context"; a pipeline computes the predictions of guidance on the two groups of
    "guidance", if there are two. None takes it out again.

    The transformer may be what `torch.compile` returned.

    Raises TypeError for another model, ValueError for a mesh on another device or without these
    dimensions.
    """
    transformer = part = getattr(model, "transformer", model)
    transformer = getattr(part, "_orig_mod", part)
    if not isinstance(transformer, ExpertTransformer):
        got = f"{type(model).__name__}{f' of {type(part).__name__}' if part is not model else ''}"
        raise TypeError(
            f"context_parallel: model must be a CogVideoX or an ExpertTransformer; got {got}"
        )
    ranks = None if mesh is None else Ranks(mesh)
    if ranks is not None:
        place = next(transformer.parameters()).device.type
        if ranks.mesh.device_type != place:
            raise ValueError(
                f"context_parallel: model must be on the mesh's device, {ranks.mesh.device_type}; "
                f"got {place}"
            )
    transformer.context = None if ranks is None else ranks.along("context")
    if model is not part:
        model.ranks = ranks


@dataclass(frozen=True)
class Ranks:
    """The ranks of a mesh that make one video with this one."""

    mesh: DeviceMesh

    def __post_init__(self) -> None:
        names = self.mesh.mesh_dim_names or ()
        if [name for name in names if name in WITHIN] != list(WITHIN[::-1]):
            raise ValueError(
                "context_parallel: mesh must have the dimensions guidance and context, as of "
                f"parallel.start; got {', '.join(names) or 'none with a name'}"
            )

    def along(self, dimension: str) -> Context | None:
        """Context of this rank's group along a dimension; None for a group of one."""
        group = self.mesh.get_group(dimension)
        return Context.of(group) if group.size() > 1 else None

    @property
    def several(self) -> bool:
        """True if a video has more ranks than one."""
        return any(self.mesh[name].size() > 1 for name in WITHIN)

    @property
    def first(self) -> bool:
        """True for the rank that encodes text, writes files and prints."""
        return not any(self.mesh.get_local_rank(name) for name in WITHIN)

    @property
    def numbers(self) -> list[int]:
        """Numbers among all processes of the ranks that make this video, in order."""
        found: list[int] = self.mesh[WITHIN[::-1]].mesh.flatten().tolist()
        return found

    def gather(self, value: T) -> list[T]:
        """The (picklable) values of all ranks, in the order of `numbers`."""
        values = [value]
        for name in WITHIN:
            group = self.mesh.get_group(name)
            several: list[Any] = [None] * group.size()
            dist.all_gather_object(several, values, group)
            values = [value for part in several for value in part]
        return values

    def shared(self, function: Callable[[], T]) -> T:
        """Call a function on the first rank; its (picklable) result, or error, is every rank's.

        Tensors of the result must be on the CPU.
        """
        done: list[Any] = [None, None]
        if self.first:
            try:
                done[0] = function()
            except Exception as error:
                done[1] = error
        for name in WITHIN:
            dist.broadcast_object_list(done, group=self.mesh.get_group(name), group_src=0)
        value: T = done[0]
        if done[1] is not None:
            raise done[1]
        return value

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Name the ranks to blame if a message fails inside: it ends in another rank's timeout.

        Ranks leave their errors in the store of the process group; one that leaves none is frozen
        or lost. Raises RuntimeError in place of the error of a message, after `GRACE` at most, with
        the ranks' numbers among all processes.
        """
        store, number = dist.distributed_c10d._get_default_store(), dist.get_rank()
        call = next(CALLS)
        keys = {rank: f"cogvx/error/{call}/{rank}" for rank in self.numbers}
        try:
            yield
        except Exception as error:
            of_a_message = _of_a_message(error)
            text = "" if of_a_message else f"{type(error).__name__}: {error}"
            store.set(keys[number], text)
            if not of_a_message:
                raise
            with suppress(RuntimeError):
                store.wait(list(keys.values()), GRACE)
            causes = [cause for rank in keys if (cause := _cause(store, rank, keys[rank]))]
            raise RuntimeError(f"{'; '.join(causes) or 'no rank failed'}: {error}") from error


def _of_a_message(error: Exception) -> bool:
    """True for an error of torch.distributed."""
    of_gloo = type(error) is RuntimeError and MESSAGES.search(str(error)) is not None
    return of_gloo or isinstance(error, dist.DistError)


def _cause(store: Any, rank: int, key: str) -> str:
    """What a rank did wrong; "" if it waited for another."""
    if not store.check([key]):
        return f"rank {rank} does not answer, it is frozen or lost"
    text = store.get(key).decode()
    return text and f"rank {rank} failed with {text}"
