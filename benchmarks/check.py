"""Correctness first, on the very arguments that are timed.

The rule is `cogvx_kernels.testing.check_close`. Truth in fp64 of a whole model-sized tensor is too
much to hold and to compare, so results are judged on three slices of tokens, where the text ends
and video begins, in the middle, and at the end; sums over tokens are judged whole, their truth
being added up slice by slice; and every other token is compared with the reference, more coarsely.
A video, of all of which there are statistics, is not cut: the truth is of the whole, and judged are
its rows and columns in even steps."""

import math
from collections.abc import Callable, Iterator, Mapping
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

SLICE = 512  # tokens
THIN = 1 << 22  # elements of a video, about, that are judged
# For what is between what is judged: the kernel may be off by the yardstick and an ulp, and the
# reference by the yardstick, each of them larger where values are larger than in what is judged. It
# is there to see rows that were skipped, moved or not written, which are off by far more.
COARSE = 4


class Law:
    """What the reference says of a call, and the truth in fp64: made once, asked by everyone."""

    def __init__(
        self, info: OpInfo, arguments: Mapping[str, Any], douts: tuple[Tensor, ...] | None
    ) -> None:
        self.info = info
        self.differentiable = info.differentiable if douts is not None else ()
        self.summed = {f"d{name}" for name in info.summed}
        self.yardstick = evaluate(info.reference, arguments, self.differentiable, douts)
        self.seqlen = self.yardstick["out0"].shape[1] if "text_len" in arguments else None
        self.spans = list(_spans(self.seqlen))
        self.redraws: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        if self.seqlen is None:
            self.truth = _thin_all(self._truth(arguments, douts, None))
            self._redraw(arguments, douts)
            return
        pieces = [self._truth(arguments, douts, span) for span in self.spans]
        self.truth = {
            name: torch.cat([piece[name] for piece in pieces], 1)
            for name in self.yardstick
            if name not in self.summed
        }
        for name in self.summed & self.yardstick.keys():
            self.truth[name] = torch.zeros_like(self.yardstick[name], dtype=torch.float64)
        if self.summed & self.yardstick.keys():
            for span in _every(self.seqlen):
                for name, x in self._truth(arguments, douts, span).items():
                    if name in self.summed:
                        self.truth[name] += x

    def __str__(self) -> str:
        """What was compared, in words."""
        if self.seqlen is None:
            steps = {_step(x) for x in self.yardstick.values()} - {1}
            if not steps:
                return "every element"
            words = " or ".join(str(step) for step in sorted(steps))
            return (
                f"one in {words} rows and columns against fp64; sums and what is small whole; "
                "the others against the reference, coarsely"
            )
        if self.spans == list(_every(self.seqlen)):
            return "every token"
        slices = ", ".join(f"{start} to {stop - 1}" for start, stop in self.spans)
        sums = "; sums over all tokens whole" if self.summed & self.truth.keys() else ""
        return (
            f"tokens {slices} of {self.seqlen} against fp64{sums}; "
            "the others against the reference, coarsely"
        )

    def _truth(
        self,
        arguments: Mapping[str, Any],
        douts: tuple[Tensor, ...] | None,
        span: tuple[int, int] | None,
    ) -> dict[str, Tensor]:
        if span is not None:
            arguments = _cut(self.info, arguments, *span)
            douts = None if douts is None else tuple(x[:, slice(*span)] for x in douts)
        wide_douts = None if douts is None else tuple(x.double() for x in douts)
        wide = to_double(arguments)
        return evaluate(self.info.reference, wide, self.differentiable, wide_douts)

    def _redraw(self, arguments: Mapping[str, Any], douts: tuple[Tensor, ...] | None) -> None:
        """More of the yardstick, where few sums decide and how they are rounded is luck."""
        lucky = self.info.rounds_between or self.yardstick["out0"].dtype is torch.float32
        exact = all(
            torch.equal(_thin(x).double(), self.truth[name]) for name, x in self.yardstick.items()
        )
        if self.info.products or exact or not lucky:
            return
        for factor in REDRAWS:
            again, back = scaled(self.info, arguments, douts or (), factor)
            back = None if douts is None else back
            yardstick = evaluate(self.info.reference, again, self.differentiable, back)
            truth = self._truth(again, back, None)
            self.redraws.append((_thin_all(yardstick), _thin_all(truth)))

    def verdicts(self, results: Mapping[str, Tensor]) -> list[Comparison]:
        """A verdict on each of the results, which are named as `testing.evaluate` names them."""
        judged = self._of_videos if self.seqlen is None else self._of_tokens
        return [judged(name, result, self.yardstick[name]) for name, result in results.items()]

    def _of_videos(self, name: str, result: Tensor, yardstick: Tensor) -> Comparison:
        _same_shape(name, result, yardstick)
        products = self.info.products or name in self.summed
        thin = (_thin(result), _thin(yardstick), self.truth[name])
        redraws = [(y[name], t[name]) for y, t in self.redraws]
        verdict = check_close(name, *thin, products, redraws, self.info.rounds_between)
        if verdict.ok and _step(yardstick) > 1:
            return _with_the_rest(verdict, result, yardstick)
        return verdict

    def _of_tokens(self, name: str, result: Tensor, yardstick: Tensor) -> Comparison:
        between = self.info.rounds_between
        if name in self.summed:
            return check_close(
                name, result, yardstick, self.truth[name], True, rounds_between=between
            )
        _same_shape(name, result, yardstick)
        sliced = (
            torch.cat([x[:, slice(*span)] for span in self.spans], 1) for x in (result, yardstick)
        )
        verdict = check_close(
            name, *sliced, self.truth[name], self.info.products, rounds_between=between
        )
        if verdict.ok and self.spans != list(_every(self.seqlen)):
            return _with_the_rest(verdict, result, yardstick)
        return verdict


