"""Benchmarks of the ops: every op of `cogvx_kernels.testing.OPS`, by the providers that can run."""

import importlib.util
import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cogvx_kernels._backend import INTERPRETED, triton_reason
from cogvx_kernels.frame_cache import frame_cache_append
from cogvx_kernels.testing import OPS, SIZES, Comparison, OpInfo, as_tuple

from . import inputs, peers  # noqa: F401
from .oracle import Oracle, results_of
from .registry import (
    PASSES,
    Arguments,
    Benchmark,
    Case,
    Check,
    Entry,
    Function,
    Options,
    Provider,
    Unavailable,
    compile_,
    provider,
    providers_of,
    register,
)
from .timing import Call

SEED = 0
# The interpreter takes about a millisecond a program, of which there is one for each token, or for
# some thousands of a video's elements.
INTERPRETER_TOKENS = 4096
INTERPRETER_ELEMENTS = 1 << 21
# Other libraries round between the norm and the rotation, and tables or sums to 16 bits; that
# comes to 2 or so. More is another function, and its speed says nothing about this one.
OTHERS_MAY_ERR = 4
# The error of a sum over rows, over the sum: a compiler may add a million rows one after another,
# and torch's LayerNorm on a CPU adds 16-bit gradients up in 16 bits. Another function is off by 1.
OTHERS_SUMS_MAY_LOSE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# --- providers of every op -------------------------------------------------------------------


@provider("eager", "the plain-torch reference, as it is: computes in fp32")
def _eager(info: OpInfo, arguments: Arguments) -> Function:
    return info.reference


@provider("compile", "torch.compile of the reference, fullgraph, default mode")
def _compile(info: OpInfo, arguments: Arguments) -> Function:
    return compile_(info.reference)


AUTOTUNE = "max-autotune-no-cudagraphs"


@provider("compile-max-autotune", f"the same in mode {AUTOTUNE}", optional=True)
def _max_autotune(info: OpInfo, arguments: Arguments) -> Function:
    return compile_(info.reference, AUTOTUNE)


KERNEL = {"ours": True, "on_cpu": False, "applies": lambda info: info.launch is not None}
ONCE = {"passes": ("forward",), "overwrites": True}


@provider("cogvx", "the kernel, into new tensors", **KERNEL)
def _kernel(info: OpInfo, arguments: Arguments, **options: object) -> Function:
    x = next(x for x in arguments.values() if isinstance(x, Tensor))
    if not x.is_cuda and not INTERPRETED:
        raise Unavailable("kernels do not run on a CPU, except in Triton's interpreter")
    size = x.numel() if info.videos else x.shape[0] * x.shape[1]
    most = INTERPRETER_ELEMENTS if info.videos else INTERPRETER_TOKENS
    if not x.is_cuda and size > most:
        what = "elements" if info.videos else "tokens"
        raise Unavailable(f"over {most} {what} are too many for the interpreter")
    if reason := triton_reason("x", x):
        raise Unavailable(reason)
    if INTERPRETED:
        from cogvx_kernels.tools import interpreter

        interpreter.install()
    return partial(info.op, backend="kernel", **options)


@provider("cogvx-inplace", "the kernel, over its arguments", **KERNEL, **ONCE)
def _inplace(info: OpInfo, arguments: Arguments) -> Function:
    if "inplace" not in inspect.signature(info.op).parameters:
        raise Unavailable(f"{info.name} has no inplace")
    return _kernel(info, arguments, inplace=True)


@provider("cogvx-grouped", 'gemm="grouped", one Triton launch each product', "expert_ffn", **KERNEL)
def _grouped(info: OpInfo, arguments: Arguments) -> Function:
    return _kernel(info, arguments, gemm="grouped")


@provider("cogvx-dense", 'gemm="dense", cuBLAS for each expert and sample', "expert_ffn", **KERNEL)
def _dense(info: OpInfo, arguments: Arguments) -> Function:
    if arguments.get("index") is not None:
        raise Unavailable("it takes no index")
    return _kernel(info, arguments, gemm="dense")


@provider("cogvx", "the extension, into new tensors", "frame_cache_join", ours=True)
def _extension(info: OpInfo, arguments: Arguments) -> Function:
    if importlib.util.find_spec("cogvx_kernels._C") is None:
        raise Unavailable("the C++/CUDA extension is not built")
    return partial(info.op, backend="kernel")


@provider("cogvx-append", "the extension, over the cache", "frame_cache_join", ours=True, **ONCE)
def _append(info: OpInfo, arguments: Arguments) -> Function:
    """The op in place, which gives the cache back as the next one."""
    _extension(info, arguments)
    if arguments["cache"] is None:
        raise Unavailable("there is no cache to overwrite")

    def frame_cache_join(
        cache: Tensor, frames: Tensor, *, start: str | None = None, **_: object
    ) -> tuple[Tensor, Tensor]:
        return frame_cache_append(cache, frames, start=start, backend="kernel"), cache

    return frame_cache_join


@provider("cogvx-auto", 'backend="auto", which on a CPU is the reference', ours=True)
def _auto(info: OpInfo, arguments: Arguments) -> Function:
    x = next(x for x in arguments.values() if isinstance(x, Tensor))
    if x.is_cuda or INTERPRETED or info.launch is None:
        raise Unavailable("auto is the kernel here")
    return partial(info.op, backend="auto")


# --- cases -----------------------------------------------------------------------------------


