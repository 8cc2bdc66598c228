"""Noise schedule (zero terminal SNR), and conversions between x, x0, noise and v."""

import math

import torch
from torch import Tensor

from ..config import SchedulerConfig

FINAL = -1  # the timestep before 0: no noise at all

Coefficient = float | Tensor


class NoiseSchedule:
    """Forward process x = √ᾱ·x0 + √(1-ᾱ)·noise; ᾱ falls from almost 1 at timestep 0 to 0.

    √beta is linear from √beta_start to √beta_end and ᾱ is the cumulative product of 1 - beta. The
    SNR is then divided by `snr_shift_scale`, and √ᾱ is shifted and scaled so that the last one is 0
    and the first is unchanged (zero terminal SNR).

    alphas_cumprod  (num_train_timesteps,) float64, always on the CPU:
                    a timestep given as an int costs no transfer and no synchronisation

    A timestep is an int for the whole batch, or a (batch,) integer tensor; 0 is the least noise,
    num_train_timesteps - 1 the most, `FINAL` none (int only). Source: `docs/model.md`, section 5.1;
    arXiv 2305.08891, algorithm 1, for the terminal SNR.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        roots = torch.linspace(
            math.sqrt(config.beta_start),
            math.sqrt(config.beta_end),
            config.num_train_timesteps,
            dtype=torch.float64,
        )
        alphas = torch.cumprod(1.0 - roots**2, 0)
        shift = config.snr_shift_scale
        alphas = alphas / (shift + (1 - shift) * alphas)
        if config.rescale_betas_zero_snr:
            alphas = _zero_terminal_snr(alphas)
        self.alphas_cumprod = alphas
        self._alphas: list[float] = alphas.tolist()

    def alpha(self, timestep: int) -> float:
        """ᾱ at a timestep; 1 at `FINAL`. Raises ValueError for one out of range."""
        if not FINAL <= timestep < len(self._alphas):
            raise ValueError(
                f"NoiseSchedule: timestep must be in [0, {len(self._alphas) - 1}], or {FINAL} for "
                f"no noise; got {timestep}"
            )
        return 1.0 if timestep == FINAL else self._alphas[timestep]

    def add_noise(self, x0: Tensor, noise: Tensor, timestep: int | Tensor) -> Tensor:
        """√ᾱ·x0 + √(1-ᾱ)·noise: x0 noised to a timestep, in x0's dtype.

        Computed in at least float32 and rounded once. (diffusers rounds ᾱ to the dtype of x0 before
        it takes 1 - ᾱ, so that in bfloat16 its first timesteps have no noise at all.)
        """
        signal, sigma = self._roots(timestep, x0)
        return (signal * _wide(x0) + sigma * _wide(noise)).to(x0.dtype)

    def velocity(self, x0: Tensor, noise: Tensor, timestep: int | Tensor) -> Tensor:
        """v = √ᾱ·noise - √(1-ᾱ)·x0, the training target of the transformer; in x0's dtype."""
        signal, sigma = self._roots(timestep, x0)
        return (signal * _wide(noise) - sigma * _wide(x0)).to(x0.dtype)

    def x0_from_v(self, x: Tensor, v: Tensor, timestep: int | Tensor) -> Tensor:
        """x0 = √ᾱ·x - √(1-ᾱ)·v, the inverse of the two above; -v at the last timestep.

        For an int each product is rounded to the dtype of its tensor and the difference to the
        wider of the two, as in diffusers: with x in bfloat16 and v in float32 it is float32.
        """
        signal, sigma = self._roots(timestep, x)
        return signal * x - sigma * v

    def _roots(self, timestep: int | Tensor, like: Tensor) -> tuple[Coefficient, Coefficient]:
        """√ᾱ and √(1-ᾱ): floats for an int, else (batch, 1, 1, …) in at least float32."""
        if not isinstance(timestep, Tensor):
            alpha = self.alpha(timestep)
            return math.sqrt(alpha), math.sqrt(1 - alpha)
        if timestep.shape != like.shape[:1] or timestep.is_floating_point():
            raise ValueError(
                f"NoiseSchedule: timestep must be an int or integers of shape (batch,) = "
                f"({len(like)},); got {timestep.dtype} of shape {tuple(timestep.shape)}"
            )
        dtype = torch.promote_types(like.dtype, torch.float32)
        alphas = self.alphas_cumprod.to(timestep.device)[timestep]
        signal, sigma = (
            root.to(like.device, dtype).view(-1, *[1] * (like.dim() - 1))
            for root in (alphas.sqrt(), (1 - alphas).sqrt())
        )
        return signal, sigma


def _zero_terminal_snr(alphas: Tensor) -> Tensor:
    roots = alphas.sqrt()
    first, last = roots[0], roots[-1]
    return ((roots - last) * (first / (first - last))) ** 2


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
