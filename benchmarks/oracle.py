"""Comparison with the reference, on the very arguments that are timed.

The rule is `cogvx_kernels.testing.check_close`. A model-sized tensor in fp64 is too much to hold
and to compare, so a sequence is compared in three slices of tokens (where the text ends and video
begins, in the middle, at the end), sums over tokens whole, their fp64 added up slice by slice; and
every other token with the reference, more coarsely. A video, of all of which there are statistics,
is not cut: fp64 is of the whole, and compared are its rows and columns in even steps.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cogvx_kernels.testing import (
    REDRAWS,
    Comparison,
    OpInfo,
    check_close,
    evaluate,
    scaled,
    to_double,
)

from .registry import Arguments, Function

SLICE = 512  # tokens
THIN = 1 << 22  # elements of a video, about, that are compared with fp64
# For the elements in between: the kernel may be off by the baseline's error and an ulp, and the
# reference by the baseline's, each of them larger where values are larger than in what is compared.
# It is there to see rows that were skipped, moved or not written, which are off by far more.
COARSE = 4

GradOutputs = tuple[Tensor, ...] | None
Span = tuple[int, int]


class Oracle:
    """Results of the reference for a call: `baseline` in the call's dtype, and `fp64`."""

    def __init__(self, info: OpInfo, arguments: Arguments, grad_outputs: GradOutputs) -> None:
        self.info = info
        self.differentiable = info.differentiable if grad_outputs is not None else ()
        self.baseline = evaluate(info.reference, arguments, self.differentiable, grad_outputs)
        self.summed = {f"d{name}" for name in info.summed} & self.baseline.keys()
        self.redraws: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        self.seqlen = self.baseline["out0"].shape[1] if "text_len" in arguments else None
        if self.seqlen is None:
            self.fp64 = _thin_all(self._in_fp64(arguments, grad_outputs))
            self._redraw(arguments, grad_outputs)
            return
        self.spans = _spans(self.seqlen)
        pieces = [self._in_fp64(arguments, grad_outputs, span) for span in self.spans]
        whole = self.baseline.keys() - self.summed
        self.fp64 = {name: torch.cat([piece[name] for piece in pieces], 1) for name in whole}
        for name in self.summed:
            self.fp64[name] = torch.zeros_like(self.baseline[name], dtype=torch.float64)
        step = self.seqlen if len(self.spans) == 1 else 2 * SLICE
        for start in range(0, self.seqlen if self.summed else 0, step):
            span = start, min(start + step, self.seqlen)
            part = self._in_fp64(arguments, grad_outputs, span)
            for name in self.summed:
                self.fp64[name] += part[name]

    def __str__(self) -> str:
        """Name of the quantities compared."""
        if self.seqlen is None:
            steps = sorted({_step(x) for x in self.baseline.values()} - {1})
            what = f"one in {' or '.join(map(str, steps))} rows and columns"
            whole, sums = not steps, "; sums and what is small whole"
        else:
            what = f"tokens {', '.join(f'{start} to {stop - 1}' for start, stop in self.spans)}"
            whole, sums = len(self.spans) == 1, "; sums over all tokens whole" * bool(self.summed)
        if whole:
            return "every element"
        return f"{what} against fp64{sums}; the others against the reference, coarsely"

    def compare(self, results: Mapping[str, Tensor]) -> list[Comparison]:
        """A comparison for each result, named as `testing.evaluate` names them."""
        return [self._compare(name, x, self.baseline[name]) for name, x in results.items()]

    def _compare(self, name: str, result: Tensor, baseline: Tensor) -> Comparison:
        if result.shape != baseline.shape:
            wanted, got = tuple(baseline.shape), tuple(result.shape)
            raise AssertionError(f"{name}: wanted shape {wanted}, got {got}")
        summed = name in self.summed
        if self.seqlen is None:
            pair = [_thin(x) for x in (result, baseline)]
        elif summed:
            pair = [result, baseline]
        else:
            pair = [
                torch.cat([x[:, slice(*span)] for span in self.spans], 1)
                for x in (result, baseline)
            ]
        redraws = [(low[name], high[name]) for low, high in self.redraws]
        products, between = self.info.products or summed, self.info.rounds_between
        found = check_close(name, *pair, self.fp64[name], products, redraws, between)
        if not found.ok or pair[0].numel() == result.numel():
            return found
        ulp = torch.finfo(result.dtype).eps * float(baseline.abs().max())
        error = float((result.float() - baseline.float()).abs().max())
        if error <= COARSE * max(ulp, found.baseline):  # false for a NaN
            return found
        return replace(found, name=f"{name}, between what fp64 is of", error=error, ok=False)

    def _in_fp64(
        self, arguments: Arguments, grad_outputs: GradOutputs, span: Span | None = None
    ) -> dict[str, Tensor]:
        if span is not None:
            arguments = cut(self.info, arguments, *span)
        if grad_outputs is not None:
            grad_outputs = tuple(
                (x if span is None else x[:, slice(*span)]).double() for x in grad_outputs
            )
        return evaluate(
            self.info.reference, to_double(arguments), self.differentiable, grad_outputs
        )

    def _redraw(self, arguments: Arguments, grad_outputs: GradOutputs) -> None:
        """More baselines, where few sums decide and how they are rounded is luck."""
        lucky = self.info.rounds_between or self.baseline["out0"].dtype is torch.float32
        exact = all(
            torch.equal(_thin(x).double(), self.fp64[name]) for name, x in self.baseline.items()
        )
        if self.info.products or exact or not lucky:
            return
        for factor in REDRAWS:
            again, back = scaled(self.info, arguments, grad_outputs or (), factor)
            send = None if grad_outputs is None else back
            baseline = evaluate(self.info.reference, again, self.differentiable, send)
            self.redraws.append((_thin_all(baseline), _thin_all(self._in_fp64(again, send))))


