"""Public API: argument checks, backend dispatch, custom-op registration, autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _autocast, _backend, _checks
from .._custom_op import custom_op
from . import torch_gemm
from .reference import ACTIVATIONS, Weights, expert_ffn_reference
from .routing import ExpertWeights, sort_by_expert

ROWS = ("batch", "seqlen", "dim")
CHOICES = ("batch", "seqlen", "top_k")
KERNEL_EXPERTS = 64  # a launch takes a pointer, and a tile a select, for each expert
GEMMS = ("auto", "grouped", "dense")


# --- cogvx::expert_ffn -----------------------------------------------------------------------


@custom_op("expert_ffn")
def _expert_ffn(
    x: Tensor, up: list[Tensor], up_bias: list[Tensor],
    down: list[Tensor], down_bias: list[Tensor], index: Tensor | None, weight: Tensor | None,
    text_len: int, activation: str, recompute: bool, gemm: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result, and the pre-activation of each (token, choice) pair, empty if `recompute`."""
    experts = ExpertWeights(tuple(up), tuple(up_bias), tuple(down), tuple(down_bias))
    if _select_gemm(gemm, x, len(up), index) == "dense":
        return torch_gemm.expert_ffn_fwd(x, experts, text_len, activation, not recompute)
    from . import kernel

    routing = None if index is None else sort_by_expert(index, len(up), weight)
    return kernel.expert_ffn_fwd(x, experts, routing, text_len, activation, not recompute)


@_expert_ffn.register_fake
def _expert_ffn_fake(
    x, up, up_bias, down, down_bias, index, weight, text_len, activation, recompute, gemm
):
    pairs = x.shape[0] * x.shape[1] * (1 if index is None else index.shape[2])
    return x.new_empty(x.shape), x.new_empty((0,) if recompute else (pairs, up[0].shape[0]))


def _setup(ctx, inputs, output):
    x, up, up_bias, down, down_bias, index, weight, text_len, activation, recompute, gemm = inputs
    ctx.lengths = len(up), len(up_bias), len(down), len(down_bias)
    ctx.settings = text_len, activation
    ctx.gemm = gemm
    pre = None if recompute else output[1]
    ctx.save_for_backward(x, index, weight, pre, *up, *up_bias, *down, *down_bias)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _):
    x, index, weight, pre, *flat = ctx.saved_tensors
    experts = []
    for length in ctx.lengths:
        experts.append(flat[:length])
        flat = flat[length:]
    needs = ctx.needs_input_grad
    of_weights = any(any(need) if isinstance(need, list | tuple) else need for need in needs[1:5])
    if dout is None:
        return None, *([None] * n for n in ctx.lengths), *(None,) * 6
    dx, *grads, dweight = _expert_ffn_grads(
        dout, x, *experts, index, weight, pre, *ctx.settings, needs[0], of_weights, ctx.gemm
    )
    lists = (
        list(grad.unbind(0)) if of_weights and length else [None] * length
        for grad, length in zip(grads, ctx.lengths, strict=True)
    )
    dweight = None if weight is None else dweight
    return dx if needs[0] else None, *lists, None, dweight, *(None,) * 4


_expert_ffn.register_autograd(_backward, setup_context=_setup)


def _select_gemm(gemm, x, num_experts, index):
    """The GEMM backend, chosen in the op because a compiler traces it without a device.

    One expert on a GPU is "dense", because cuBLAS is hard to beat at a plain product; two are
    "grouped", because "dense" needs a launch for each expert and sample. Not measured.
    """
    if gemm != "auto":
        return gemm
    return "dense" if x.is_cuda and index is None and num_experts == 1 else "grouped"


