"""Argument errors of every op, driven by `OpInfo`."""

import inspect
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from cogvx_kernels._opinfo import OpInfo
from cogvx_kernels.testing import OPS, as_tuple, materialize

from .op_helpers import EVERY_OP


def wrong_tensors(x: Tensor) -> dict[str, Any]:
    """Invalid values of a tensor argument."""
    wrong = {
        "a list": x.tolist() if x.numel() < 100 else [1.0],
        "a number": 1.0,
        "complex": x.to(torch.complex64),
        "one dim more": x[None],
        "one dim less": x[0],
        "on another device": x.to("meta"),
        "of bits": x > 0,
    }
    if not x.is_floating_point():  # any integers will do, and any number of them for a token
        return wrong | {"floats": x.float(), "one token more": torch.cat([x, x[:, :1]], 1)}
    return wrong | {"integers": x.int(), "last dim longer": longer(x)}


def wrong_lists(x: Tensor) -> dict[str, Any]:
    """Invalid values of an argument that may be a list of tensors, one for each expert."""
    *others, last = x.unbind()
    return {
        "an empty list": [],
        "a list with a number": [*others, 1.0],
        "a list with None": [*others, None],
        "a list of unlike shapes": [*others, longer(last)],
        "a list of unlike dims": [*others, last[None]],
        "a list of unlike dtypes": [*others, last.half()],
        "a list on two devices": [*others, last.to("meta")],
    }


def longer(x: Tensor) -> Tensor:
    return torch.cat([x, x[..., :1]], -1)


def listed(info: OpInfo) -> set[str]:
    """Names of the arguments that the torch op takes as lists of tensors."""
    schema = getattr(torch.ops.cogvx, info.torch_ops[0]).default._schema
    return {a.name for a in schema.arguments if "List[Tensor]" in str(a.type)}


WRONG_VALUES: Mapping[type, tuple[Any, ...]] = {
    int: (-1, 10**6, 2.5, "2", True, None),
    bool: (1, "yes", None),
    str: ("nonsense", 3, None),
    float: (0.0, -1.0, float("nan"), float("inf"), "1e-6", None),
    type(None): ("nonsense", 3, 1.5, [1.0]),  # a tensor that may be absent
}


def cases_of_wrong_arguments(info: OpInfo) -> Iterator[tuple[str, str, dict[str, Any]]]:
    arguments = materialize(info.samples[0], torch.float32)
    parameters = inspect.signature(info.op).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    for name, value in {**defaults, **arguments}.items():
        if isinstance(value, Tensor):
            wrongs = wrong_tensors(value)
            if name in listed(info):
                wrongs |= wrong_lists(value)
            if name != info.differentiable[0]:  # whose dtype sets the others'
                wrongs |= {"fp16": value.half(), "fp64": value.double()}
            for what, wrong in wrongs.items():
                yield name, what, {**arguments, name: wrong}
        else:
            for wrong in WRONG_VALUES[type(value)]:
                yield name, repr(wrong), {**arguments, name: wrong}


@EVERY_OP
def test_wrong_arguments_are_named(info):
    """Raised before any allocation: op, argument, what was wanted, what came."""
    lenient = set()
    count = 0
    for name, what, arguments in cases_of_wrong_arguments(info):
        count += 1
        allocated = mock.Mock(side_effect=AssertionError(f"{name}, {what}: allocated first"))
        try:
            with mock.patch.object(torch, "empty", allocated):
                info.op(**{"backend": "kernel", **arguments})
        except (TypeError, ValueError, RuntimeError) as error:
            message = str(error)
            assert message.startswith(f"{info.name}: "), (name, what, message)
            assert re.search(rf"\b{name}\b", message), (name, what, message)
            assert re.search(r"; got |takes float32|cannot run", message), (name, what, message)
            assert not re.search(r"\b(\w+) or \1\b", message), (name, what, message)
        else:
            lenient.add((name, what))
    assert not lenient, f"accepted: {sorted(lenient)}"
    assert count >= 30


@EVERY_OP
def test_missing_argument_is_a_type_error(info):
    with pytest.raises(TypeError, match="missing .* required positional argument"):
        info.op()


OPTIONAL = {
    "expert_adaln": ("text_shift", "text_scale", "weight", "bias"),
    "gated_residual": ("text_gate",),
    "gated_residual_adaln": ("text_gate", "text_shift", "text_scale", "weight", "bias"),
    "qk_norm_rope3d": ("q_weight", "q_bias", "k_weight", "k_bias"),
    "expert_ffn": ("up_bias", "down_bias"),
    "spatial_norm_silu": ("weight", "bias"),
    "temporal_conv": ("bias",),
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_arguments_may_be_left_out(name):
    """Arguments of text, and of norms or layers without parameters, default to None."""
    info = OPS[name]
    arguments = materialize(info.samples[0], torch.float32)
    for tensor in info.tokens if "text_len" in arguments else ():
        arguments[tensor] = arguments[tensor][:, arguments["text_len"] :]
    arguments |= {"text_len": 0} if "text_len" in arguments else {}
    short = {n: x for n, x in arguments.items() if n not in OPTIONAL[name]}
    full = {**arguments, **dict.fromkeys(OPTIONAL[name])}
    for function in (partial(info.op, backend="reference"), info.reference):
        for a, b in zip(as_tuple(function(**short)), as_tuple(function(**full)), strict=True):
            assert torch.equal(a, b)
