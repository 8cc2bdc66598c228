"""`python -m benchmarks.host`: host microseconds of an op call whose kernels do nothing.

Triton binds the arguments and looks the kernel up as for a GPU, which need not be here, and the
launch returns at once. So this is what Python and torch's dispatcher take before a GPU has work,
without the driver's own time. Each number is the least of many batches, taken by turns. A backward
also has the torch operations around its launches, which a CPU computes.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from cogvx_kernels import _backend
from cogvx_kernels._custom_op import CustomOp
from cogvx_kernels.testing import OPS, SIZES, OpInfo, as_tuple

from . import inputs
from .registry import MODEL, compile_
from .timing import Call

COLUMNS = {
    "launch": "the op's Triton launches alone, with the arguments that the op makes",
    "launcher": "the function that allocates and launches",
    "op": "the public function, without gradients",
    "checks": "op less launcher: argument checks and dispatch",
    "over": "op less launch",
    "dispatched": "launcher through torch's dispatcher, as a custom op",
    "compiled": "op under torch.compile",
    "function": "forward and backward of an autograd.Function of the launchers, without checks",
    "training": "forward and backward of op",
    "compiled training": "the same under torch.compile",
}
BATCH = 20


@contextlib.contextmanager
def null_launches(arch: int = 90) -> Iterator[None]:
    """Let launches on CPU tensors go through Triton as on a GPU, and end at the driver."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    def nothing(*_: Any) -> None: ...

    def compiled(self: Any, key: str, signature: Any, device: int, *_: Any) -> Any:
        _ = self.cache_key  # finds the globals that every launch compares
        kernel = SimpleNamespace(
            function=0, packed_metadata=0, launch_metadata=nothing, run=nothing
        )
        self.device_caches[device][0][key] = kernel
        return kernel

    target = GPUTarget("cuda", arch, 32)
    no_gpu = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    with (
        mock.patch.object(driver, "_active", no_gpu),
        mock.patch.object(JITFunction, "_do_compile", compiled),
        mock.patch.object(_backend, "triton_reason", lambda name, x: None),
    ):
        yield


def recorded(method: str, owner: Any, call: Call) -> list[Any]:
    """The calls of a method within a call, to be repeated."""
    found: list[Any] = []
    original = getattr(owner, method)

    def spy(*args: Any, **kwargs: Any) -> Any:
        found.append(partial(original, *args, **kwargs))
        return found[-1]()

    with mock.patch.object(owner, method, spy):
        call()
    return found


def calls_of(info: OpInfo, compiled: bool) -> dict[str, Call]:
    """What the columns time, in bf16 at the size tiny."""
    from triton.runtime.jit import JITFunction

    sample = inputs.conventions(info, SIZES["tiny"])[MODEL]
    arguments = inputs.make(sample, torch.bfloat16, "cpu", 0)
    leaves = {
        name: arguments[name].detach().requires_grad_()
        for name in info.differentiable
        if arguments.get(name) is not None
    }
    op = partial(info.op, backend="kernel")
    plain = partial(op, **arguments)
    [forward] = recorded("__call__", CustomOp, plain)
    torch_op, *args = forward.args
    launches = recorded("run", JITFunction, plain)
    with_leaves = {**arguments, **leaves}
    training = partial(_step, op, with_leaves, tuple(leaves.values()))
    made = {
        "launch": lambda: [launch() for launch in launches],
        "launcher": partial(torch_op._function, *args),
        "op": plain,
        "dispatched": partial(torch_op._op, *args),
        "function": _function(recorded("__call__", CustomOp, training), leaves),
        "training": training,
    }
    if compiled:
        made["compiled"] = partial(compile_(op), **arguments)
        again = torch.compile(op, fullgraph=True, dynamic=False)
        made["compiled training"] = partial(_step, again, with_leaves, tuple(leaves.values()))
    return made


def _step(op: Any, arguments: dict[str, Any], leaves: tuple[Tensor, ...]) -> None:
    """Forward and backward, whose gradient is the result."""
    outputs = [x for x in as_tuple(op(**arguments)) if x.requires_grad]
    torch.autograd.grad(outputs, leaves, [x.detach() for x in outputs])


def _function(calls: list[Any], leaves: dict[str, Tensor]) -> Call:
    """Forward and backward of an autograd.Function with the recorded calls' launchers."""
    (first, *args), *back = [call.args for call in calls]
    grads = tuple(torch.empty_like(x) for x in leaves.values())

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Any:
            ctx.save_for_backward(*tensors)
            return first._function(*args)

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            _ = ctx.saved_tensors
            for op, *arguments in back:
                op._function(*arguments)
            return grads

    return partial(
        _step, lambda **named: Function.apply(*named.values()), leaves, (*leaves.values(),)
    )


def best(calls: dict[str, Call], seconds: float) -> dict[str, float]:
    """Least microseconds of each call, over batches by turns."""
    found = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in calls.items():
            with torch.set_grad_enabled(name == "function" or "training" in name):
                call()
                start = time.perf_counter()
                for _ in range(BATCH):
                    call()
                took = time.perf_counter() - start
                found[name] = min(found[name], 1e6 * took / BATCH)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    add = parser.add_argument
    triton_ops = [name for name, info in OPS.items() if info.launch is not None]
    add("--op", action="append", choices=triton_ops, help="may be repeated; default: all")
    add("--seconds", type=float, default=3.0, help="of timing, for each op (%(default)g)")
    add("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    options = parser.parse_args(argv)
    if _backend.INTERPRETED:
        parser.error("kernels are interpreted here: unset TRITON_INTERPRET")
    torch.set_num_threads(1)
    print("host microseconds, on a machine that others may use as well")
    print("\n".join(f"  {name:18} {what}" for name, what in COLUMNS.items()), end="\n\n")
    print(f"{'op':21}" + "".join(f"{name:>{max(8, len(name)) + 2}}" for name in COLUMNS))
    with null_launches():
        for name in options.op or triton_ops:
            us = best(calls_of(OPS[name], not options.no_compile), options.seconds)
            us |= {"checks": us["op"] - us["launcher"], "over": us["op"] - us["launch"]}
            cells = (f"{us[c]:.1f}" if c in us else "-" for c in COLUMNS)
            widths = (max(8, len(c)) + 2 for c in COLUMNS)
            print(f"{name:21}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
