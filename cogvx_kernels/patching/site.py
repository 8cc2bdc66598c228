"""What a patch remembers: its options, and of every place where it works, how often it did.

Both hang on the modules themselves. A copy of a patched model is patched, with counts of its own; a
pickle is of the model alone, and loads where this package is not installed.
"""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..untouched import wrapped
from .angles import Memo


class Patch:
    """The options that one model was patched with, and its sites."""

    def __init__(self, model: str, ops: tuple[str, ...], mode: str, backend: str) -> None:
        self.model = model
        self.ops = ops
        self.mode = mode
        self.backend = backend
        self.sites: list[Site] = []
        self.refused: dict[str, str] = {}  # modules that were left as they are, and why
        self.angles = Memo()
        self.softmax: Callable[..., Tensor] | None = None  # diffusers' choice of one, if it has any

    @property
    def options(self) -> tuple[tuple[str, ...], str, str]:
        return self.ops, self.mode, self.backend

    @property
    def fast(self) -> bool:
        return self.mode == "fast"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Patch":
        other = memo[id(self)] = Patch(self.model, *self.options)
        other.sites = [deepcopy(site, memo) for site in self.sites]
        other.refused = dict(self.refused)
        other.softmax = self.softmax
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class Site:
    """One module whose forward was replaced.

    Attributes:
        patch: of the model that it is in.
        name: the module's, within that model.
        places: op -> how many calls of it one forward of the module makes.
        hits: op -> how many it has made. Calls in compiled code are not counted.
        misses: (op, reason) -> how many calls went the model's own way.
    """

    def __init__(self, patch: Patch, name: str, places: dict[str, int]) -> None:
        self.patch = patch
        self.name = name
        self.places = dict(places)
        self.hits: Counter[str] = Counter()
        self.misses: Counter[tuple[str, str]] = Counter()

    def does(self, op: str) -> bool:
        return op in self.places

    def hit(self, op: str, times: int = 1) -> None:
        if op in self.places and not torch.compiler.is_compiling():
            self.hits[op] += times

    def miss(self, op: str, reason: str) -> None:
        if op in self.places and not torch.compiler.is_compiling():
            self.misses[op, reason] += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> "Site":
        other = memo[id(self)] = Site(self.patch, self.name, self.places)
        other.patch = deepcopy(self.patch, memo)  # whose sites this one is of
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def site_of(module: nn.Module) -> Site | None:
    return module.__dict__.get("_cogvx")


def unusual(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why the weights of a module may not be read past its forward, or None if they may.

    Others put their own modules in the place of plain ones (adapters, few bits), or hang hooks on
    them that fetch the weights only for the call.
    """
    if type(module) is not kind:
        return f"a {kind.__name__} is a {type(module).__name__}"
    if wrapped(module):
        return f"a {kind.__name__} has hooks"
    return None
