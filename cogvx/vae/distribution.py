"""Diagonal Gaussian posterior of an encoder (mean, variance)."""

from collections.abc import Sequence

import torch
from torch import Tensor


class DiagonalGaussian:
    """Independent normal distributions of latents.

    Every tensor is (batch, frames, channels, height, width); latents are raw, not yet multiplied by
    the VAE's scaling factor.

    Attributes:
        moments: (batch, frames, 2 · channels, height, width), the means, then the log-variances as
            the encoder gave them.
    """

    def __init__(self, moments: Tensor) -> None:
        self.moments = moments

    @classmethod
    def cat(cls, chunks: Sequence["DiagonalGaussian"]) -> "DiagonalGaussian":
        """The distribution of a clip from those of its chunks, in order."""
        return cls(torch.cat([chunk.moments for chunk in chunks], dim=1))

    @property
    def mean(self) -> Tensor:
        """(batch, frames, channels, height, width), as all of them."""
        return self.moments.chunk(2, dim=2)[0]

    @property
    def logvar(self) -> Tensor:
        """Clamped to [-30, 20]."""
        return self.moments.chunk(2, dim=2)[1].clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        """Standard deviations."""
        return (0.5 * self.logvar).exp()

    def mode(self) -> Tensor:
        """The most likely latents: the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Latents drawn from the distribution.

        The noise is drawn on the generator's device, in the latents' dtype and in the order
        (batch, channels, frames, height, width), as diffusers draws it: the same seed gives the
        same latents. A clip in chunks draws in another order than the whole; `cat` them first.
        """
        batch, frames, channels, height, width = self.mean.shape
        noise = torch.randn(
            (batch, channels, frames, height, width),
            generator=generator,
            device=self.moments.device if generator is None else generator.device,
            dtype=self.moments.dtype,
        )
        return self.mean + self.std * noise.to(self.moments.device).transpose(1, 2)

    def kl(self) -> Tensor:
        """(batch,): the divergence from the standard normal, in nats, summed over each sample."""
        wide = torch.promote_types(self.moments.dtype, torch.float32)
        mean, logvar = self.mean.to(wide), self.logvar.to(wide)
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3, 4))

    def __repr__(self) -> str:
        return f"DiagonalGaussian(shape={tuple(self.mean.shape)}, dtype={self.moments.dtype})"
