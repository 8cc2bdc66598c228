"""Correctness first, on the very arguments that are timed.

The rule is `cogvx_kernels.testing.judge`. Truth in fp64 of a whole model-sized tensor is too much
to hold and to compare, so results are judged on three slices of tokens, where the text ends and
video begins, in the middle, and at the end; sums over tokens are judged whole, their truth being
added up slice by slice; and every other token is compared with the reference, more coarsely.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cogvx_kernels.testing import OpInfo, Verdict, evaluate, judge, to_double

SLICE = 512  # tokens
# For the tokens between the slices: the kernel may be off by the yardstick and an ulp, and the
# reference by the yardstick, each of them larger where values are larger than in the slices. It
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
        pieces = [self._truth(arguments, douts, span) for span in self.spans]
        self.truth = {
            name: torch.cat([piece[name] for piece in pieces], 1)
            if self.seqlen
            else pieces[0][name]
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

    def verdicts(self, results: Mapping[str, Tensor]) -> list[Verdict]:
        """A verdict on each of the results, which are named as `testing.evaluate` names them."""
        verdicts, between = [], self.info.rounds_between
        for name, result in results.items():
            yardstick, summed = self.yardstick[name], name in self.summed
            if self.seqlen is None or summed:
                verdicts.append(
                    judge(name, result, yardstick, self.truth[name], summed, between=between)
                )
                continue
            if result.shape != yardstick.shape:
                wanted, came = tuple(yardstick.shape), tuple(result.shape)
                raise AssertionError(f"{name}: wanted shape {wanted}, got {came}")
            sliced = (
                torch.cat([x[:, slice(*span)] for span in self.spans], 1)
                for x in (result, yardstick)
            )
            products = self.info.products
            verdict = judge(name, *sliced, self.truth[name], products, between=between)
            if verdict.ok and self.spans != list(_every(self.seqlen)):
                verdict = _with_the_rest(verdict, result, yardstick)
            verdicts.append(verdict)
        return verdicts


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


def _with_the_rest(verdict: Verdict, result: Tensor, yardstick: Tensor) -> Verdict:
    """The verdict, or a refusal if a token that was not judged is far from the reference."""
    ulp = torch.finfo(result.dtype).eps * float(yardstick.abs().max())
    gap = float((result.float() - yardstick.float()).abs().max())
    if gap <= COARSE * max(ulp, verdict.yardstick):  # false for a NaN
        return verdict
    return replace(verdict, name=f"{verdict.name}, between the slices", error=gap, ok=False)


def poison(info: OpInfo, arguments: Mapping[str, Any]) -> None:
    """Leave NaN in the memory that the next outputs and gradients will probably get.

    A CUDA allocator hands a freed block out again, so that an output which nobody wrote could be
    the right one of a call before.
    """
    alike = [arguments.get(n) for n in dict.fromkeys((*info.tokens, *info.differentiable))]
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
