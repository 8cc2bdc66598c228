"""`nn.Module` of an adaptive norm; the modulation is an argument."""

from torch import Tensor, nn

from .. import _checks
from .._backend import OpModule
from .op import expert_adaln, gated_residual_adaln


class ExpertAdaLayerNorm(OpModule):
    """`expert_adaln` and `gated_residual_adaln` as a module that owns the norm.

    The norm is a torch module: the keys of the state dict are `norm.weight` and `norm.bias`, as in
    diffusers' CogVideoXLayerNormZero, for every backend. The default eps is CogVideoX's, 1e-5;
    DiT, Wan, HunyuanVideo and Mochi have 1e-6.
    """

    def __init__(
        self,
        dim: int,
        norm: str = "layer",
        eps: float = 1e-5,
        affine: bool = True,
    ) -> None:
        super().__init__()
        _checks.choice("ExpertAdaLayerNorm", "norm", norm, ("layer", "rms"))
        make = nn.LayerNorm if norm == "layer" else nn.RMSNorm
        self.norm = make(dim, eps=eps, elementwise_affine=affine)
        self.kind = norm
        self.eps = eps

    def forward(
        self,
        x: Tensor,
        shift: Tensor | None,
        scale: Tensor | None,
        text_shift: Tensor | None = None,
        text_scale: Tensor | None = None,
        text_len: int = 0,
    ) -> Tensor:
        """norm(x) * (1 + scale) + shift, with a shift and scale for each modality.

        Args:
            x: (batch, seqlen, dim), text first.
            shift, scale: of video tokens, (batch, dim), or (batch, groups, dim) for equal runs of
                tokens, such as frames.
            text_shift, text_scale: of text tokens, likewise; None without text.
            text_len: number of text tokens.

        Returns:
            A new tensor of x's shape and dtype.
        """
        return expert_adaln(
            x, shift, scale, text_shift, text_scale, self.norm.weight,
            getattr(self.norm, "bias", None), text_len=text_len, norm=self.kind, eps=self.eps,
            backend=self.backend,
        )  # fmt: skip

    def after_residual(
        self,
        x: Tensor,
        y: Tensor,
        gate: Tensor | None,
        text_gate: Tensor | None = None,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        text_shift: Tensor | None = None,
        text_scale: Tensor | None = None,
        text_len: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """x + gate * y and its modulated norm, in one pass.

        Args:
            x, y: (batch, seqlen, dim), text first.
            gate, shift, scale: of video tokens, as in `forward`; alike in shape.
            text_gate, text_shift, text_scale: of text tokens; None without text, where shift and
                scale are passed by name.
            text_len: number of text tokens.

        Returns:
            (the sum, its norm), new tensors of x's shape and dtype.
        """
        return gated_residual_adaln(
            x, y, gate, text_gate, shift, scale, text_shift, text_scale, self.norm.weight,
            getattr(self.norm, "bias", None), text_len=text_len, norm=self.kind, eps=self.eps,
            backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"norm={self.kind!r}, backend={self.backend!r}"
