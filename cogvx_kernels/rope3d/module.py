"""`nn.Module`s for attention: rotary position, with or without the norms of q and k."""

from torch import Tensor, nn

from .. import _checks
from .._backend import OpModule
from .op import qk_norm_rope3d, rope3d


class RoPE3D(OpModule):
    """`rope3d` as a module; no parameters."""

    def __init__(self, interleaved: bool = True) -> None:
        super().__init__()
        self.interleaved = interleaved

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, text_len: int = 0) -> Tensor:
        """Rotate the video tokens of x.

        Args:
            x: (batch, seqlen, nheads, headdim), text first.
            cos, sin: (seqlen - text_len, rotary_dim // 2) fp32, of `rope3d_tables`.
            text_len: text tokens, which are not rotated.

        Returns:
            A new tensor of x's shape and dtype.
        """
        return rope3d(
            x, cos, sin, text_len=text_len, interleaved=self.interleaved, backend=self.backend
        )

    def extra_repr(self) -> str:
        return f"interleaved={self.interleaved}, backend={self.backend!r}"


class QKNormRoPE3D(OpModule):
    """`qk_norm_rope3d` as a module that owns the norms of q and k.

    The norms are torch modules named as in diffusers: the keys of the state dict are
    `norm_q.weight`, `norm_q.bias`, `norm_k.weight`, `norm_k.bias` for every backend. Their eps is
    1e-6 in CogVideoX and HunyuanVideo, 1e-5 in Mochi.
    """

    def __init__(
        self,
        headdim: int,
        norm: str = "layer",
        eps: float = 1e-6,
        affine: bool = True,
        interleaved: bool = True,
    ) -> None:
        super().__init__()
        _checks.choice("QKNormRoPE3D", "norm", norm, ("layer", "rms"))
        make = nn.LayerNorm if norm == "layer" else nn.RMSNorm
        self.norm_q = make(headdim, eps=eps, elementwise_affine=affine)
        self.norm_k = make(headdim, eps=eps, elementwise_affine=affine)
        self.norm = norm
        self.eps = eps
        self.interleaved = interleaved

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        text_len: int = 0,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Normalise every head of q and k, and rotate the video tokens.

        Args:
            q, k: (batch, seqlen, nheads, headdim), text first; k may have fewer heads.
            cos, sin: (seqlen - text_len, rotary_dim // 2) fp32, of `rope3d_tables`.
            text_len: text tokens, which are normalised and not rotated.
            inplace: overwrite q and k; an error if a gradient is required.

        Returns:
            (q, k), each of its shape and dtype.
        """
        q_bias, k_bias = (getattr(norm, "bias", None) for norm in (self.norm_q, self.norm_k))
        return qk_norm_rope3d(
            q, k, self.norm_q.weight, q_bias, self.norm_k.weight, k_bias, cos, sin,
            text_len=text_len, norm=self.norm, eps=self.eps, interleaved=self.interleaved,
            inplace=inplace, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"interleaved={self.interleaved}, backend={self.backend!r}"
