"""What the solvers share: a noise schedule, a way through it, and steps without state."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..config import SchedulerConfig
from .noise_schedule import NoiseSchedule
from .trajectory import Trajectory, trajectory

# One for a batch, or one for each item.
Generators = torch.Generator | Sequence[torch.Generator]


class Solver(ABC):
    """It holds the noise schedule and no state: what a run is made of are values of the caller.

    >>> solver = DDIM(SchedulerConfig())
    >>> steps, memory = solver.trajectory(50), None
    >>> for index, timestep in enumerate(steps.timesteps):
    ...     v = model(x, timestep)
    ...     x, memory = solver.step(x, v, index, steps, memory)

    config  of the noise schedule
    compat  step as diffusers where the number of steps does not divide 1000; see `trajectory`
    """

    name: ClassVar[str]

    def __init__(self, config: SchedulerConfig, compat: bool = False) -> None:
        self.schedule = NoiseSchedule(config)
        self.compat = compat

    def trajectory(self, num_steps: int, strength: float = 1.0) -> Trajectory:
        """Where the steps begin and end; with strength, only the last int(num_steps·strength)."""
        timesteps = self.schedule.config.num_train_timesteps
        return trajectory(num_steps, timesteps, strength, self.compat)

    def timesteps(self, num_steps: int) -> list[int]:
        """The timesteps of so many steps: 999, 979, …, 19 of 50."""
        return list(self.trajectory(num_steps).timesteps)

    @abstractmethod
    def step(
        self,
        x: Tensor,
        v: Tensor,
        index: int,
        steps: Trajectory,
        memory: Tensor | None = None,
        generator: Generators | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x at the target of step `index`, and what to give to the next step as `memory`.

        x          at steps.timesteps[index], any shape
        v          the model's answer there, at least as wide as x; float32 beside a bfloat16 x
        memory     what the step before returned; None for the first of a run
        generator  of the noise, if the solver draws any; one, or one for each item of the batch;
                   torch's own if None
        returns    x in its dtype, and the memory
        """


def draw(like: Tensor, generator: Generators | None = None) -> Tensor:
    """Gaussian noise of the shape, dtype and device of a tensor.

    It is drawn where the generator lives, so that a CPU generator gives the same on every device.
    Of several generators each draws for one item of the batch.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        return torch.cat([draw(x, g) for x, g in zip(like.split(1), generator, strict=True)])
    where = generator.device if generator is not None else like.device
    noise = torch.randn(like.shape, generator=generator, device=where, dtype=like.dtype)
    return noise.to(like.device)