@custom_op("expert_ffn_backward")
def _expert_ffn_grads(
    dout: Tensor, x: Tensor, up: list[Tensor], up_bias: list[Tensor],
    down: list[Tensor], down_bias: list[Tensor], index: Tensor | None, weight: Tensor | None,
    pre: Tensor | None, text_len: int, activation: str, rows: bool, weights: bool, gemm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    experts = ExpertWeights(tuple(up), tuple(up_bias), tuple(down), tuple(down_bias))
    settings = pre, text_len, activation, (rows, weights)
    if _select_gemm(gemm, x, len(up), index) == "dense":
        return torch_gemm.expert_ffn_bwd(dout, x, experts, *settings)
    from . import kernel

    routing = None if index is None else sort_by_expert(index, len(up), weight)
    return kernel.expert_ffn_bwd(dout, x, experts, routing, *settings)


@_expert_ffn_grads.register_fake
def _expert_ffn_grads_fake(
    dout, x, up, up_bias, down, down_bias, index, weight, pre, text_len, activation, rows, weights,
    gemm,
):  # fmt: skip
    nothing = (0,)
    shapes = [
        (len(tensors), *tensors[0].shape) if tensors and weights else nothing
        for tensors in (up, up_bias, down, down_bias)
    ]
    return (
        x.new_empty(x.shape if rows else nothing),
        *(x.new_empty(shape) for shape in shapes),
        x.new_empty(nothing) if weight is None else weight.new_empty(weight.shape),
    )


# --- checks ----------------------------------------------------------------------------------


def _listed(op: str, name: str, value: Weights | None, dims: Sequence[str]) -> tuple[Tensor, ...]:
    """The weights of each expert as a tuple, empty for None."""
    if value is None:
        return ()
    if isinstance(value, Tensor):
        _checks.tensor(op, name, value, ("num_experts", *dims))
        return value.unbind(0)
    if not isinstance(value, Sequence) or isinstance(value, str) or not len(value):
        raise TypeError(
            f"{op}: {name} must be a tensor (num_experts, {', '.join(dims)}), or a sequence of "
            f"tensors ({', '.join(dims)}); got {_checks.describe(value)}"
        )
    return tuple(_checks.tensor(op, name, one, dims) for one in value)


def _check_experts(
    op: str,
    x: Tensor,
    activation: str,
    up: tuple[Tensor, ...],
    up_bias: tuple[Tensor, ...],
    down: tuple[Tensor, ...],
    down_bias: tuple[Tensor, ...],
) -> None:
    _checks.choice(op, "activation", activation, tuple(ACTIVATIONS))
    if not up:
        raise ValueError(f"{op}: up must hold at least one expert; got none")
    dim, (rows, _) = x.shape[2], up[0].shape
    if activation == "swiglu" and rows % 2:
        raise ValueError(
            f'{op}: up must have an even number of rows for activation="swiglu", values and then '
            f"gates; got {tuple(up[0].shape)}"
        )
    ffn_dim = rows // 2 if activation == "swiglu" else rows
    wanted = (
        ("up", up, (rows, dim), "(ffn_dim, dim) for x of shape", x),
        ("up_bias", up_bias, (rows,), "(ffn_dim,) for up", up[0]),
        ("down", down, (dim, ffn_dim), "(dim, ffn_dim) for up", up[0]),
        ("down_bias", down_bias, (dim,), "(dim,) for x of shape", x),
    )
    dtypes = (x.dtype,)
    for name, tensors, shape, why, of in wanted:
        if len(tensors) != len(up) and (tensors or not name.endswith("bias")):
            raise ValueError(
                f"{op}: {name} must hold one tensor for each of the {len(up)} experts of up; "
                f"got {len(tensors)}"
            )
        for one in tensors:
            if not _checks.fits(one, shape, dtypes, x):
                _checks.dtype(op, name, one, dtypes)
                _checks.same_device(op, name, one, "x", x)
                _checks.shape(op, name, one, shape, f"of each expert {why} {tuple(of.shape)}")


def _check_index(op: str, x: Tensor, index: Tensor | None, weight: Tensor | None) -> None:
    if index is None:
        if weight is not None:
            raise ValueError(f"{op}: weight must be None without an index; got a tensor")
        return
    dims = ", ".join(CHOICES)
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{op}: index must be an int32 or int64 tensor ({dims}); got {_checks.describe(index)}"
        )
    if index.dim() != 3 or index.shape[:2] != x.shape[:2] or not index.shape[2]:
        raise ValueError(
            f"{op}: index must be ({dims}) for x of shape {tuple(x.shape)}, with a top_k of at "
            f"least 1; got {tuple(index.shape)}"
        )
    _checks.same_device(op, "index", index, "x", x)
    if weight is not None:
        _checks.tensor(op, "weight", weight, CHOICES)
        _checks.dtype(op, "weight", weight, (x.dtype, torch.float32))
        _checks.same_device(op, "weight", weight, "x", x)
        _checks.shape(op, "weight", weight, index.shape, "the shape of index")


def _unsupported_reason(
    x: Tensor, experts: int, **others: Tensor | Sequence[Tensor] | None
) -> str | None:
    """Return why the kernel cannot run, or None."""
    if experts > KERNEL_EXPERTS:
        return f"there are {experts} experts; the kernel takes up to {KERNEL_EXPERTS}"
    return _backend.triton_reason("x", x) or _backend.transform_reason(x=x, **others)