def _same_shape(name: str, result: Tensor, yardstick: Tensor) -> None:
    if result.shape != yardstick.shape:
        wanted, came = tuple(yardstick.shape), tuple(result.shape)
        raise AssertionError(f"{name}: wanted shape {wanted}, got {came}")


def _step(x: Tensor) -> int:
    """From one judged row or column of a video to the next: odd, so as to meet all of a tile."""
    if x.dim() != 5 or x.numel() <= THIN:
        return 1
    return math.ceil(math.sqrt(x.numel() / THIN)) | 1


def _thin_all(results: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _thin(x) for name, x in results.items()}


def _thin(x: Tensor) -> Tensor:
    step = _step(x)
    return x if step == 1 else x[..., ::step, ::step].clone()


def _spans(seqlen: int | None) -> Iterator[tuple[int, int] | None]:
    if seqlen is None or seqlen <= 3 * SLICE:
        yield from _every(seqlen)
        return
    for start in (0, (seqlen - SLICE) // 2, seqlen - SLICE):
        yield start, start + SLICE


def _every(seqlen: int | None) -> Iterator[tuple[int, int] | None]:
    if seqlen is None:  # not over a joint sequence: whole
        yield None
        return
    step = seqlen if seqlen <= 3 * SLICE else 2 * SLICE
    for start in range(0, seqlen, step):
        yield start, min(start + step, seqlen)


def _cut(info: OpInfo, arguments: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The same call on some of the tokens of the joint sequence, text first."""
    text_len = arguments["text_len"]
    video = slice(max(0, start - text_len), max(0, stop - text_len))

    def part(name: str, x: Any) -> Any:
        if name in ("cos", "sin"):
            return x[video]
        return x[:, start:stop] if name in info.tokens and x is not None else x

    cut = {name: part(name, x) for name, x in arguments.items()}
    return cut | {"text_len": max(0, min(stop, text_len) - start)}


def _with_the_rest(verdict: Comparison, result: Tensor, yardstick: Tensor) -> Comparison:
    """The verdict, or a refusal if a token that was not judged is far from the reference."""
    ulp = torch.finfo(result.dtype).eps * float(yardstick.abs().max())
    gap = float((result.float() - yardstick.float()).abs().max())
    if gap <= COARSE * max(ulp, verdict.baseline):  # false for a NaN
        return verdict
    return replace(verdict, name=f"{verdict.name}, between what was judged", error=gap, ok=False)


def poison(info: OpInfo, arguments: Mapping[str, Any]) -> None:
    """Leave NaN in the memory that the next outputs and gradients will probably get.

    A CUDA allocator hands a freed block out again, so that an output which nobody wrote could be
    the right one of a call before.
    """
    names = dict.fromkeys((*info.tokens, *info.videos, *info.differentiable))
    alike = [arguments.get(name) for name in names]
    big = [x for x in alike if x is not None and x.is_cuda and x.is_floating_point()]
    for x in [torch.full(x.shape, torch.nan, dtype=x.dtype, device=x.device) for x in 2 * big]:
        del x


def results_of(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    law: Law,
    douts: tuple[Tensor, ...] | None,
) -> dict[str, Tensor]:
    """What a provider's function makes of the arguments: without a gradient if douts is None."""
    poison(law.info, arguments)
    if douts is None:
        with torch.no_grad():
            return evaluate(function, arguments)
    return evaluate(function, arguments, law.differentiable, douts)
