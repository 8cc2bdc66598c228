"""Number of threads of small models on a CPU.

torch splits every operation among the cores and synchronises at its end. If other programs use the
cores, that takes some milliseconds, so short operations lose more than they gain: 30 steps of the
model tiny took 36 s on two threads and 6 s on one while other processes used both cores.
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
    """Use one thread inside if the model is small and on a CPU.

    values: number of values of the largest tensor between two layers.

    Not while gradients are recorded: the backward pass runs outside.
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
