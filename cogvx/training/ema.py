"""Exponential moving average (EMA) of the trained weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class EMA:
    """average ← decay · average + (1 - decay) · parameter, after each step.

    The decay of an early step is (1 + step) / (10 + step), where that is less. Unlike
    `torch.optim.swa_utils.AveragedModel` it keeps no second module, only the trained weights.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.parameters = list(parameters)
        self.averages = [p.detach().clone() for p in self.parameters]
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the parameters by their averages inside the context."""
        kept = [p.detach().clone() for p in self.parameters]
        self.copy_to_parameters()
        try:
            yield
        finally:
            torch._foreach_copy_([p.detach() for p in self.parameters], kept)

    def copy_to_parameters(self) -> None:
        """Replace the parameters by their averages."""
        torch._foreach_copy_([p.detach() for p in self.parameters], self.averages)

    def state_dict(self) -> dict[str, Tensor]:
        """State for `load_state_dict`; of a sharded parameter, this process's shard."""
        averages = {str(number): _local(average) for number, average in enumerate(self.averages)}
        return {"steps": torch.tensor(self.steps), **averages}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.steps = int(state["steps"])
        for number, average in enumerate(self.averages):
            _local(average).copy_(state[str(number)])


def is_sharded(tensor: Tensor) -> bool:
    """Return True for a DTensor, without importing its class, which takes most of a second."""
    return hasattr(tensor, "to_local")


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor
