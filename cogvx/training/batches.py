"""Which clips a step takes: a function of the seed and the step's number, and of nothing else."""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class Batches(Sampler[list[int]]):
    """The indices of every step from `start` to `stop`, those of one process.

    All clips come once before any comes again, each time in another order. Where a training stands
    is the number of its step, and a resumed one takes the very clips that it would have taken.

    size      of the data set
    batch_of  how many clips a step takes, over all processes; `processes` divide it
    process   the number of this one
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
            raise ValueError("Batches: size must be at least 1; got a data set without clips")
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
                    f"Batches: batch_size must be a multiple of the {self.processes} processes; "
                    f"got {share * self.processes + rest}"
                )
            taken = []
            for i in range(self.process * share, (self.process + 1) * share):
                now, place = divmod(begin + i, self.size)
                if now != epoch:
                    generator = torch.Generator().manual_seed(mixed(self.seed, now))
                    epoch, order = now, torch.randperm(self.size, generator=generator)
                taken.append(int(order[place]))
            yield taken
            begin += share * self.processes


def mixed(*numbers: int) -> int:
    """One seed of several numbers: other ones give another seed, neighbours no neighbour."""
    value = 0
    for number in numbers:
        value = (value ^ (number + 0x9E3779B97F4A7C15)) & (2**64 - 1)
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
        value ^= value >> 31
    return value >> 1
