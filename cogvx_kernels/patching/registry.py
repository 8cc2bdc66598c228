"""What is known of a model: which of its modules are replaced, by what, for which op."""

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
    """A class of modules, by name, and the function that takes the place of its forward.

    One function serves all modules of the kind. It has the parameters of the forward that it was
    written for, and is put in the place of no other.

    places  op -> how many calls of it one forward makes; the forward is replaced if one of these
            ops is wanted
    counts  whether a module of this name makes calls of its own, where these ops are wanted; if
            not, the module around it does
    """

    name: str
    forward: Forward
    places: Mapping[str, int]
    counts: Callable[[str, Any, Collection[str]], bool] = field(default=lambda *of: True)

    def __post_init__(self) -> None:
        # By this name a pickled bound method is found again: the class's own forward.
        self.forward.__name__ = "forward"

    def places_of(self, name: str, module: nn.Module, ops: Collection[str]) -> dict[str, int]:
        if not self.counts(name, module, ops):
            return {}
        return {op: count for op, count in self.places.items() if op in ops}

    def refuses(self, module: nn.Module) -> str | None:
        """Why a module of this name is not the one that is known, or None."""
        theirs, ours = map(_parameters, (forward_swap.own(module), self.forward))
        if theirs != ours:
            return f"its forward takes ({', '.join(theirs)}), and not ({', '.join(ours)})"
        return forward_swap.obstacle(module)


def _parameters(forward: Forward) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)


@dataclass(frozen=True)
class Family:
    """The models, by class name, that share an implementation in diffusers.

    group    what `only` may call all of its ops
    ops      op -> what it does, in a few words
    exact    those of them that change no bit in mode "exact", in fp32
    prepare  called with (model, patch) after the forwards have been replaced, and `undo` with the
             model before they are put back
    """

    group: str
    models: tuple[str, ...]
    ops: Mapping[str, str]
    modules: tuple[ModulePatch, ...]
    exact: tuple[str, ...] = ()
    prepare: Callable[[Any, Patch], None] = field(default=lambda model, patch: None)
    undo: Callable[[Any], None] = field(default=lambda model: None)

    def module_patch(self, module: nn.Module) -> ModulePatch | None:
        """That of a class of diffusers, or of one made from it that has the same forward."""
        for base in type(module).__mro__:
            for kind in self.modules:
                if base.__name__ == kind.name and base.__module__.startswith("diffusers."):
                    same = base.__dict__.get("forward") is forward_swap.own(module)
                    return kind if same else None
        return None