def _spans(seqlen: int) -> list[Span]:
    if seqlen <= 3 * SLICE:
        return [(0, seqlen)]
    return [(start, start + SLICE) for start in (0, (seqlen - SLICE) // 2, seqlen - SLICE)]


def _step(x: Tensor) -> int:
    """From one compared row or column of a video to the next: odd, so as to meet all of a tile."""
    if x.dim() != 5 or x.numel() <= THIN:
        return 1
    return math.ceil(math.sqrt(x.numel() / THIN)) | 1


def _thin(x: Tensor) -> Tensor:
    step = _step(x)
    return x if step == 1 else x[..., ::step, ::step].clone()


def _thin_all(results: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _thin(x) for name, x in results.items()}


def cut(info: OpInfo, arguments: Arguments, start: int, stop: int) -> dict[str, Any]:
    """The same call on some of the tokens of the joint sequence, text first."""
    text_len = arguments["text_len"]
    video = slice(max(0, start - text_len), max(0, stop - text_len))

    def part(name: str, x: Any) -> Any:
        if name in ("cos", "sin"):
            return x[video]
        return x[:, start:stop] if name in info.tokens and x is not None else x

    parts = {name: part(name, x) for name, x in arguments.items()}
    return parts | {"text_len": max(0, min(stop, text_len) - start)}


def results_of(
    function: Function, arguments: Arguments, oracle: Oracle, grad_outputs: GradOutputs
) -> dict[str, Tensor]:
    """Results of a provider's function: without a gradient if grad_outputs is None."""
    _poison(oracle.info, arguments)
    if grad_outputs is None:
        with torch.no_grad():
            return evaluate(function, arguments)
    return evaluate(function, arguments, oracle.differentiable, grad_outputs)


def _poison(info: OpInfo, arguments: Arguments) -> None:
    """Leave NaN in the memory that the next outputs and gradients will probably get.

    A CUDA allocator hands a freed block out again, so that an output which nobody wrote could be
    the right one of a call before.
    """
    names = dict.fromkeys((*info.tokens, *info.videos, *info.differentiable))
    alike = [arguments.get(name) for name in names]
    big = [x for x in alike if x is not None and x.is_cuda and x.is_floating_point()]
    for x in [torch.full(x.shape, torch.nan, dtype=x.dtype, device=x.device) for x in 2 * big]:
        del x
