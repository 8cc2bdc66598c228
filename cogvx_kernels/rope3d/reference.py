"""Reference of 3-D rotary position embedding, and of the norms of q and k.

Plain PyTorch. It computes in at least fp32 and rounds once, to the dtype of its input;
gradients come from autograd.
"""

import torch
from torch import Tensor

from .. import modality


def rope3d_reference(
    x: Tensor, cos: Tensor, sin: Tensor, *, text_len: int = 0, interleaved: bool = True
) -> Tensor:
    """Rotate the video tokens of `x` by their position; text tokens are unchanged.

    Pair j of a head, (a, b), becomes (a·cos_j - b·sin_j, b·cos_j + a·sin_j). Interleaved pairs are
    dims (2j, 2j + 1); half-split pairs are (j, j + rotary_dim / 2). Dims from rotary_dim on are
    unchanged.

    x         (batch, seqlen, nheads, headdim), text first: seqlen = text_len + video_len
    cos, sin  (video_len, rotary_dim // 2), rotary_dim <= headdim
    returns   the shape and dtype of x

    Source: Su et al., RoFormer (arXiv 2104.09864), section 3.4; CogVideoX (arXiv 2408.06072),
    section 2.2, for the three axes. The released CogVideoX models use interleaved pairs.
    """
    text, video = modality.split(x, text_len)
    half = cos.shape[-1]
    rotated, rest = video[..., : 2 * half], video[..., 2 * half :]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]  # (video_len, 1, rotary_dim // 2)
    pairs, axis = ((half, 2), -1) if interleaved else ((2, half), -2)
    a, b = rotated.to(wide).unflatten(-1, pairs).unbind(axis)
    rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], axis).flatten(-2)
    return modality.join(text, torch.cat([rotated.to(x.dtype), rest], -1))


def qk_norm_rope3d_reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    text_len: int = 0,
    norm: str = "layer",
    eps: float = 1e-6,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor]:
    """Normalise every head of q and of k, on all tokens; then `rope3d_reference` on video tokens.

    norm="layer":  (x - mean) / sqrt(var + eps) · weight + bias   mean and variance over headdim
    norm="rms":    x / sqrt(mean(x²) + eps) · weight

    q, k           (batch, seqlen, nheads, headdim); k may have fewer heads
    weight, bias   (headdim,), shared by all heads, or None
    cos, sin       as in `rope3d_reference`; they must be given
    returns        q and k, each of its own shape and dtype, rounded once, after the rotation

    Source: CogVideoX (arXiv 2408.06072), section 2.2; eps 1e-6 as in the released models, which
    round between the two steps where this rounds once.
    """

    if cos is None or sin is None:
        raise TypeError("qk_norm_rope3d_reference: cos and sin must be tensors; got None")

    def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        x = x if weight is None else x * weight
        return x if bias is None else x + bias

    q_out, k_out = (
        rope3d_reference(x, cos, sin, text_len=text_len, interleaved=interleaved)
        for x in (normalise(q, q_weight, q_bias), normalise(k, k_weight, k_bias))
    )
    return q_out.to(q.dtype), k_out.to(k.dtype)
