"""GEMM backend "dense" of expert_ffn: torch's matrix products, one expert at a time, no copies.

A single expert's tokens are one run of rows; those of text and of video are a run in each sample.
On a GPU the products are cuBLAS', with bias and tanh-GELU in its epilogue where the pre-activation
is not kept.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import modality
from .reference import ACTIVATIONS
from .routing import ExpertWeights


def _swiglu_grad(grad: Tensor, pre: Tensor) -> Tensor:
    values, gates = pre.chunk(2, -1)
    dgates = torch.ops.aten.silu_backward(grad * values, gates)
    return torch.cat([grad * F.silu(gates), dgates], -1)


# By activation: (gradient of the activation, pre-activation) -> gradient of the pre-activation.
GRADIENTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "gelu": torch.ops.aten.gelu_backward,
    "swiglu": _swiglu_grad,
}


def _runs(experts: int, text_len: int, *tensors: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield (expert, rows of each tensor), text before video; views where strides allow.

    tensors  (batch, seqlen, …) each
    """
    if experts == 1:
        yield 0, [x.flatten(0, 1) for x in tensors]
        return
    for expert in (modality.TEXT, modality.VIDEO):
        parts = [modality.split(x, text_len)[expert] for x in tensors]
        for sample in range(parts[0].shape[0]):
            yield expert, [part[sample] for part in parts]


def _up(x: Tensor, up: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """(the hidden activation, its pre-activation)."""
    pre = F.linear(x, up, bias)
    return ACTIVATIONS[activation](pre), pre


def _hidden(x: Tensor, up: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The hidden activation without its pre-activation."""
    if x.is_cuda and activation == "gelu_tanh" and bias is not None:
        return torch._addmm_activation(bias, x, up.t(), use_gelu=True)
    return _up(x, up, bias, activation)[0]


def expert_ffn_fwd(
    x: Tensor, experts: ExpertWeights, text_len: int, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """As `kernel.expert_ffn_fwd`, without routing."""
    up, up_bias, down, down_bias = experts
    batch, seqlen, _ = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    pre = x.new_empty((batch, seqlen, len(up[0])) if keep else (batch, seqlen, 0))
    for e, (rows, to, kept) in _runs(len(up), text_len, x, out, pre):
        bias = up_bias[e] if up_bias else None
        if keep:
            hidden, made = _up(rows, up[e], bias, activation)
            kept.copy_(made)
        else:
            hidden = _hidden(rows, up[e], bias, activation)
        if down_bias:
            torch.addmm(down_bias[e], hidden, down[e].t(), out=to)
        else:
            torch.mm(hidden, down[e].t(), out=to)
    return out, pre.flatten(0, 1) if keep else pre.new_empty((0,))


def expert_ffn_bwd(
    dout: Tensor, x: Tensor, experts: ExpertWeights, pre: Tensor | None, text_len: int,
    activation: str, needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `kernel.expert_ffn_bwd`, without routing; the gradient of the share is empty."""
    up, up_bias, down, down_bias = experts
    rows, weights = needs
    nothing = x.new_empty((0,))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kept = x[..., :0] if pre is None else pre.view(*x.shape[:2], pre.shape[1])
    grads = [
        [torch.zeros_like(w) for w in tensors] if weights else []
        for tensors in (up, up_bias, down, down_bias)
    ]
    dup, dup_bias, ddown, ddown_bias = grads
    slope = GRADIENTS[activation]
    for e, (of_out, of_x, to, of_pre) in _runs(len(up), text_len, dout, x, dx, kept):
        if pre is None:
            hidden, of_pre = _up(of_x, up[e], up_bias[e] if up_bias else None, activation)
        else:
            hidden = ACTIVATIONS[activation](of_pre)
        dpre = slope(of_out @ down[e], of_pre)
        if rows:
            torch.mm(dpre, up[e], out=to)
        if weights:
            dup[e].addmm_(dpre.t(), of_x)
            ddown[e].addmm_(of_out.t(), hidden)
            if dup_bias:
                dup_bias[e] += dpre.sum(0)
            if ddown_bias:
                ddown_bias[e] += of_out.sum(0)
    up_w, up_b, down_w, down_b = (torch.stack(g) if g else nothing.clone() for g in grads)
    return dx if rows else nothing.clone(), up_w, up_b, down_w, down_b, nothing.clone()
