"""Adaptive layer norms with the layers that make their shift, scale and gate of the time.

Text and video of the joint sequence are modulated each by numbers of its own, in one pass over both
(`cogvx_kernels.expert_adaln`).
"""

from typing import NamedTuple

from torch import Tensor, nn

from cogvx_kernels import expert_adaln, gated_residual, gated_residual_adaln

# shift and scale of video, shift and scale of text
Modulation = tuple[Tensor, Tensor, Tensor, Tensor]


class Gates(NamedTuple):
    """How much of a branch goes into the stream, (batch, dim) of each modality."""

    video: Tensor
    text: Tensor


class ExpertAdaLayerNorm(nn.Module):
    """The norm before a branch, and the gate after it.

    The layer's rows are shift, scale and gate of video and then of text, as released. Source: fact
    sheet section 2.3.
    """

    def __init__(
        self, dim: int, time_embed_dim: int, eps: float = 1e-5, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.backend = backend
        self.linear = nn.Linear(time_embed_dim, 6 * dim)
        self.norm = nn.LayerNorm(dim, eps)

    def forward(self, x: Tensor, temb: Tensor, text_len: int) -> tuple[Tensor, Gates]:
        """The modulated norm of x, and the gates for what is made of it.

        x     (batch, text_len + video_len, dim)
        temb  (batch, time_embed_dim), after its SiLU
        """
        modulation, gates = self._modulation(temb, x)
        h = expert_adaln(
            x,
            *modulation,
            self.norm.weight,
            self.norm.bias,
            text_len=text_len,
            eps=self.norm.eps,
            backend=self.backend,
        )
        return h, gates

    def after(
        self, x: Tensor, y: Tensor, gates: Gates, temb: Tensor, text_len: int
    ) -> tuple[Tensor, Tensor, Gates]:
        """x + gate · y, its modulated norm, and the gates for what is made of that: one pass."""
        modulation, new_gates = self._modulation(temb, x)
        x, h = gated_residual_adaln(
            x,
            y.to(x.dtype),
            *gates,
            *modulation,
            self.norm.weight,
            self.norm.bias,
            text_len=text_len,
            eps=self.norm.eps,
            backend=self.backend,
        )
        return x, h, new_gates

    def residual(self, x: Tensor, y: Tensor, gates: Gates, text_len: int) -> Tensor:
        """x + gate · y: the end of the block."""
        return gated_residual(x, y.to(x.dtype), *gates, text_len=text_len, backend=self.backend)

    def _modulation(self, temb: Tensor, x: Tensor) -> tuple[Modulation, Gates]:
        """(shift, scale, text_shift, text_scale) and the gates; of x's dtype, autocast or not."""
        shift, scale, gate, *of_text = self.linear(temb).to(x.dtype).chunk(6, 1)
        text_shift, text_scale, text_gate = of_text
        return (shift, scale, text_shift, text_scale), Gates(gate, text_gate)

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


class AdaLayerNorm(nn.Module):
    """The last modulation: the same for one modality, without a gate."""

    def __init__(
        self, dim: int, time_embed_dim: int, eps: float = 1e-5, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.backend = backend
        self.linear = nn.Linear(time_embed_dim, 2 * dim)
        self.norm = nn.LayerNorm(dim, eps)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x (batch, video_len, dim), temb (batch, time_embed_dim) after its SiLU."""
        shift, scale = self.linear(temb).to(x.dtype).chunk(2, 1)
        return expert_adaln(
            x,
            shift,
            scale,
            None,
            None,
            self.norm.weight,
            self.norm.bias,
            eps=self.norm.eps,
            backend=self.backend,
        )
