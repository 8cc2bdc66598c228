"""Declarations of supported models: module classes, their replacement forwards, their ops."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from . import forward_swap
from .forward_swap import Forward
from .state import Patch


@dataclass(frozen=True)
class ModulePatch:
    """A module class of diffusers, by name, and the function that replaces its forward.

    The function has the parameters of the forward that it was written for, and replaces no other.

    ops     op -> calls of it in one forward; the forward is replaced if one of these is selected
    counts  (name, module, selected ops) -> False if the module around it makes the calls instead
    """

    name: str
    forward: Forward
    ops: Mapping[str, int]
    counts: Callable[[str, Any, Collection[str]], bool] = field(default=lambda *of: True)

    def __post_init__(self) -> None:
        # Pickle finds a bound method by this name: it loads as the class's own forward.
        self.forward.__name__ = "forward"

    def ops_of(self, name: str, module: nn.Module, ops: Collection[str]) -> dict[str, int]:
        if not self.counts(name, module, ops):
            return {}
        return {op: count for op, count in self.ops.items() if op in ops}

    def refuses(self, module: nn.Module) -> str | None:
        """Reason why a module of this class cannot be patched, or None."""
        theirs, ours = map(_parameters, (forward_swap.own(module), self.forward))
        if theirs != ours:
            return f"its forward takes ({', '.join(theirs)}), and not ({', '.join(ours)})"
        return forward_swap.obstacle(module)


def _parameters(forward: Forward) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)


@dataclass(frozen=True)
class Family:
    """Models, by class name, that share an implementation in diffusers.

    group    name of all its ops for `only`
    ops      op -> short description
    exact    ops that change no bit in mode "exact", in fp32
    prepare  called with (model, patch) after the forwards have been replaced, and `undo` with the
             model before they are restored
    shares   (model, patch) -> reason why ranks cannot share a sequence of this model, or None; no
             function where they never can
    """

    group: str
    models: tuple[str, ...]
    ops: Mapping[str, str]
    modules: tuple[ModulePatch, ...]
    exact: tuple[str, ...] = ()
    prepare: Callable[[Any, Patch], None] = field(default=lambda model, patch: None)
    undo: Callable[[Any], None] = field(default=lambda model: None)
    shares: Callable[[Any, Patch], str | None] | None = None

    def module_patch(self, module: nn.Module) -> ModulePatch | None:
        """The patch of a diffusers class, or of a subclass that has the same forward."""
        for base in type(module).__mro__:
            for kind in self.modules:
                if base.__name__ == kind.name and base.__module__.startswith("diffusers."):
                    same = base.__dict__.get("forward") is forward_swap.own(module)
                    return kind if same else None
        return None