# --- the public function ---------------------------------------------------------------------


def expert_ffn(
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
    recompute: bool = True,
    gemm: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Feed-forward with experts: up, activation, down.

    Args:
        x: (batch, seqlen, dim), text first; fp32, fp16 or bf16, any strides.
        up: (num_experts, ffn_dim, dim), or a sequence of num_experts tensors (ffn_dim, dim), such
            as the weights of linear layers; of x's dtype, any strides. For "swiglu" 2 · ffn_dim
            rows: values, and then gates.
        up_bias: (num_experts, ffn_dim), or a sequence of (ffn_dim,), or None.
        down: (num_experts, dim, ffn_dim), or a sequence of (dim, ffn_dim); required, by name where
            up_bias is left out.
        down_bias: (num_experts, dim), or a sequence of (dim,), or None.
        index: (batch, seqlen, top_k) int32 or int64: the experts of each token. A number out of
            [0, num_experts) adds nothing. No token is dropped and experts have no capacity; one
            may have no token. None: a single expert serves all tokens; of two the first serves
            text and the second video.
        weight: (batch, seqlen, top_k), x's dtype or fp32: the weight of each expert; None for 1.
        text_len: number of text tokens.
        activation: "gelu_tanh", "gelu" (exact) or "swiglu".
        recompute: compute the pre-activation again in the backward (five products instead of
            four). False: keep it, batch · seqlen · top_k rows as wide as up has rows, in x's
            dtype; at 5B, 49 frames of 480x720 and batch 2 that is 874 MB a layer in bf16.
        gemm: "grouped", one Triton launch for each product, over all experts; "dense", torch's
            matrix products (cuBLAS), one expert at a time, without an index; "auto", dense for one
            expert on a GPU, else grouped.
        backend: "auto", "kernel" or "reference".

    Returns:
        (batch, seqlen, dim), new, contiguous, of x's dtype. The hidden activation, the output of
        each of a token's experts, and the result are each rounded once. Under autocast x and the
        experts are cast to autocast's dtype, which is the result's, as F.linear's is there.

    Raises:
        TypeError, ValueError: an invalid argument, named in the message.
        RuntimeError: backend="kernel" and the kernel cannot run.

    One expert for all tokens is a plain matrix product, at which a Triton kernel is not expected to
    beat cuBLAS. With several experts, grouped saves launches, copies and the tails of small
    products.

    Source: arXiv 1706.03762, section 3.3; arXiv 2311.03079, section 2.1; arXiv 2002.05202.
    """
    op = "expert_ffn"
    if _autocast.enabled(x):
        x, up, up_bias, down, down_bias = _autocast.cast(
            _autocast.dtype(x), x, up, up_bias, down, down_bias
        )
        (weight,) = _autocast.parameters(x.dtype, weight)
        with _autocast.off(x):
            return expert_ffn(
                x, up, up_bias, down, down_bias, index, weight, text_len=text_len,
                activation=activation, recompute=recompute, gemm=gemm, backend=backend,
            )  # fmt: skip
    _checks.tensor(op, "x", x, ROWS)
    _checks.integer(op, "text_len", text_len, 0, x.shape[1], "(the seqlen of x)")
    experts = (
        _listed(op, "up", up, ("ffn_dim", "dim")),
        _listed(op, "up_bias", up_bias, ("ffn_dim",)),
        _listed(op, "down", down, ("dim", "ffn_dim")),
        _listed(op, "down_bias", down_bias, ("dim",)),
    )
    _check_experts(op, x, activation, *experts)
    _check_index(op, x, index, weight)
    count = len(experts[0])
    if index is None and count > 2:
        raise ValueError(
            f"{op}: index must say which of the {count} experts each token goes to; got None"
        )
    _checks.flag(op, "recompute", recompute)
    _checks.choice(op, "gemm", gemm, GEMMS)
    if gemm == "dense" and index is not None:
        raise ValueError(f'{op}: gemm must be "grouped" or "auto" with an index; got "dense"')
    reason = _unsupported_reason(
        x, count, up=experts[0], up_bias=experts[1], down=experts[2], down_bias=experts[3],
        index=index, weight=weight,
    )  # fmt: skip
    if _backend.choose(backend, op, reason, x):
        return _expert_ffn(x, *experts, index, weight, text_len, activation, recompute, gemm)[0]
    biases = (experts[1] or None, experts[3] or None)
    return expert_ffn_reference(
        x, experts[0], biases[0], experts[2], biases[1], index, weight,
        text_len=text_len, activation=activation,
    )  # fmt: skip
