"""Rotary positions and norms of heads of other libraries."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cogvx_kernels.testing import OpInfo

from ..inputs import HALF_SPLIT
from ..registry import MODEL, Arguments, Function, Unavailable, find, provider

STEPS = "diffusers' own steps on (batch, heads, seq, dim); rounds between norm and rotation"


def _tables(arguments: Arguments) -> tuple[Any, tuple[Tensor, ...]]:
    """diffusers' function and its tables, full width."""
    if not arguments.get("interleaved") or arguments.get("norm", "layer") != "layer":
        raise Unavailable("diffusers' CogVideoX has LayerNorm and interleaved pairs")
    apply_rotary_emb = find("diffusers", "apply_rotary_emb", "diffusers.models.embeddings")
    return apply_rotary_emb, tuple(
        arguments[name].repeat_interleave(2, -1) for name in ("cos", "sin")
    )


@provider("diffusers-eager", STEPS, "rope3d", conventions=(MODEL,), overwrites=True)
def _diffusers_rope3d(info: OpInfo, arguments: Arguments) -> Function:
    """apply_rotary_emb on the video tokens of (batch, heads, seq, dim), written over them.

    There is no norm whose result to write over, so x itself is.
    """
    apply_rotary_emb, tables = _tables(arguments)

    def rope3d(x: Tensor, text_len: int, **_: Any) -> Tensor:
        if x.requires_grad and x.is_leaf:
            x = x.clone()
        x = x.transpose(1, 2)
        x[:, :, text_len:] = apply_rotary_emb(x[:, :, text_len:], tables)
        return x.transpose(1, 2)

    return rope3d


@provider("diffusers-eager", STEPS, "qk_norm_rope3d", conventions=(MODEL,), overwrites=True)
def _diffusers_qk_norm_rope3d(info: OpInfo, arguments: Arguments) -> Function:
    """The steps of diffusers' CogVideoX attention processor between the projection and SDPA.

    On the (batch, heads, seq, dim) view: nn.LayerNorm, then apply_rotary_emb on the video tokens,
    written over them.
    """
    apply_rotary_emb, tables = _tables(arguments)

    def norm_turn(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, text_len: int, eps: float
    ) -> Tensor:
        x = F.layer_norm(x.transpose(1, 2), x.shape[-1:], weight, bias, eps)
        x[:, :, text_len:] = apply_rotary_emb(x[:, :, text_len:], tables)
        return x.transpose(1, 2)

    def qk_norm_rope3d(
        q: Tensor, k: Tensor, *, text_len: int, eps: float = 1e-6, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        return (
            norm_turn(q, rest["q_weight"], rest["q_bias"], text_len, eps),
            norm_turn(k, rest["k_weight"], rest["k_bias"], text_len, eps),
        )

    return qk_norm_rope3d


@provider(
    "liger",
    "liger-kernel's rotary: in place; no text, no norm, half-split pairs, full-width tables",
    "rope3d", conventions=(HALF_SPLIT,), passes=("forward",), overwrites=True,
)  # fmt: skip
def _liger_rope3d(info: OpInfo, arguments: Arguments) -> Function:
    """Liger turns q and k at once, in place; the two halves of the batch stand for them here."""
    x = arguments["x"]
    if not x.is_cuda:
        raise Unavailable("Liger's kernels do not run on a CPU")
    turn = find("liger-kernel", "liger_rotary_pos_emb", "liger_kernel.transformers.rope")
    if x.shape[0] % 2 or not x.is_contiguous():
        raise Unavailable("Liger's kernel is in place for a contiguous x and an even batch alone")
    cos, sin = (torch.cat([arguments[name]] * 2, -1)[None] for name in ("cos", "sin"))

    def rope3d(x: Tensor, **_: Any) -> Tensor:
        q, k = (half.transpose(1, 2) for half in x.chunk(2))
        turn(q, k, cos, sin)
        return x

    return rope3d
