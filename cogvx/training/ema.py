"""Exponential moving average (EMA) of the trained weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..transformer.module_utils import local


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
        averages, weights = map(local, self.averages), (local(p.detach()) for p in self.parameters)
        torch._foreach_lerp_(list(averages), list(weights), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the parameters by their averages inside the context."""
        kept = [p.detach().clone() for p in self.parameters]
        self.copy_to_parameters()
        try:
            yield
        finally:
            _copy(self.parameters, kept)

    def copy_to_parameters(self) -> None:
        """Replace the parameters by their averages."""
        _copy(self.parameters, self.averages)

    def state_dict(self) -> dict[str, Tensor]:
        """State for `load_state_dict`, without copies; sharded as the parameters are."""
        averages = {str(number): average for number, average in enumerate(self.averages)}
        return {"steps": torch.tensor(self.steps), **averages}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.steps = int(state["steps"])
        _copy(self.averages, [state[str(number)] for number in range(len(self.averages))])


@torch.no_grad()
def _copy(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Copy values into tensors, shard by shard: `torch._foreach_copy_` takes no DTensor."""
    torch._foreach_copy_([local(x.detach()) for x in tensors], [local(x) for x in values])
