"""One op at one size: whoever can run is checked, and only then is anyone timed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from cogvx_kernels.testing import SIZES, Comparison, OpInfo, evaluate

from . import inputs
from .check import Law, results_of
from .providers import (
    OTHERS_MAY_ERR,
    OTHERS_SUMS_MAY_LOSE,
    Function,
    Provider,
    Unavailable,
    providers_of,
)
from .race import PASSES, Contest, Racer, race
from .report import Row

SEED = 0


@dataclass(frozen=True)
class Options:
    dtype: torch.dtype
    device: torch.device
    passes: tuple[str, ...] = PASSES
    names: tuple[str, ...] = ()  # of providers; none for all that need not be asked for
    also: tuple[str, ...] = ()  # of those that are only there if asked for
    conventions: tuple[str, ...] = ()  # none for all that the op has
    budget: float = 0.5  # seconds for each provider and pass, and each way


class Wrong(Exception):
    """A provider of ours is outside the rule, so nothing is timed; the message is its verdicts."""


@dataclass
class Outcome:
    """What one op at one size came to."""

    rows: list[Row] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # wrong ones that are not ours

    def leave_out(self, provider: Provider, convention: str, reason: str) -> None:
        """Of one call, named if it is not the model's; the same reason again says nothing new."""
        name = provider.name
        if all(reason != said for who, said in self.left_out.items() if who.split()[0] == name):
            name += "" if convention == inputs.MODEL else f" ({convention})"
            self.left_out[name] = reason


def run(info: OpInfo, size: str, options: Options) -> Outcome:
    """Check, then time. Raises Wrong, before any timing, if a provider of ours is."""
    outcome = Outcome()
    for convention, sample in inputs.conventions(info, SIZES[size]).items():
        if options.conventions and convention not in options.conventions:
            continue
        new = partial(inputs.make, sample, options.dtype, options.device)
        made = _make(info, convention, new(SEED), options, outcome)
        if convention == inputs.HALF_SPLIT and not any(convention in p.conventions for p in made):
            continue  # there for its peers alone, and they are not here
        checked = _check(info, convention, new, made, options, outcome)
        for which in options.passes:
            contest = Contest(info, size, convention, which, new, options.dtype, options.device)
            outcome.rows += race(contest, checked, options.budget)
    return outcome


def _make(
    info: OpInfo,
    convention: str,
    arguments: Mapping[str, Any],
    options: Options,
    outcome: Outcome,
) -> dict[Provider, Function]:
    made = {}
    for provider in providers_of(info):
        asked = provider.name in ("eager", *options.names, *options.also)
        if provider.conventions and convention not in provider.conventions:
            continue
        if not set(provider.passes) & {*options.passes}:
            continue
        if not asked and (options.names or provider.asked):
            continue
        try:
            made[provider] = provider.make(info, arguments)
        except Unavailable as reason:
            outcome.leave_out(provider, convention, str(reason))
    return made


def _check(
    info: OpInfo,
    convention: str,
    new: partial[dict[str, Any]],
    made: Mapping[Provider, Function],
    options: Options,
    outcome: Outcome,
) -> list[Racer]:
    """Everyone's results, before anyone's speed."""
    arguments = new(SEED)
    outputs = tuple(evaluate(info.reference, arguments).values())
    douts = inputs.cotangents(outputs, SEED) if "backward" in options.passes else None
    del outputs
    law = Law(info, arguments, douts)
    outcome.compared.append(f"{convention}: {law}")
    checked, wrong = [], []
    for provider, function in made.items():
        passes = tuple(which for which in options.passes if which in provider.passes)
        verdicts: dict[str, list[Comparison]] = {}
        try:
            for which in passes:
                fresh = new(SEED) if provider.overwrites else arguments
                send = douts if which == "backward" else None
                verdicts[which] = law.verdicts(results_of(function, fresh, law, send))
        except torch.OutOfMemoryError:
            outcome.leave_out(provider, convention, f"out of memory in {which}")
            continue
        except Exception as error:
            if provider.ours or provider.name == "eager":
                raise
            said = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
            outcome.leave_out(provider, convention, f"it failed: {said}")
            continue
        allowed = (lambda v: v.ok) if provider.ours else (lambda v: v.ok or _near(v, law))
        bad = [v for some in verdicts.values() for v in some if not allowed(v)]
        if bad and provider.ours:
            wrong += [f"{provider.name}, {convention}: {verdict}" for verdict in bad]
        elif bad:
            outcome.refused[provider.name] = f"{convention}: {bad[0]}"
        else:
            multiples = {k: max(v.multiple for v in some) for k, some in verdicts.items()}
            checked.append(Racer(provider, function, multiples))
    if wrong:
        raise Wrong("\n".join(wrong))
    return checked


def _near(verdict: Comparison, law: Law) -> bool:
    """Whether somebody else's result is the same function, if not as exactly computed.

    In fp32 a norm of a video is no better than its sums of squares, which some add up as they are.
    """
    dtype = law.yardstick[verdict.name].dtype
    if verdict.name in law.summed or (law.info.videos and dtype is torch.float32):
        largest = verdict.ulp / torch.finfo(dtype).eps
        if verdict.error <= OTHERS_SUMS_MAY_LOSE[dtype] * largest:
            return True
    return verdict.multiple <= OTHERS_MAY_ERR
