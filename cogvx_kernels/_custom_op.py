"""Registration of torch ops, with schemas inferred from typed functions."""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Types of the arguments of an eager call: of tensors no subclass, which torch's dispatcher handles.
PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str))


_requires_grad = torch._C._any_requires_grad
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_modes = torch._C._len_torch_dispatch_stack
_is_profiled = torch._C._autograd._profiler_enabled
_jit_trace = torch._C._get_tracing_state


class CustomOp:
    """A torch op, `torch.ops.cogvx.<name>`, whose eager calls run its function directly.

    The dispatcher and torch's machinery for Python ops take longer than a launch. What they are for
    (torch.compile, export, fake tensors, dispatch modes, torch.profiler) has them still; else the
    function runs at once, or inside an autograd.Function if a gradient is required.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], schema: str, mutates_args: Sequence[str]
    ) -> None:
        self._definition = torch.library.custom_op(
            f"cogvx::{name}", function, mutates_args=mutates_args, schema=schema
        )
        self._op = self._definition._opoverload
        self._function = function
        self._differentiable: Any = None
        arguments = self._op._schema.arguments
        self._written = [i for i, x in enumerate(arguments) if x.name in mutates_args]
        kinds = [str(x.type) for x in arguments]
        self._lists = [i for i, kind in enumerate(kinds) if kind == "List[Tensor]"]
        assert all("Tensor" in kind for kind in kinds[:2])

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        return self._definition.register_fake(fake)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None]
    ) -> None:
        self._definition.register_autograd(backward, setup_context=setup_context)
        self._differentiable = _autograd_function(
            self._op._opname, self._function, backward, setup_context, self._lists
        )

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._op(*args)
        flat = _flat(args, self._lists) if self._lists else args
        if self._needs_dispatcher(flat):
            return self._op(*args)
        if torch.is_grad_enabled() and _requires_grad(*flat):
            if self._differentiable is None:
                return self._op(*args)  # whose backward raises
            return self._differentiable(args, flat)
        for i in self._written:
            torch.autograd.graph.increment_version(args[i])
        return self._function(*args)

    def _needs_dispatcher(self, flat: Sequence[Any]) -> bool:
        """True for tensors without memory, subclasses, and where a mode of torch sees all ops.

        Gradients, which torch may batch, are among the first two arguments of every op.
        """
        for x in flat[:2]:
            if x is not None and (x.is_meta or _is_batched(x)):
                return True
        return (
            not PLAIN.issuperset(map(type, flat))
            or _modes() > 0
            or _is_profiled()
            or _jit_trace() is not None
        )


def _flat(args: Sequence[Any], lists: Sequence[int]) -> Sequence[Any]:
    """The arguments, with the elements of those at `lists` instead of these lists."""
    if not lists:
        return args
    return [x for i, arg in enumerate(args) for x in (arg if i in lists else (arg,))]


def _autograd_function(
    name: str, function: Callable[..., Any], backward: Callable[..., Any],
    setup: Callable[..., None], lists: Sequence[int],
) -> Callable[..., Any]:  # fmt: skip
    """A function with a gradient, as torch.library makes it for the op; lists may hold tensors."""

    def nested(flat: Sequence[Any], lengths: Sequence[int | None]) -> Sequence[Any]:
        if not lists:
            return flat
        rest = iter(flat)
        return [next(rest) if n is None else [*itertools.islice(rest, n)] for n in lengths]

    def forward(ctx: Any, lengths: Sequence[int | None], *flat: Any) -> Any:
        args = nested(flat, lengths)
        output = function(*args)
        setup(ctx, args, output)
        ctx.lengths_of_lists = lengths
        return output

    def backward_of_flat(ctx: Any, *grads: Any) -> Any:
        needs = ctx.needs_input_grad
        ctx.needs_input_grad = nested(needs[1:], ctx.lengths_of_lists)
        try:
            found = backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = needs
        return None, *_flat(found if isinstance(found, tuple) else (found,), lists)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_flat)}
    made: Any = type(f"cogvx_{name}", (torch.autograd.Function,), methods)
    apply = made.apply

    def call(args: Sequence[Any], flat: Sequence[Any]) -> Any:
        lengths = [len(x) if i in lists else None for i, x in enumerate(args)] if lists else ()
        return apply(lengths, *flat)

    return call


def custom_op(
    name: str, *, mutates_args: Sequence[str] = (), constants: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], CustomOp]:
    """Decorator that registers a function as `torch.ops.cogvx.<name>`, by its annotations.

    An integer is a SymInt in the schema, so that one compiled graph serves all its values; an
    argument in `constants` is an int, and torch.compile makes a graph for each value.
    """

    def register(function: Callable[..., Any]) -> CustomOp:
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        for argument in constants:
            schema, found = re.subn(rf"\bSymInt {argument}\b", f"int {argument}", schema)
            assert found == 1, f"{name} has no integer {argument}"
        return CustomOp(name, function, schema, mutates_args)

    return register
