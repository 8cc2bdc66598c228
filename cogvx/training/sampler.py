"""Batch sampler whose batches depend on the seed and the step alone, and seeds of steps."""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class ResumableBatchSampler(Sampler[list[int]]):
    """Indices of the batches of one process, from step `start` to `stop`.

    Every epoch is a permutation of all clips. A resumed training needs no state but its step.

    size      of the data set
    batch_of  step -> batch size over all processes, a multiple of `processes`
    process   number of this process
    """

    def __init__(
        self,
        size: int,
        batch_of: Callable[[int], int],
        seed: int,
        start: int,
        stop: int,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        if size < 1:
            raise ValueError("train: data must have at least one clip; got a data set without any")
        self.size, self.batch_of, self.seed = size, batch_of, seed
        self.start, self.stop = start, stop
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        begin = sum(map(self.batch_of, range(self.start)))
        for step in range(self.start, self.stop):
            share, rest = divmod(self.batch_of(step), self.processes)
            if rest:
                raise ValueError(
                    f"train: batch_size must be a multiple of the {self.processes} processes; "
                    f"got {share * self.processes + rest}"
                )
            batch = []
            for i in range(self.process * share, (self.process + 1) * share):
                now, index = divmod(begin + i, self.size)
                if now != epoch:
                    generator = torch.Generator().manual_seed(mix_seed(self.seed, now))
                    epoch, order = now, torch.randperm(self.size, generator=generator)
                batch.append(int(order[index]))
            yield batch
            begin += share * self.processes


def mix_seed(*numbers: int) -> int:
    """Hash several numbers into one seed of 63 bits (splitmix64)."""
    value = 0
    for number in numbers:
        value = (value ^ (number + 0x9E3779B97F4A7C15)) & (2**64 - 1)
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
        value ^= value >> 31
    return value >> 1
