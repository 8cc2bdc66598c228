"""The moving average of the weights, which makes better clips than the last of them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class MovingAverage:
    """Of parameters: average ← decay · average + (1 - decay) · parameter, after each step.

    Early on the decay is (1 + step) / (10 + step), where that is less, so that the beginning is
    forgotten.
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
        """The parameters are the averages inside, and again themselves behind."""
        kept = [p.detach().clone() for p in self.parameters]
        self.put()
        try:
            yield
        finally:
            torch._foreach_copy_([p.detach() for p in self.parameters], kept)

    def put(self) -> None:
        """From now on the parameters are the averages."""
        torch._foreach_copy_([p.detach() for p in self.parameters], self.averages)

    def state(self) -> dict[str, Tensor]:
        """What `load` takes: of a sharded parameter, this process's part."""
        held = {str(number): _local(average) for number, average in enumerate(self.averages)}
        return {"steps": torch.tensor(self.steps), **held}

    def load(self, state: dict[str, Tensor]) -> None:
        self.steps = int(state["steps"])
        for number, average in enumerate(self.averages):
            _local(average).copy_(state[str(number)])


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; told without that class, which takes most of a second to import."""
    return hasattr(tensor, "to_local")


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor
