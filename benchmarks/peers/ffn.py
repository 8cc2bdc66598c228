"""Feed-forward layers of several experts in plain torch: baselines of `expert_ffn`."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cogvx_kernels.testing import OpInfo

from ..registry import Arguments, Function, Unavailable, compile_, provider


def _only_tanh_gelu(arguments: Arguments) -> None:
    if arguments.get("activation", "gelu_tanh") != "gelu_tanh":
        raise Unavailable("it has tanh-GELU alone")


def _bias(biases: Tensor | None, expert: int) -> Tensor | None:
    return None if biases is None else biases[expert]


# --- expert by expert ------------------------------------------------------------------------


STEPS = "linear, GELU, linear for each expert, between split and cat; routed: gather, index_add"
CUBLASLT = "bias and tanh-GELU in cuBLASLt's epilogue, and addmm, for each expert and sample"
GROUPED = "sort, gather, torch._grouped_mm, bias and GELU, again, ungather, combine"


@provider("split-cat", STEPS, "expert_ffn")
def split_cat(info: OpInfo, arguments: Arguments) -> Function:
    """Linear, GELU, linear in the dtype of x, as diffusers' FeedForward; of each expert in turn.

    Text and video are split and concatenated; routed tokens are found, which waits for the device,
    gathered, and added.
    """
    _only_tanh_gelu(arguments)

    def expert_ffn(
        x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
        index: Tensor | None = None, weight: Tensor | None = None, *, text_len: int = 0, **_: Any,
    ) -> Tensor:  # fmt: skip
        def expert(e: int, tokens: Tensor) -> Tensor:
            hidden = F.gelu(F.linear(tokens, up[e], _bias(up_bias, e)), approximate="tanh")
            return F.linear(hidden, down[e], _bias(down_bias, e))

        if index is None:
            parts = x.split((text_len, x.shape[1] - text_len), 1) if len(up) == 2 else (x,)
            outputs = [expert(e, tokens) for e, tokens in enumerate(parts)]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        tokens, pairs = x.flatten(0, 1), index.flatten(0, 1)
        out = torch.zeros_like(tokens)
        for e in range(len(up)):
            token, choice = (pairs == e).nonzero(as_tuple=True)
            y = expert(e, tokens[token])
            if weight is not None:
                y = y * weight.flatten(0, 1)[token, choice, None].to(y.dtype)
            out = out.index_add(0, token, y)
        return out.view_as(x)

    return expert_ffn


@provider("compile-split-cat", "torch.compile of split-cat, fullgraph, default mode", "expert_ffn")
def _compiled_split_cat(info: OpInfo, arguments: Arguments) -> Function:
    if arguments.get("index") is not None:
        raise Unavailable("tokens that are looked for break the graph")
    return compile_(split_cat(info, arguments))


@provider("cublaslt-gelu", CUBLASLT, "expert_ffn", passes=("forward",))
def cublaslt_gelu(info: OpInfo, arguments: Arguments) -> Function:
    """Two calls for each expert and run of tokens: bias and GELU in cuBLASLt's epilogue, and addmm.

    Without a gradient: torch has none for it.
    """
    _only_tanh_gelu(arguments)
    if not arguments["x"].is_cuda:
        raise Unavailable("on a CPU torch's _addmm_activation is another GELU")
    if arguments.get("index") is not None:
        raise Unavailable("it takes no index")
    if arguments.get("up_bias") is None or arguments.get("down_bias") is None:
        raise Unavailable("its epilogue needs biases")

    def expert_ffn(
        x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor,
        index: None = None, weight: None = None, *, text_len: int = 0, **_: Any,
    ) -> Tensor:  # fmt: skip
        out = torch.empty_like(x)
        runs = zip(_runs(x, up, text_len), _runs(out, up, text_len), strict=True)
        for (e, rows), (_, to) in runs:
            hidden = torch._addmm_activation(up_bias[e], rows, up[e].t(), use_gelu=True)
            torch.addmm(down_bias[e], hidden, down[e].t(), out=to)
        return out

    return expert_ffn


def _runs(x: Tensor, up: Tensor, text_len: int) -> list[tuple[int, Tensor]]:
    """(expert, its rows), all of them views."""
    if len(up) == 1:
        return [(0, x.view(-1, x.shape[2]))]
    return [run for sample in x for run in ((0, sample[:text_len]), (1, sample[text_len:]))]


# --- all experts at once ---------------------------------------------------------------------


@provider("grouped-mm", GROUPED, "expert_ffn", compiled="compile-grouped-mm")
def grouped_mm(info: OpInfo, arguments: Arguments) -> Function:
    """Sort, gather, torch._grouped_mm twice with bias and GELU between, ungather, combine."""
    _only_tanh_gelu(arguments)
    if arguments.get("index") is None:
        raise Unavailable("it is for tokens with an index")
    if arguments["x"].dtype is not torch.bfloat16:
        raise Unavailable("torch._grouped_mm takes bfloat16 alone")

    def expert_ffn(
        x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
        index: Tensor, weight: Tensor | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        top_k = index.shape[2]
        expert = index.flatten()
        order = expert.argsort(stable=True)
        place = order.argsort()
        sorted_expert = expert[order]
        ends = torch.arange(1, len(up) + 1, device=x.device)
        offs = torch.searchsorted(sorted_expert, ends).int()
        rows = x.flatten(0, 1).index_select(0, order // top_k)
        hidden = torch._grouped_mm(rows, up.transpose(1, 2), offs=offs)
        if up_bias is not None:
            hidden = hidden + up_bias[sorted_expert]
        hidden = F.gelu(hidden, approximate="tanh")
        y = torch._grouped_mm(hidden, down.transpose(1, 2), offs=offs)
        if down_bias is not None:
            y = y + down_bias[sorted_expert]
        y = y.index_select(0, place).unflatten(0, (-1, top_k))
        if weight is not None:
            y = y * weight.flatten(0, 1)[:, :, None].to(y.dtype)
        return y.sum(1).view_as(x)

    return expert_ffn
