"""cos and sin: one column for each dim as diffusers makes them, one for each pair as the ops do."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CosSin = tuple[Tensor, Tensor]  # cos and sin


class TableCache:
    """The last result of a function of two tensors, returned again while they are the same objects
    and unchanged: all blocks and steps of a pipeline's run are given the same tables."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def __call__(self, make: Callable[[Tensor, Tensor], Any], cos: Tensor, sin: Tensor) -> Any:
        # A tensor of inference mode does not count its changes.
        if torch.compiler.is_compiling() or cos.is_inference() or sin.is_inference():
            return make(cos, sin)
        kept = self._kept  # read once: another thread may replace it
        if kept is None or not kept.is_of(make, cos, sin):
            kept = self._kept = _Kept(make, cos, sin)
        return kept.result


class _Kept:
    def __init__(self, make: Callable[[Tensor, Tensor], Any], cos: Tensor, sin: Tensor) -> None:
        self.make = make
        self.tables = [(weakref.ref(x), x._version) for x in (cos, sin)]
        with torch.inference_mode(False):  # or a later training step could not use it
            self.result = make(cos, sin)

    def is_of(self, make: Callable[[Tensor, Tensor], Any], *tables: Tensor) -> bool:
        # Two weak references are compared by what they refer to, and tensors element by element.
        return make is self.make and all(
            ref() is x and version == x._version
            for (ref, version), x in zip(self.tables, tables, strict=True)
        )


def pair_tables(cos: Tensor, sin: Tensor) -> CosSin | str:
    """(rows, headdim // 2) each, of two (rows, headdim) in which a pair's columns are equal; or why
    they are not. Compiled code is not asked."""
    halves = cos[:, ::2].contiguous(), sin[:, ::2].contiguous()
    if cos.is_meta or torch.compiler.is_compiling():
        return halves
    others = cos[:, 1::2], sin[:, 1::2]
    if all(torch.equal(*both) for both in zip(halves, others, strict=True)):
        return halves
    return "image_rotary_emb turns the two dims of a pair by different angles"
