"""What a patch remembers: its options, and of every place where it works, how often it did.

Both hang on the modules themselves. A copy of a patched model is patched, with counts of its own; a
pickle is of the model alone, and loads where this package is not installed.
"""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import _backend
from ..module_utils import has_hooks
from .rotary import Memo

T = TypeVar("T")

# Why the reference: of ops that `patch` does in plain torch.
NO_KERNEL = "it is plain torch, and has no kernel"


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
        hits: (op, reason) -> how many it has made: by the reference, for that reason, or by the
            kernel, where the reason is None. Calls in compiled code are not counted.
        misses: (op, reason) -> how many calls went the model's own way.
        compiled: a compiler has traced the module's forward.
    """

    def __init__(self, patch: Patch, name: str, places: dict[str, int]) -> None:
        self.patch = patch
        self.name = name
        self.places = dict(places)
        self.hits: Counter[tuple[str, str | None]] = Counter()
        self.misses: Counter[tuple[str, str]] = Counter()
        self.compiled = False

    def does(self, op: str) -> bool:
        return op in self.places

    def hit(self, op: str, reason: str | None, times: int = 1) -> None:
        """Count calls of an op: of the reference, for a reason, or of the kernel, for None."""
        if torch.compiler.is_compiling():
            self.compiled = True
        elif op in self.places:
            self.hits[op, reason] += times

    def miss(self, op: str, reason: str) -> None:
        """Count a call that is left to the model, and why."""
        if torch.compiler.is_compiling():
            self.compiled = True
        elif op in self.places:
            self.misses[op, reason] += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> "Site":
        other = memo[id(self)] = Site(self.patch, self.name, self.places)
        other.patch = deepcopy(self.patch, memo)  # whose sites this one is of
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class Calls:
    """Calls of ops in one forward, with the backend that the patch was given.

    Attributes:
        reason: why one of them took the reference; None if all took the kernel.
    """

    def __init__(self, patch: Patch) -> None:
        self.backend = patch.backend
        self.reason: str | None = None

    def __call__(self, op: Callable[..., T], *args: Any, **options: Any) -> T:
        out = op(*args, backend=self.backend, **options)
        if not torch.compiler.is_compiling():
            self.reason = self.reason or _backend.last_reason()
        return out


def unusual(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why the weights of a module may not be read past its forward, or None if they may.

    Others put their own modules in the place of plain ones (adapters, few bits), or hang hooks on
    them that fetch the weights only for the call.
    """
    if type(module) is not kind:
        return f"a {kind.__name__} is a {type(module).__name__}"
    if has_hooks(module):
        return f"a {kind.__name__} has hooks"
    return None
