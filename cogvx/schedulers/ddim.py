"""DDIM: a straight walk along the model's answers, with no noise of its own."""

import math

import torch
from torch import Tensor

from ..config import SchedulerConfig
from .noise_schedule import NoiseSchedule
from .trajectory import Trajectory, trajectory


class DDIM:
    """x ← a·x + b·x0, with a = √((1-ᾱ')/(1-ᾱ)) and b = √ᾱ' - √ᾱ·a, where ' is the target.

    It holds the noise schedule and no state: what a run is made of are values of the caller.

    >>> solver = DDIM(SchedulerConfig())
    >>> steps = solver.trajectory(50)
    >>> memory = None
    >>> for index, timestep in enumerate(steps.timesteps):
    ...     v = model(x, timestep)
    ...     x, memory = solver.step(x, v, index, steps, memory)

    compat  step as diffusers where the number of steps does not divide 1000; see `trajectory`

    Source: fact sheet section 5.3; arXiv 2010.02502, equation 12.
    """

    name = "ddim"

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

    def step(
        self,
        x: Tensor,
        v: Tensor,
        index: int,
        steps: Trajectory,
        memory: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, None]:
        """x at the target of step `index`, and nothing to remember.

        x        at steps.timesteps[index], any shape
        v        the model's answer there, at least as wide as x; float32 beside a bfloat16 x
        returns  x in its dtype, and None: DDIM has no memory and draws no noise
        """
        timestep = steps.timesteps[index]
        x_factor, x0_factor = self.coefficients(timestep, steps.targets[index])
        x0 = self.schedule.x0_from_v(x, v, timestep)
        return (x_factor * x + x0_factor * x0).to(x.dtype), None

    def coefficients(self, timestep: int, target: int) -> tuple[float, float]:
        """(a, b) of a step: 0 and 1 for the last, which gives x0."""
        alpha, alpha_target = self.schedule.alpha(timestep), self.schedule.alpha(target)
        a = math.sqrt((1 - alpha_target) / (1 - alpha))
        return a, math.sqrt(alpha_target) - math.sqrt(alpha) * a
