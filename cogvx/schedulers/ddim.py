"""DDIM: a straight walk along the model's answers, with no noise of its own."""

import math

from torch import Tensor

from .solver import Generators, Solver
from .trajectory import Trajectory


class DDIM(Solver):
    """x ← a·x + b·x0, with a = √((1-ᾱ')/(1-ᾱ)) and b = √ᾱ' - √ᾱ·a, where ' is the target.

    Source: fact sheet section 5.3; arXiv 2010.02502, equation 12.
    """

    name = "ddim"

    def step(
        self,
        x: Tensor,
        v: Tensor,
        index: int,
        steps: Trajectory,
        memory: Tensor | None = None,
        generator: Generators | None = None,
    ) -> tuple[Tensor, None]:
        """As `Solver.step`; nothing is remembered, and no noise drawn."""
        timestep = steps.timesteps[index]
        a, b = self.coefficients(timestep, steps.targets[index])
        x0 = self.schedule.x0_from_v(x, v, timestep)
        return (a * x + b * x0).to(x.dtype), None

    def coefficients(self, timestep: int, target: int) -> tuple[float, float]:
        """(a, b) of a step: 0 and 1 for the last, which gives x0."""
        alpha, alpha_target = self.schedule.alpha(timestep), self.schedule.alpha(target)
        a = math.sqrt((1 - alpha_target) / (1 - alpha))
        return a, math.sqrt(alpha_target) - math.sqrt(alpha) * a
