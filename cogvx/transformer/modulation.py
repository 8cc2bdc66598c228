"""Expert adaptive layer norm: each modality is shifted, scaled and gated by numbers of its own.

`shift`, `scale` and `gate` are (batch, 2, dim): one row for text, one for video, in the order of
`cogvx_kernels.modality`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogvx_kernels import modality


def expert_adaln(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    text_len: int,
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm(x) · (1 + scale) + shift, with the shift and scale of each token's modality.

    x             (batch, text_len + video_len, dim)
    weight, bias  (dim,) of the norm, the same for both modalities
    shift, scale  (batch, 2, dim)
    """
    parts = modality.split(F.layer_norm(x, x.shape[-1:], weight, bias, eps), text_len)
    text, video = (
        torch.addcmul(shift[:, which, None], part, 1 + scale[:, which, None])
        for which, part in enumerate(parts)
    )
    return modality.join(text, video)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, *, text_len: int) -> Tensor:
    """x + gate · y, with the gate of each token's modality.

    x, y  (batch, text_len + video_len, dim)
    gate  (batch, 2, dim)
    """
    parts = zip(modality.split(x, text_len), modality.split(y, text_len), strict=True)
    text, video = (
        torch.addcmul(residual, gate[:, which, None], branch)
        for which, (residual, branch) in enumerate(parts)
    )
    return modality.join(text, video)


class ExpertAdaLayerNorm(nn.Module):
    """`expert_adaln` with its norm, and the layer that makes shift, scale and gate of the time.

    The layer's rows are shift, scale and gate of video and then of text, as released. Source: fact
    sheet section 2.3.
    """

    def __init__(self, dim: int, time_embed_dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.linear = nn.Linear(time_embed_dim, 6 * dim)
        self.norm = nn.LayerNorm(dim, eps)

    def forward(self, x: Tensor, temb: Tensor, text_len: int) -> tuple[Tensor, Tensor]:
        """The modulated x, and the gate for what is made of it.

        x     (batch, text_len + video_len, dim)
        temb  (batch, time_embed_dim), after its SiLU
        """
        rows = self.linear(temb).unflatten(1, (2, 3, -1)).flip(1)  # video, text -> text, video
        shift, scale, gate = rows.unbind(2)
        norm = self.norm
        x = expert_adaln(x, norm.weight, norm.bias, shift, scale, text_len=text_len, eps=norm.eps)
        return x, gate


class AdaLayerNorm(nn.Module):
    """The last modulation: the same for one modality, without a gate."""

    def __init__(self, dim: int, time_embed_dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.linear = nn.Linear(time_embed_dim, 2 * dim)
        self.norm = nn.LayerNorm(dim, eps)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x (batch, video_len, dim), temb (batch, time_embed_dim) after its SiLU."""
        shift, scale = self.linear(temb)[:, None].chunk(2, 2)
        return torch.addcmul(shift, self.norm(x), 1 + scale)
