"""Sampling of training timesteps, and the weight of the error at each.

A batch draws stratified quantiles in [0, 1]; timesteps are those quantiles of a density.
"""

import torch
from torch import Tensor, nn

from .sharding import mean_over_ranks

BINS = 16  # equally likely intervals of timesteps, each with its mean error
RATE = 0.01  # of the running mean


def stratified_quantiles(
    batch: int, device: torch.device | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """(batch,) uniform samples in [0, 1], one in each of `batch` equal intervals, shuffled.

    It lowers the variance of a batch's loss. Source: the CogVideoX paper, "Explicit Uniform
    Sampling", there over the processes.
    """
    within = torch.rand(batch, device=device, generator=generator)
    return (torch.randperm(batch, device=device, generator=generator) + within) / batch


def quantile_timesteps(
    quantiles: Tensor, num_timesteps: int, mean: float | None = None, std: float = 1.0
) -> Tensor:
    """Timesteps in [0, num_timesteps) at the quantiles of a density.

    mean, std  of the logit of t / num_timesteps, which is normal; None: t is uniform. Source: Esser
               et al. 2024, "Scaling Rectified Flow Transformers", section 3.1, there of sigma
    """
    if mean is not None:
        quantiles = torch.sigmoid(mean + std * torch.special.ndtri(quantiles))
    return (quantiles * num_timesteps).long().clamp(max=num_timesteps - 1)


class UncertaintyWeighting(nn.Module):
    """Divide errors by their running mean in the same bin of timesteps.

    At high noise most of the error is irreducible, and would outweigh what can be learned at other
    timesteps. Source: Karras et al. 2024 (EDM2), "uncertainty-based multi-task learning", where the
    weights are learned; here they are measured, from 1 on.
    """

    errors: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("errors", torch.ones(BINS))

    def forward(self, errors: Tensor, quantiles: Tensor) -> Tensor:
        """Relative errors (batch,) at timesteps' quantiles (batch,); updates when training."""
        bins = (quantiles * BINS).long().clamp(max=BINS - 1)
        relative = errors / self.errors[bins]
        if self.training:
            self._update(errors.detach(), bins)
        return relative

    @torch.no_grad()
    def _update(self, errors: Tensor, bins: Tensor) -> None:
        zeros = torch.zeros_like(self.errors)
        found = [zeros.index_add(0, bins, x) for x in (errors, torch.ones_like(errors))]
        sums, counts = mean_over_ranks(torch.stack(found))
        updated = self.errors.lerp(sums / counts.where(counts > 0, 1), RATE)
        self.errors.copy_(torch.where(counts > 0, updated, self.errors))
