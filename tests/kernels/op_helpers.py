"""Helpers to call every op, for `test_contract` and other tests over all ops."""

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvx_kernels import _backend, testing
from cogvx_kernels._opinfo import OpInfo, Sample, TensorSpec
from cogvx_kernels.testing import OPS, grad_outputs_like

if not _backend.HAS_TRITON:
    pytest.skip("the contract is about Triton kernels: Triton is missing", allow_module_level=True)

interpreted = pytest.mark.skipif(not _backend.INTERPRETED, reason="needs the interpreter")

HAS_EXTENSION = importlib.util.find_spec("cogvx_kernels._C") is not None
RUNNABLE = [info for info in OPS.values() if info.launch is not None or HAS_EXTENSION]
EVERY_OP = pytest.mark.parametrize("info", RUNNABLE, ids=str)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def call(info: OpInfo, arguments: Mapping[str, Any], **options: Any) -> tuple[Tensor, ...]:
    return testing.as_tuple(info.op(**arguments, backend="kernel", **options))


def grad_outputs_of(
    info: OpInfo, arguments: Mapping[str, Any], seed: int = 0
) -> tuple[Tensor, ...]:
    return grad_outputs_like(testing.as_tuple(info.reference(**arguments)), seed)


def tensors(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: x for name, x in arguments.items() if isinstance(x, Tensor)}


def present(info: OpInfo, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the differentiable arguments that are not None."""
    return tuple(name for name in info.differentiable if arguments.get(name) is not None)


def assert_same_bits(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], what: str) -> None:
    assert ours.keys() == theirs.keys(), what
    for name in ours:
        a, b = ours[name].detach(), theirs[name].detach()
        assert a.dtype == b.dtype and a.shape == b.shape, f"{what}: {name}"
        # Copies, because a tensor of one number may call itself contiguous with any strides.
        plain = [x.clone(memory_format=torch.contiguous_format).flatten() for x in (a, b)]
        bits = [x.view(torch.uint8) for x in plain if x.numel()]
        assert not bits or torch.equal(*bits), f"{what}: {name} differs"


def resized(info: OpInfo, sample: Sample, text_len: int, video_len: int) -> Sample:
    """The sample at other lengths: seqlen is dim 1 of tokens, video_len dim 0 of tables.

    For an op on videos: a sample of `video_len` frames.
    """
    if info.resized is not None:
        return info.resized(2, video_len)
    arguments = dict(sample.arguments)
    for name, spec in sample.specs().items():
        if spec.values in ("cos", "sin"):
            shape = (video_len, *spec.shape[1:])
        elif name in info.tokens:
            shape = (spec.shape[0], text_len + video_len, *spec.shape[2:])
        else:
            shape = spec.shape
        arguments[name] = dataclasses.replace(spec, shape=shape)
    return dataclasses.replace(sample, arguments={**arguments, "text_len": text_len})


def narrowed(info: OpInfo, name: str, spec: TensorSpec, width: int) -> TensorSpec:
    """The same tensor with `width` dims for every 64: the dims of tokens, both dims of weights."""
    lengths = spec.shape[:2] if name in info.tokens else ()
    widths = (n if n % 32 else n * width // 64 for n in spec.shape[len(lengths) :])
    return dataclasses.replace(spec, shape=(*lengths, *widths))
