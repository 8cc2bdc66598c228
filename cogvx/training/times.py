"""At which times a transformer is trained, and what an error weighs at each.

A batch draws ranks in [0, 1], spread over all of them; the timesteps are quantiles of a density.
"""

import torch
from torch import Tensor, nn

PARTS = 16  # of the times, equally likely, each with a level of its own
RATE = 0.01  # at which a level follows the errors


def spread_ranks(batch: int, device: torch.device | None = None) -> Tensor:
    """(batch,) ranks in [0, 1], one in each of `batch` equal parts of it, in any order.

    Each is as likely to be one as another, and no batch is easy because all its clips were nearly
    clean. Source: the CogVideoX paper, "Explicit Uniform Sampling", there over the processes.
    """
    within = torch.rand(batch, device=device)
    return (torch.randperm(batch, device=device) + within) / batch


def timesteps(ranks: Tensor, times: int, mean: float | None = None, std: float = 1.0) -> Tensor:
    """The timesteps in [0, times) that have these ranks among all.

    mean, std  of the logit of t / times, which is normal; None: t is uniform. Source: Esser et al.
               2024, "Scaling Rectified Flow Transformers", section 3.1, there of sigma
    """
    if mean is not None:
        ranks = torch.sigmoid(mean + std * torch.special.ndtri(ranks))
    return (ranks * times).long().clamp(max=times - 1)


class Levels(nn.Module):
    """Errors over their running mean among those of like ranks, so that all times weigh alike.

    Where a clip is hardly to be seen most of the error is chance, and by its size it would drown
    what can be learned of the others. Source: Karras et al. 2024 (EDM2), "uncertainty-based
    multi-task learning", whose levels are learned; these are measured, from 1 on.
    """

    errors: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("errors", torch.ones(PARTS))

    def forward(self, errors: Tensor, ranks: Tensor) -> Tensor:
        """(batch,) errors of clips at such ranks, relative; in training the levels follow."""
        part = (ranks * PARTS).long().clamp(max=PARTS - 1)
        relative = errors / self.errors[part]
        if self.training:
            self._follow(errors.detach(), part)
        return relative

    @torch.no_grad()
    def _follow(self, errors: Tensor, part: Tensor) -> None:
        none = torch.zeros_like(self.errors)
        sums, counts = (none.index_add(0, part, x) for x in (errors, torch.ones_like(errors)))
        followed = self.errors.lerp(sums / counts.clamp(min=1), RATE)
        self.errors.copy_(torch.where(counts > 0, followed, self.errors))
