"""Threads of small models on a CPU.

torch divides every operation among the cores, and its threads wait for each other at the end of
each one. Where other programs use the cores, a wait lasts until the system gives the other thread
its turn again, some milliseconds. An operation that takes less than that gains little on idle cores
and loses much on busy ones: 30 steps of the model tiny took 36 s on two threads and 6 s on one
while other processes used both cores, of 2 s of computing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Values of the largest tensor between two layers: at this size a convolution of tiny's VAE takes
# about 10 ms on one thread. The transformer of tiny has 18 thousand, its VAE 262 thousand; the
# smallest released model has 34 million.
SMALL = 1 << 20


@contextmanager
def suited_threads(values: int, device: torch.device) -> Iterator[None]:
    """Runs its body on one thread if a model is small and on a CPU, else as many as before.

    values: of the largest tensor between two layers.

    Not while gradients are recorded: their backward pass comes after the body.
    """
    before = torch.get_num_threads()
    if device.type != "cpu" or values > SMALL or before == 1 or torch.is_grad_enabled():
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
