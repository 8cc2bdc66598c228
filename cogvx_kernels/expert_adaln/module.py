"""The drop-in: the norm of a block, whose modulation comes from outside."""

from torch import Tensor, nn

from .. import _checks
from .op import expert_adaln, gated_residual_adaln


class ExpertAdaLayerNorm(nn.Module):
    """`expert_adaln` and `gated_residual_adaln` as a module that owns the norm.

    The norm is a plain torch module, so the keys of the state dict are `norm.weight` and
    `norm.bias`, as in diffusers' CogVideoXLayerNormZero, whatever the backend.
    """

    def __init__(
        self,
        dim: int,
        norm: str = "layer",
        eps: float = 1e-5,
        affine: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _checks.choice("ExpertAdaLayerNorm", "norm", norm, ("layer", "rms"))
        make = nn.LayerNorm if norm == "layer" else nn.RMSNorm
        self.norm = make(dim, eps=eps, elementwise_affine=affine)
        self.kind = norm
        self.eps = eps
        self.backend = backend

    def forward(
        self,
        x: Tensor,
        shift: Tensor | None,
        scale: Tensor | None,
        text_shift: Tensor | None = None,
        text_scale: Tensor | None = None,
        text_len: int = 0,
    ) -> Tensor:
        return expert_adaln(
            x,
            shift,
            scale,
            text_shift,
            text_scale,
            self.norm.weight,
            getattr(self.norm, "bias", None),
            text_len=text_len,
            norm=self.kind,
            eps=self.eps,
            backend=self.backend,
        )

    def after_residual(
        self,
        x: Tensor,
        y: Tensor,
        gate: Tensor | None,
        text_gate: Tensor | None,
        shift: Tensor | None,
        scale: Tensor | None,
        text_shift: Tensor | None = None,
        text_scale: Tensor | None = None,
        text_len: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """(x + gate·y, its modulated norm), in one pass."""
        return gated_residual_adaln(
            x,
            y,
            gate,
            text_gate,
            shift,
            scale,
            text_shift,
            text_scale,
            self.norm.weight,
            getattr(self.norm, "bias", None),
            text_len=text_len,
            norm=self.kind,
            eps=self.eps,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"norm={self.kind!r}, backend={self.backend!r}"
