"""Clips and random numbers of a step, which depend on the seed and the step alone."""

from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor
from torch.utils.data import Sampler

from .timestep_sampling import stratified_quantiles


def shares(batch: int, parts: int, rank: int, ranks: int) -> list[range]:
    """Positions in a batch of the clips of one rank, in each of the parts that follow each other.

    A part is split over the ranks, so that it has the same clips whatever their number. Raises
    ValueError for a batch that cannot be split evenly.
    """
    share, rest = divmod(batch, parts * ranks)
    if rest or not share:
        raise ValueError(
            f"train: batch_size must be a multiple of the {parts * ranks} shares of accumulate "
            f"{parts} on {ranks} ranks with clips of their own; got {batch}"
        )
    firsts = [(part * ranks + rank) * share for part in range(parts)]
    return [range(first, first + share) for first in firsts]


class Draws:
    """Random numbers of the clips at some positions of a step's batch.

    They are of the seed, the step and the position, and drawn on the CPU: the same on every rank,
    device and number of ranks.

    batch   clips of the step
    device  of the results
    """

    def __init__(
        self,
        seed: int,
        step: int,
        positions: range,
        batch: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.positions, self.batch, self.device = positions, batch, device
        self.common = torch.Generator().manual_seed(mix_seed(seed, step))
        self.generators = [
            torch.Generator().manual_seed(mix_seed(seed, step, position)) for position in positions
        ]

    def rand(self, *shape: int) -> Tensor:
        """(clips, *shape), uniform in [0, 1)."""
        return torch.stack([torch.rand(shape, generator=g) for g in self.generators]).to(
            self.device
        )

    def randn(self, *shape: int) -> Tensor:
        """(clips, *shape), normal."""
        drawn = [torch.randn(shape, generator=g) for g in self.generators]
        return torch.stack(drawn).to(self.device)

    def quantiles(self) -> Tensor:
        """(clips,) of the `stratified_quantiles` of the whole batch."""
        drawn = stratified_quantiles(self.batch, generator=self.common)
        return drawn[self.positions.start : self.positions.stop].to(self.device)


class ResumableBatchSampler(Sampler[list[int]]):
    """Indices of the batches of one rank, from step `start` to `stop`.

    Every epoch is a permutation of all clips. A resumed training needs no state but its step.

    size      of the data set
    batch_of  step -> batch size over all ranks
    parts, rank, ranks  as in `shares`
    """

    def __init__(
        self,
        size: int,
        batch_of: Callable[[int], int],
        seed: int,
        start: int,
        stop: int,
        parts: int = 1,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if size < 1:
            raise ValueError("train: data must have at least one clip; got a data set without any")
        self.size, self.batch_of, self.seed = size, batch_of, seed
        self.start, self.stop = start, stop
        self.split = parts, rank, ranks

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        begin = sum(map(self.batch_of, range(self.start)))
        for step in range(self.start, self.stop):
            batch = []
            for i in chain.from_iterable(shares(self.batch_of(step), *self.split)):
                now, index = divmod(begin + i, self.size)
                if now != epoch:
                    generator = torch.Generator().manual_seed(mix_seed(self.seed, now))
                    epoch, order = now, torch.randperm(self.size, generator=generator)
                batch.append(int(order[index]))
            yield batch
            begin += self.batch_of(step)


def mix_seed(*numbers: int) -> int:
    """Hash several numbers into one seed of 63 bits (splitmix64)."""
    value = 0
    for number in numbers:
        value = (value ^ (number + 0x9E3779B97F4A7C15)) & (2**64 - 1)
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
        value ^= value >> 31
    return value >> 1
