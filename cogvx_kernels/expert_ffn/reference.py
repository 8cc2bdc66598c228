"""Reference of a feed-forward with experts: two linear layers for each expert.

Plain PyTorch. It computes in at least fp32 and rounds to the dtype of its input what is stored: the
hidden activation between the two products, the output of each expert of a token with several, and
the result. Gradients come from autograd.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import modality

Weights = Tensor | Sequence[Tensor]


def swiglu(pre: Tensor) -> Tensor:
    """Values times SiLU of gates; the last dim holds the values and then the gates."""
    values, gates = pre.chunk(2, -1)
    return values * F.silu(gates)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "swiglu": swiglu,
}


def expert_ffn_reference(
    x: Tensor,
    up: Weights,
    up_bias: Weights | None = None,
    down: Weights | None = None,
    down_bias: Weights | None = None,
    index: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    text_len: int = 0,
    activation: str = "gelu_tanh",
) -> Tensor:
    """The sum over a token's experts e of weight · (act(x · up[e]ᵀ + up_bias[e]) · down[e]ᵀ + …).

    x                  (batch, seqlen, dim), text first
    up, up_bias        (num_experts, ffn_dim, dim), (num_experts, ffn_dim) or None; for "swiglu"
                       twice as many rows, values and then gates
    down, down_bias    (num_experts, dim, ffn_dim), (num_experts, dim) or None
    index, weight      (batch, seqlen, top_k): the experts of each token and their weights, None
                       for 1; an index out of range adds nothing
    returns            the shape and dtype of x

    Without an index one expert serves all tokens, or the first of two serves text and the second
    video. Source: Vaswani et al. (arXiv 1706.03762), section 3.3; experts of a modality: CogVLM
    (arXiv 2311.03079), section 2.1; SwiGLU: Shazeer (arXiv 2002.05202).
    """
    if down is None:
        raise TypeError("expert_ffn_reference: down must hold the experts' weights; got None")
    wide = torch.promote_types(x.dtype, torch.float32)

    def linear(tokens: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(wide)
        return F.linear(tokens.to(wide), matrix.to(wide), bias)

    def expert(e: int, tokens: Tensor) -> Tensor:
        pre = linear(tokens, up[e], None if up_bias is None else up_bias[e])
        hidden = ACTIVATIONS[activation](pre).to(x.dtype)
        return linear(hidden, down[e], None if down_bias is None else down_bias[e])

    if index is None:
        parts = modality.split(x, text_len) if len(up) == 2 else (x,)
        y = torch.cat([expert(e, tokens) for e, tokens in enumerate(parts)], 1)
    else:
        y = torch.zeros_like(x, dtype=wide)
        for e in range(len(up)):
            mine = index == e  # (batch, seqlen, top_k)
            # Tokens of other experts are masked out, with their infinities.
            output = expert(e, torch.where(mine.any(-1, keepdim=True), x, 0))
            for k in range(index.shape[2]):
                part = output if weight is None else output * weight[..., k, None].to(wide)
                y = y + torch.where(mine[..., k, None], part.to(x.dtype), 0)
    return y.to(x.dtype)
