"""Base class of the solvers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..config import SchedulerConfig
from .noise_schedule import NoiseSchedule
from .timesteps import TimestepSchedule, timestep_schedule

# One for a batch, or one for each item.
Generators = torch.Generator | Sequence[torch.Generator]


class Solver(ABC):
    """Solver of the reverse process. Holds the noise schedule and no state of a run.

    >>> solver = DDIM(SchedulerConfig())
    >>> steps, prev_x0 = solver.timestep_schedule(50), None
    >>> for index, timestep in enumerate(steps.timesteps):
    ...     v = model(x, timestep)
    ...     x, prev_x0 = solver.step(x, v, index, steps, prev_x0)

    config  of the noise schedule
    compat  step as diffusers if the number of steps does not divide 1000; see `timestep_schedule`
    """

    name: ClassVar[str]

    def __init__(self, config: SchedulerConfig, compat: bool = False) -> None:
        self.schedule = NoiseSchedule(config)
        self.compat = compat

    def timestep_schedule(self, num_steps: int, strength: float = 1.0) -> TimestepSchedule:
        """Timesteps of a run; with strength, the last int(num_steps·strength) of them."""
        timesteps = self.schedule.config.num_train_timesteps
        return timestep_schedule(num_steps, timesteps, strength, self.compat)

    def timesteps(self, num_steps: int) -> list[int]:
        """Timesteps as a list: 999, 979, …, 19 for 50 steps."""
        return list(self.timestep_schedule(num_steps).timesteps)

    @abstractmethod
    def step(
        self,
        x: Tensor,
        v: Tensor,
        index: int,
        steps: TimestepSchedule,
        prev_x0: Tensor | None = None,
        generator: Generators | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Take step `index`.

        x          at steps.timesteps[index], any shape
        v          the model's prediction there, at least as wide as x; float32 beside a bfloat16 x
        prev_x0    second result of the previous step; None for the first step
        generator  of the noise, if the solver draws any; one, or one for each item of the batch;
                   torch's default one if None
        returns    x at steps.next_timesteps[index], in its dtype; the next step's `prev_x0`
        """


def randn_tensor(like: Tensor, generator: Generators | None = None) -> Tensor:
    """Gaussian noise of the shape, dtype and device of a tensor.

    Drawn on the generator's device, so that a CPU generator gives the same noise on every device.
    Of several generators each draws for one item of the batch.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        return torch.cat(
            [randn_tensor(x, g) for x, g in zip(like.split(1), generator, strict=True)]
        )
    where = generator.device if generator is not None else like.device
    noise = torch.randn(like.shape, generator=generator, device=where, dtype=like.dtype)
    return noise.to(like.device)
