"""Chunks or tiles of a clip on the ranks of a process group; every rank gives the same arguments.

"relay": a round takes one chunk for each rank, in order, and each convolution sends its cached
frames to the rank of the next chunk as soon as it has replaced them. Norms read one chunk, which is
on one rank, so that a rank makes the calls of a single process on the same values: the same bits.

Messages are ordered so that none waits for another that waits for it, not even on NCCL, which runs
the messages between two ranks in turn, whatever their direction. Within a round frames go from rank
r to r + 1 only, and are awaited; at its end the last rank sends its cache to the first; then
results go to the ranks that want them, in order.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from cogvx_kernels.streaming import FrameCache, StreamState

from ..autocast import autocast_dtype
from .tiling import Tiling

METHODS = ("relay", "tiles")
GATHERS = ("first", "all")

Shape = Sequence[int]  # of a video or latents, (batch, frames, channels, height, width)


@dataclass(frozen=True)
class VAERanks:
    """Ranks that share the chunks or tiles of a clip.

    method  one of `METHODS`, see `cogvx.parallel.vae_parallel`
    gather  who gets the result: "first", rank 0, while the others get 0 frames; or "all"
    """

    group: "dist.ProcessGroup"
    method: str = "relay"
    gather: str = "first"

    @property
    def rank(self) -> int:
        """This process in the group."""
        return self.group.rank()

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.group.size()

    @property
    def receives(self) -> bool:
        """True if this rank gets results."""
        return self.gather == "all" or self.rank == 0

    def check_method(self, where: str, tiling: Tiling | None) -> None:
        """Raises unless the method is possible, with or without tiling."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{where}: gradients must be off for a VAE on {self.size} ranks, which records "
                "none; call it under torch.no_grad()"
            )
        if self.method == "relay" and tiling is not None:
            raise ValueError(
                f"{where}: tiling must be None for a VAE whose chunks are on {self.size} ranks, in "
                f'relay; got {tiling}: vae_parallel(..., method="tiles") has tiles on ranks'
            )
        if self.method == "tiles" and tiling is None:
            raise ValueError(
                f"{where}: tiling must be given for a VAE whose tiles are on {self.size} ranks; "
                'got none: vae_parallel(..., method="relay") has chunks on ranks'
            )

    def check_alike(self, where: str, name: str, x: object) -> None:
        """Raises ValueError unless a tensor x is the same on every rank."""
        facts: object = None
        if isinstance(x, Tensor):
            total = torch.zeros((), dtype=torch.int64, device=x.device)
            for frame in x.unbind(1):  # bounds the temporary copy
                total += frame.contiguous().view(torch.uint8).sum(dtype=torch.int64)
            facts = (tuple(x.shape), str(x.dtype), f"bytes that add up to {int(total)}")
        found: list[object] = [None] * self.size
        dist.all_gather_object(found, facts, group=self.group)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise ValueError(
                    f"{where}: {name} must be the same on every rank; got {found[0]} on rank 0 and "
                    f"{other} on rank {rank}"
                )

    def share(
        self,
        run: Callable[[Tensor], Tensor],
        inputs: Iterable[Tensor],
        shape: Callable[[Tensor], Shape],
    ) -> Iterator[Tensor]:
        """`run` of each input, the i-th on rank i modulo `size`; yields the results in order.

        shape: of the result of an input, called as it is drawn. A round of inputs is drawn before
            one is run, so that they may themselves come from several ranks.

        Yields tensors of 0 frames where this rank gets no results.
        """
        inputs = iter(inputs)
        while turn := [(x, shape(x)) for x in islice(inputs, self.size)]:
            result = run(turn[self.rank][0]) if self.rank < len(turn) else None
            for owner, (x, made) in enumerate(turn):
                yield self._delivered(result if owner == self.rank else None, owner, x, made)
            del result  # before the next one is made

    def _delivered(self, result: Tensor | None, owner: int, x: Tensor, shape: Shape) -> Tensor:
        """The result of rank `owner`, whose `result` it is, on this rank."""
        dtype = autocast_dtype(x.device) or x.dtype
        if not self.receives:
            if result is not None:
                dist.send(result.contiguous(), group_dst=0, group=self.group)
            return x.new_empty((shape[0], 0, *shape[2:]), dtype=dtype)
        result = x.new_empty(shape, dtype=dtype) if result is None else result.contiguous()
        if self.size > 1 and self.gather == "all":
            dist.broadcast(result, group_src=owner, group=self.group)
        elif owner != self.rank:
            dist.recv(result, group_src=owner, group=self.group)
        return result

    def relay(
        self,
        run: Callable[[Tensor, FrameCache], Tensor],
        chunks: Iterator[Tensor],
        state: StreamState,
        shape: Callable[[Tensor], Shape],
    ) -> Iterator[Tensor]:
        """`share` the chunks of a clip, each run with a cache that the rank before has filled.

        state: counts the chunks as they are drawn; its total is known.
        """
        cache = RelayedCache(self)

        def drawn() -> Iterator[Tensor]:
            for number, chunk in enumerate(chunks):
                mine = number % self.size == self.rank
                if mine:
                    cache.keep = state.cache.keep
                state.count(chunk.shape[1])
                # A clone: its source may reuse the memory for the rest of the round.
                yield chunk.clone() if mine else chunk

        def run_mine(chunk: Tensor) -> Tensor:
            result = run(chunk, cache)
            cache.settle(ends=state.ended)
            return result

        return self.share(run_mine, drawn(), shape)


class RelayedCache(FrameCache):
    """Cache of a chunk whose frames come from the rank of the chunk before, and go to the next's.

    The buffers stay for the next round: they are received into, replaced by the chunk, and sent.
    """

    def __init__(self, ranks: VAERanks) -> None:
        super().__init__()
        self.ranks = ranks
        self.first, self.last = ranks.rank == 0, ranks.rank == ranks.size - 1
        self.started = not self.first
        self.sent: list[dist.Work | None] = []

    def slot(self, name: str, x: Tensor, kept: int) -> tuple[Tensor, str | None]:
        frames, start = super().slot(name, x, kept)
        if self.first:
            return frames, start
        self._receive(frames, self.ranks.rank - 1)
        return frames, None

    def replaced(self, name: str) -> None:
        if self.keep and not self.last:
            self._send(self.frames[name], self.ranks.rank + 1)

    def settle(self, ends: bool) -> None:
        """Wait for what was sent; unless the clip ends, hand the last rank's cache to the first."""
        self._wait()
        if ends or self.first == self.last:
            return
        for frames in self.frames.values():
            if self.last:
                self._send(frames, 0)
            elif self.first:
                self._receive(frames, self.ranks.size - 1)
        self._wait()

    def _send(self, frames: Tensor, rank: int) -> None:
        sent = dist.isend(_dense(frames), group_dst=rank, group=self.ranks.group)
        self.sent.append(sent)

    def _receive(self, frames: Tensor, rank: int) -> None:
        dist.recv(_dense(frames), group_src=rank, group=self.ranks.group)

    def _wait(self) -> None:
        for work in self.sent:
            if work is not None:
                work.wait()
        self.sent.clear()


def _dense(frames: Tensor) -> Tensor:
    """A contiguous view of frames that are channels last."""
    return frames.permute(0, 2, 3, 4, 1)
