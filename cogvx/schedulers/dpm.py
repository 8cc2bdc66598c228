"""SDE-DPM-Solver++(2M): second order, stochastic."""

import math
from typing import NamedTuple

from torch import Tensor

from .solver import Generators, Solver, randn_tensor
from .timesteps import TimestepSchedule


class Coefficients(NamedTuple):
    """Coefficients of x ← x_factor·x + x0_factor·d + noise_factor·noise, where
    d = (1 + slope)·x0 - slope·prev_x0."""

    x_factor: float
    x0_factor: float
    noise_factor: float
    slope: float


class DPMSolver(Solver):
    """SDE-DPM-Solver++, second order, multistep, as in CogVideoX.

    With λ = ½·ln(ᾱ/(1-ᾱ)), h = λ' - λ (' is the next timestep) and r = (λ - λ_prev)/h:
    x_factor = √((1-ᾱ')/(1-ᾱ))·e^-h, x0_factor = √ᾱ'·(1 - e^-2h),
    noise_factor = √(1-ᾱ')·√(1 - e^-2h), slope = 1/(2r).

    The first step and the last are of first order (slope 0). At the noisiest timestep λ is -∞, and
    so x is dropped and the step after it has slope 0 too; at the last, the result is x0.

    Noise is drawn as in diffusers, so that one generator gives the same video: twice in a middle
    step (the first draw is dropped), else once.

    Source: `docs/model.md`, section 5.4; arXiv 2211.01095.
    """

    name = "dpm"

    def step(
        self,
        x: Tensor,
        v: Tensor,
        index: int,
        steps: TimestepSchedule,
        prev_x0: Tensor | None = None,
        generator: Generators | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Solver.step`; also returns x0, in the wider dtype of x and v.

        Raises ValueError if `prev_x0` is missing after the first step.
        """
        if index > 0 and prev_x0 is None:
            raise ValueError(
                f"DPMSolver.step: prev_x0 must be what step {index - 1} returned; got None"
            )
        timestep, next_timestep = steps.timesteps[index], steps.next_timesteps[index]
        x0 = self.schedule.x0_from_v(x, v, timestep)
        noise = randn_tensor(x, generator)
        if index > 0 and next_timestep >= 0:
            noise = randn_tensor(x, generator)
        prev_timestep = steps.timesteps[index - 1] if index > 0 else None
        c = self.coefficients(timestep, next_timestep, prev_timestep)
        d = x0
        if c.slope and prev_x0 is not None:
            d = (1 + c.slope) * x0 - c.slope * prev_x0
        return (c.x_factor * x + c.x0_factor * d + c.noise_factor * noise).to(x.dtype), x0

    def coefficients(
        self, timestep: int, next_timestep: int, prev_timestep: int | None = None
    ) -> Coefficients:
        """Coefficients of a step; `prev_timestep` is None for the first one."""
        alpha, alpha_next = self.schedule.alpha(timestep), self.schedule.alpha(next_timestep)
        lambda_t = _half_log_snr(alpha)
        h = _half_log_snr(alpha_next) - lambda_t
        slope = 0.0
        if (
            prev_timestep is not None
            and math.isfinite(h)
            and self.schedule.alpha(prev_timestep) > 0
        ):
            slope = 1 / (2 * ((lambda_t - _half_log_snr(self.schedule.alpha(prev_timestep))) / h))
        return Coefficients(
            x_factor=math.sqrt((1 - alpha_next) / (1 - alpha)) * math.exp(-h),
            x0_factor=-math.expm1(-2 * h) * math.sqrt(alpha_next),
            noise_factor=math.sqrt(1 - alpha_next) * math.sqrt(1 - math.exp(-2 * h)),
            slope=slope,
        )


def _half_log_snr(alpha: float) -> float:
    """λ = ½·ln(ᾱ/(1-ᾱ)), with its limits: -∞ where there is only noise, ∞ where there is none."""
    if alpha <= 0:
        return -math.inf
    return math.log(math.sqrt(alpha / (1 - alpha))) if alpha < 1 else math.inf
