"""DDIM, deterministic."""

import math

from torch import Tensor

from .solver import Generators, Solver
from .timesteps import TimestepSchedule


class DDIM(Solver):
    """x ← a·x + b·x0, with a = √((1-ᾱ')/(1-ᾱ)) and b = √ᾱ' - √ᾱ·a, where ' is the next timestep.

    Source: `docs/model.md`, section 5.3; arXiv 2010.02502, equation 12.
    """

    name = "ddim"

    def step(
        self,
        x: Tensor,
        v: Tensor,
        index: int,
        steps: TimestepSchedule,
        prev_x0: Tensor | None = None,
        generator: Generators | None = None,
    ) -> tuple[Tensor, None]:
        """See `Solver.step`. Uses neither `prev_x0` nor `generator`."""
        timestep = steps.timesteps[index]
        a, b = self.coefficients(timestep, steps.next_timesteps[index])
        x0 = self.schedule.x0_from_v(x, v, timestep)
        return (a * x + b * x0).to(x.dtype), None

    def coefficients(self, timestep: int, next_timestep: int) -> tuple[float, float]:
        """Return (a, b) of a step; (0, 1) for the last, which returns x0."""
        alpha, alpha_next = self.schedule.alpha(timestep), self.schedule.alpha(next_timestep)
        a = math.sqrt((1 - alpha_next) / (1 - alpha))
        return a, math.sqrt(alpha_next) - math.sqrt(alpha) * a
