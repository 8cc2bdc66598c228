"""Registration of torch ops, with schemas inferred from typed functions."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch


def custom_op(
    name: str, *, mutates_args: Sequence[str] = (), constants: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Decorator that registers a function as `torch.ops.cogvx.<name>`, by its annotations.

    An integer is a SymInt in the schema, so that one compiled graph serves all its values; an
    argument in `constants` is an int, and torch.compile makes a graph for each value.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        for argument in constants:
            schema, found = re.subn(rf"\bSymInt {argument}\b", f"int {argument}", schema)
            assert found == 1, f"{name} has no integer {argument}"
        return torch.library.custom_op(
            f"cogvx::{name}", function, mutates_args=mutates_args, schema=schema
        )

    return register
