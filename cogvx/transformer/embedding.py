"""Timestep embedding, and embedding of text and video patches as one sequence."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogvx_kernels import modality

from .patch import patchify


def timestep_sincos(timestep: Tensor, dim: int) -> Tensor:
    """Cosines and then sines of timestep · 10000^(-2i / dim): (batch, dim) fp32.

    timestep  (batch,), any real dtype; training steps, 0 (clean) to 999 (noise)
    dim       even

    Source: `docs/model.md`, section 2.1.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep[:, None].float() * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], 1)


class TimestepEmbedding(nn.Module):
    """Sinusoidal embedding of one number per batch item, then an MLP."""

    def __init__(self, dim: int, embed_dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.linear_1 = nn.Linear(dim, embed_dim)
        self.linear_2 = nn.Linear(embed_dim, embed_dim)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """(batch,) of any real dtype -> (batch, embed_dim) of `dtype`."""
        x = timestep_sincos(timestep, self.dim).to(dtype)
        return self.linear_2(F.silu(self.linear_1(x)))


@dataclass(frozen=True)
class ProjectedText:
    """Text tokens of the model's width, projected once for all steps.

    tokens  (batch, text_len, dim); see `ExpertTransformer.project_text`
    """

    tokens: Tensor


class JointEmbedding(nn.Module):
    """Embed text and video patches as tokens of one width, in one sequence.

    1.0 embeds patches by a convolution, frame by frame, 1.5 by a linear layer (`linear`).
    `pos_embedding` is the learned table of 5B-I2V, a buffer as in the released model:
    (1, text_len + video_len, dim); None otherwise.
    """

    pos_embedding: Tensor | None

    def __init__(
        self,
        in_channels: int,
        text_embed_dim: int,
        dim: int,
        patch: tuple[int, int, int],
        linear: bool,
        bias: bool = True,
        pos_embedding: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.proj: nn.Linear | nn.Conv2d
        if linear:
            self.proj = nn.Linear(in_channels * math.prod(patch), dim, bias=bias)
        else:
            self.proj = nn.Conv2d(in_channels, dim, patch[1:], stride=patch[1:], bias=bias)
        self.linear = linear
        self.text_proj = nn.Linear(text_embed_dim, dim)
        self.register_buffer("pos_embedding", pos_embedding)

    def forward(
        self, text: Tensor | ProjectedText, latents: Tensor, positions: Tensor | None
    ) -> Tensor:
        """Build the joint sequence.

        Args:
            text: (batch, text_len, text_embed_dim), or already projected.
            latents: (batch, frames, in_channels, height, width).
            positions: (text_len + video_len, dim), to be added; or None.

        Returns:
            (batch, text_len + video_len, dim), text first.
        """
        tokens = text.tokens if isinstance(text, ProjectedText) else self.text_proj(text)
        x = modality.join(tokens, self._tokens(latents))
        return x if positions is None else x + positions.to(x.dtype)

    def _tokens(self, latents: Tensor) -> Tensor:
        if self.linear:
            return self.proj(patchify(latents, self.patch))
        x = self.proj(latents.flatten(0, 1)).flatten(2)  # (batch · frames, dim, height · width)
        return x.unflatten(0, latents.shape[:2]).transpose(2, 3).flatten(1, 2)
