"""DPM-Solver++(2M), stochastic: two answers of the model make a line, and each step adds noise."""

import math
from typing import NamedTuple

from torch import Tensor

from .solver import Generators, Solver, draw
from .trajectory import Trajectory


class Coefficients(NamedTuple):
    """x ← x_factor·x + x0_factor·d + noise_factor·noise, where the line through this x0 and the
    one before gives d = (1 + slope)·x0 - slope·x0_before, or x0 where slope is 0."""

    x_factor: float
    x0_factor: float
    noise_factor: float
    slope: float


class DPMSolver(Solver):
    """SDE-DPM-Solver++ of second order in two steps, as CogVideoX uses it.

    With λ = ½·ln(ᾱ/(1-ᾱ)), h = λ' - λ (' is the target) and r = (λ - λ_before)/h:
    x_factor = √((1-ᾱ')/(1-ᾱ))·e^-h, x0_factor = √ᾱ'·(1 - e^-2h),
    noise_factor = √(1-ᾱ')·√(1 - e^-2h), slope = 1/(2r).

    The first step and the last are of first order (slope 0). At the noisiest timestep λ is -∞, and
    so x is dropped and the step after it has slope 0 too; at the last, the result is x0.

    The memory is the x0 of the step before. Noise is drawn as diffusers draws it, so that one
    generator gives one video in both: twice in a middle step (the first draw is thrown away), else
    once.

    Source: fact sheet section 5.4; arXiv 2211.01095.
    """

    name = "dpm"

    def step(
        self,
        x: Tensor,
        v: Tensor,
        index: int,
        steps: Trajectory,
        memory: Tensor | None = None,
        generator: Generators | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Solver.step`; the memory is x0, in the wider dtype of x and v.

        Raises ValueError if a step but the first comes without memory.
        """
        if index > 0 and memory is None:
            raise ValueError(
                f"DPMSolver.step: memory must be what step {index - 1} returned; got None"
            )
        timestep, target = steps.timesteps[index], steps.targets[index]
        x0 = self.schedule.x0_from_v(x, v, timestep)
        noise = draw(x, generator)
        if index > 0 and target >= 0:
            noise = draw(x, generator)
        back = steps.timesteps[index - 1] if index > 0 else None
        c = self.coefficients(timestep, target, back)
        d = x0
        if c.slope and memory is not None:
            d = (1 + c.slope) * x0 - c.slope * memory
        return (c.x_factor * x + c.x0_factor * d + c.noise_factor * noise).to(x.dtype), x0

    def coefficients(self, timestep: int, target: int, back: int | None = None) -> Coefficients:
        """Of a step from `timestep` to `target`, after one from `back`; None if it is the first."""
        alpha, alpha_target = self.schedule.alpha(timestep), self.schedule.alpha(target)
        start = _half_log_snr(alpha)
        h = _half_log_snr(alpha_target) - start
        slope = 0.0
        if back is not None and math.isfinite(h) and self.schedule.alpha(back) > 0:
            slope = 1 / (2 * ((start - _half_log_snr(self.schedule.alpha(back))) / h))
        return Coefficients(
            x_factor=math.sqrt((1 - alpha_target) / (1 - alpha)) * math.exp(-h),
            x0_factor=-math.expm1(-2 * h) * math.sqrt(alpha_target),
            noise_factor=math.sqrt(1 - alpha_target) * math.sqrt(1 - math.exp(-2 * h)),
            slope=slope,
        )


def _half_log_snr(alpha: float) -> float:
    """λ = ½·ln(ᾱ/(1-ᾱ)), with its limits: -∞ where there is only noise, ∞ where there is none."""
    if alpha <= 0:
        return -math.inf
    return math.log(math.sqrt(alpha / (1 - alpha))) if alpha < 1 else math.inf
