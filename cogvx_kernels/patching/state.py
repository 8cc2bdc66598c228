"""State of a patch: its options, and counters for every module it changed.

Both are attributes of the modules. A copy of a patched model is patched, with counters of its own;
a pickle is of the model alone, and loads where this package is not installed.
"""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from ..context_parallel import Context
from .rotary import TableCache

Options = tuple[tuple[str, ...], str, str, Context | None]  # ops, mode, backend, context


class Patch:
    """Options of one patched model, and its sites."""

    def __init__(
        self,
        model: str,
        ops: tuple[str, ...],
        mode: str,
        backend: str,
        context: Context | None,
    ) -> None:
        self.model = model
        self.ops = ops
        self.mode = mode
        self.backend = backend
        self.context = context  # of ranks that share each sequence
        self.sites: list[Site] = []
        self.refused: dict[str, str] = {}  # modules left unchanged -> reason
        self.rotary = TableCache()
        self.softmax: Callable[..., Tensor] | None = None  # diffusers' attention dispatch, if any

    @property
    def options(self) -> Options:
        return self.ops, self.mode, self.backend, self.context

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
        ops: op -> calls of it in one forward of the module.
        hits: (op, reason) -> calls so far: of the reference, for that reason, or of the kernel,
            where the reason is None. Calls in compiled code are not counted.
        misses: (op, reason) -> calls left to the model's own forward.
        compiled: a compiler has traced the module's forward.
    """

    def __init__(self, patch: Patch, name: str, ops: dict[str, int]) -> None:
        self.patch = patch
        self.name = name
        self.ops = dict(ops)
        self.hits: Counter[tuple[str, str | None]] = Counter()
        self.misses: Counter[tuple[str, str]] = Counter()
        self.compiled = False

    def does(self, op: str) -> bool:
        return op in self.ops

    def hit(self, op: str, reason: str | None, times: int = 1) -> None:
        """Count calls of an op: of the reference, for a reason, or of the kernel, for None."""
        if torch.compiler.is_compiling():
            self.compiled = True
        elif op in self.ops:
            self.hits[op, reason] += times

    def miss(self, op: str, reason: str) -> None:
        """Count a call that is left to the model's own forward."""
        if torch.compiler.is_compiling():
            self.compiled = True
        elif op in self.ops:
            self.misses[op, reason] += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> "Site":
        other = memo[id(self)] = Site(self.patch, self.name, self.ops)
        other.patch = deepcopy(self.patch, memo)  # whose sites this one is of
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