def cases(info: OpInfo, options: Options) -> Iterator[Case]:
    """A case for each convention of a call; those that are there for a peer alone need the peer."""
    left_out: dict[str, str] = {}
    calls = inputs.conventions(info, SIZES[options.size])
    for convention in options.selects(list(calls)):
        new = partial(inputs.make, calls[convention], options.dtype, options.device)
        functions = _functions(info, convention, new(SEED), options, left_out)
        alone = convention == inputs.HALF_SPLIT
        if alone and not any(convention in p.conventions for p, _ in functions):
            continue
        yield make_case(info, convention, new, functions, options, left_out)


def make_case(
    info: OpInfo,
    convention: str,
    new: partial[dict[str, Any]],
    functions: list[tuple[Provider, Function]],
    options: Options,
    left_out: dict[str, str],
) -> Case:
    """The case of one convention, whose functions are all compared with one oracle."""
    arguments = new(SEED)
    outputs = as_tuple(info.reference(**arguments))
    back = inputs.grad_outputs_like(outputs, SEED) if "backward" in options.passes else None
    del outputs
    oracle = Oracle(info, arguments, back)

    def entry(by: Provider, function: Function) -> Entry:
        def check(which: str) -> list[Check]:
            fresh = new(SEED) if by.overwrites else arguments
            send = back if which == "backward" else None
            found = oracle.compare(results_of(function, fresh, oracle, send))
            return [as_check(x, oracle, by.ours) for x in found]

        interpreted = options.device.type == "cpu" and not by.on_cpu
        untimed = "right in Triton's interpreter, which is never timed" if interpreted else ""
        passes = tuple(which for which in options.passes if which in by.passes)
        calls = partial(calls_of, info, function, new)
        return Entry(by.name, check, calls, passes, by.note, by.ours, untimed)

    entries = [entry(*pair) for pair in functions]
    costs = dict(zip(PASSES, info.cost(arguments), strict=True))
    about = options.passes, str(oracle), inputs.nbytes(arguments), costs, left_out
    return Case(info.name, convention, entries, *about)


def _functions(
    info: OpInfo, convention: str, arguments: Arguments, options: Options, left_out: dict[str, str]
) -> list[tuple[Provider, Function]]:
    made = []
    for by in providers_of(info):
        requested = by.name in ("eager", *options.providers)
        requested |= by.name == "compile-max-autotune" and options.max_autotune
        unasked = not requested and (bool(options.providers) or by.optional)
        other_call = by.conventions and convention not in by.conventions
        if unasked or other_call or not set(by.passes) & {*options.passes}:
            continue
        try:
            made.append((by, by.make(info, arguments)))
        except Unavailable as reason:
            known = (why for name, why in left_out.items() if name.split()[0] == by.name)
            if str(reason) not in known:
                name = by.name if convention == inputs.MODEL else f"{by.name} ({convention})"
                left_out[name] = str(reason)
    return made


def as_check(found: Comparison, oracle: Oracle, ours: bool) -> Check:
    largest = found.ulp / torch.finfo(_dtype(found, oracle)).eps
    ok = found.ok or (not ours and close_enough(found, oracle))
    return Check(ok, found.error / (largest or 1.0), str(found), found.multiple)


def _dtype(found: Comparison, oracle: Oracle) -> torch.dtype:
    return oracle.baseline[found.name.partition(",")[0]].dtype


def close_enough(found: Comparison, oracle: Oracle) -> bool:
    """Another library's result is the same function, if not as exactly computed.

    In fp32 a norm of a video is no better than its sums of squares, which some add up as they are.
    """
    dtype, name = _dtype(found, oracle), found.name.partition(",")[0]
    if name in oracle.summed or (oracle.info.videos and dtype is torch.float32):
        largest = found.ulp / torch.finfo(dtype).eps
        if found.error <= OTHERS_SUMS_MAY_LOSE[dtype] * largest:
            return True
    return found.ok or found.multiple <= OTHERS_MAY_ERR


# --- calls to time ---------------------------------------------------------------------------


def calls_of(
    info: OpInfo, function: Function, new: partial[dict[str, Any]], which: str, count: int
) -> list[Call]:
    """A call for each of `count` inputs, each once seen to give finite results."""
    made: list[Call] = []
    for seed in range(1, count + 1):
        arguments = new(seed)
        if which == "forward":
            call: Call = without_grad(partial(function, **arguments))
        else:
            call = _backward(info, function, arguments, seed)
        if not all(bool(x.isfinite().all()) for x in as_tuple(call())):
            raise RuntimeError(f"{info.name}: a {which} result is not finite, seed {seed}")
        made.append(call)
    return made


def without_grad(call: Call) -> Call:
    def inner() -> Any:
        with torch.no_grad():
            return call()

    return inner


def _backward(info: OpInfo, function: Function, arguments: dict[str, Any], seed: int) -> Call:
    """The backward alone, of a graph that is kept."""
    leaves = {
        name: arguments[name].detach().requires_grad_()
        for name in info.differentiable
        if arguments.get(name) is not None
    }
    made = as_tuple(function(**{**arguments, **leaves}))
    outputs = tuple(x for x in made if x.requires_grad)
    back = inputs.grad_outputs_like(outputs, seed)
    return partial(torch.autograd.grad, outputs, tuple(leaves.values()), back, retain_graph=True)


def _register(info: OpInfo) -> None:
    def entries() -> list[str]:
        return [by.name for by in providers_of(info)]

    def conventions() -> list[str]:
        return list(inputs.conventions(info, SIZES["tiny"]))

    register(Benchmark(info.name, partial(cases, info), entries, conventions, tuple(SIZES)))


for _info in OPS.values():
    _register(_info)
