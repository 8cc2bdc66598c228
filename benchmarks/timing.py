"""Timing of calls: warm-up, batches, medians, rotation among inputs, the two ceilings."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]

CPU_CACHE = 64 << 20  # no portable query; larger than most last levels
# Inputs are rotated until a set has been evicted by the others when its turn comes again.
CACHES_TO_ROTATE = 4
MOST_SETS = 8
RATE_BUDGET = 0.3  # seconds, once in a run
MATMUL = 8192  # rows and columns: 31 tiles of 128 x 128 for each multiprocessor of an H200


@dataclass(frozen=True)
class Times:
    """Seconds for each call, over batches of calls, and what to know about them."""

    samples: tuple[float, ...]
    host_bound: bool = False  # the device waited for launches

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.median, self.median
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return first, third

    def __add__(self, other: "Times") -> "Times":
        return Times(self.samples + other.samples, self.host_bound or other.host_bound)


def measure(calls: Sequence[Call], device: torch.device, budget: float) -> Times:
    """Time `calls`, one after the other and round again, for about `budget` seconds.

    One clock reading spans a batch of calls, about a hundredth of a second of them, each input as
    often as the others.
    """
    batch = _cuda_batch if device.type == "cuda" else _cpu_batch
    for call in calls:  # warm-up: allocation, caches, clocks; compilation was in the check
        call()
    once, _ = batch(calls, 1)
    rounds = max(1, round(0.01 / once / len(calls)))
    batches = min(200, max(1, round(budget / (once * rounds * len(calls)))))
    samples, bound = zip(*(batch(calls, rounds) for _ in range(batches)), strict=True)
    return Times(samples, statistics.median(bound) > 0.5)


def _cuda_batch(calls: Sequence[Call], rounds: int) -> tuple[float, bool]:
    """Seconds a call by the device's clock, and whether launching took all of that time."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    calls[-1]()  # keeps the device busy while the first launches arrive
    start.record()
    launched = time.perf_counter()
    for _ in range(rounds):
        for call in calls:
            call()
    launched = time.perf_counter() - launched
    stop.record()
    torch.cuda.synchronize()
    took = start.elapsed_time(stop) / 1e3
    return took / (rounds * len(calls)), launched > 0.9 * took


def _cpu_batch(calls: Sequence[Call], rounds: int) -> tuple[float, bool]:
    start = time.perf_counter()
    for _ in range(rounds):
        for call in calls:
            call()
    return (time.perf_counter() - start) / (rounds * len(calls)), False


def cache_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_CACHE
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def sets_to_rotate(nbytes: int, device: torch.device) -> int:
    """Number of input sets of `nbytes` each that the cache cannot hold; at least 2."""
    enough = -(-CACHES_TO_ROTATE * cache_bytes(device) // max(1, nbytes))
    return min(MOST_SETS, max(2, enough))


@functools.cache
def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy much larger than the cache: the ceiling."""
    size = 4 * CACHES_TO_ROTATE * cache_bytes(device) if device.type == "cuda" else 4 * CPU_CACHE
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * size / measure([lambda: target.copy_(source)], device, RATE_BUDGET).median


@functools.cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square matrix product: the other ceiling.

    Of random numbers, because a GPU that multiplies zeros stays cooler and runs faster.
    """
    size = MATMUL if device.type == "cuda" else 256
    left, right = (torch.empty((size, size), dtype=dtype, device=device).normal_() for _ in "ab")
    product = torch.empty_like(left)
    call = functools.partial(torch.mm, left, right, out=product)
    return 2 * size**3 / measure([call], device, RATE_BUDGET).median
