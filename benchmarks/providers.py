"""Who is timed: each a function that, once and untimed, makes a function with the op's arguments.

`Unavailable` says why one of them is not in the table; nothing is left out in silence.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from cogvx_kernels._backend import INTERPRETED, triton_reason
from cogvx_kernels.testing import OpInfo

from .inputs import HALF_SPLIT, MODEL

Function = Callable[..., Any]
Arguments = Mapping[str, Any]

# The interpreter takes about a millisecond a program, of which there is one for each token.
INTERPRETER_TOKENS = 4096


class Unavailable(Exception):
    """A provider cannot run here; the message says why."""


@dataclass(frozen=True)
class Provider:
    """Somebody to time.

    ours         held to the rule of numerics; another may err up to `OTHERS_MAY_ERR` times as much
    conventions  keys of `inputs.conventions` it takes part in
    passes       of "forward", "backward"
    overwrites   its arguments: they are made anew where they matter
    asked        runs only if asked for by name
    on_cpu       its time there means something: false of kernels, which are interpreted there
    """

    name: str
    note: str
    make: Callable[[OpInfo, Arguments], Function]
    ours: bool = False
    conventions: tuple[str, ...] = (MODEL, HALF_SPLIT)
    passes: tuple[str, ...] = ("forward", "backward")
    overwrites: bool = False
    asked: bool = False
    on_cpu: bool = True


# Other libraries round between the norm and the rotation, and tables or sums to 16 bits; that
# comes to 2 or so. More is another function, and its speed says nothing about this one.
OTHERS_MAY_ERR = 4
# The error of a sum over rows, over the sum: a compiler may add a million rows one after another,
# and torch's LayerNorm on a CPU adds 16-bit gradients up in 16 bits. Another function is off by 1.
OTHERS_SUMS_MAY_LOSE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def _device(arguments: Arguments) -> torch.device:
    return next(x.device for x in arguments.values() if isinstance(x, Tensor))


# --- what anyone has -------------------------------------------------------------------------


def _eager(info: OpInfo, arguments: Arguments) -> Function:
    return info.reference


def _compile(info: OpInfo, arguments: Arguments, mode: str | None = None) -> Function:
    torch.compiler.reset()  # no leftovers of the sizes and conventions before
    functorch_config.donated_buffer = False  # a graph that is kept cannot give its buffers away
    return torch.compile(info.reference, fullgraph=True, dynamic=False, mode=mode)


def _diffusers(info: OpInfo, arguments: Arguments) -> Function:
    """The steps of diffusers' CogVideoX attention processor between the projection and SDPA.

    On the (batch, heads, seq, dim) view: nn.LayerNorm, then apply_rotary_emb on the video tokens,
    written over them. In `rope3d` there is no norm whose result to write over, so x itself is.
    """
    if not arguments.get("interleaved") or arguments.get("norm", "layer") != "layer":
        raise Unavailable("diffusers' CogVideoX has LayerNorm and interleaved pairs")
    try:
        from diffusers.models.embeddings import apply_rotary_emb
    except ImportError as error:
        raise Unavailable(f"diffusers does not import ({error})") from None
    tables = tuple(arguments[name].repeat_interleave(2, -1) for name in ("cos", "sin"))

    def turn(x: Tensor, text_len: int) -> Tensor:
        if x.requires_grad and x.is_leaf:
            x = x.clone()
        x = x.transpose(1, 2)
        return _turn(x, text_len).transpose(1, 2)

    def _turn(x: Tensor, text_len: int) -> Tensor:
        x[:, :, text_len:] = apply_rotary_emb(x[:, :, text_len:], tables)
        return x

    def norm_turn(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, text_len: int, eps: float
    ) -> Tensor:
        x = torch.nn.functional.layer_norm(x.transpose(1, 2), x.shape[-1:], weight, bias, eps)
        return _turn(x, text_len).transpose(1, 2)

    def rope3d(x: Tensor, text_len: int, **_: Any) -> Tensor:
        return turn(x, text_len)

    def qk_norm_rope3d(
        q: Tensor, k: Tensor, *, text_len: int, eps: float = 1e-6, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        return (
            norm_turn(q, rest["q_weight"], rest["q_bias"], text_len, eps),
            norm_turn(k, rest["k_weight"], rest["k_bias"], text_len, eps),
        )

    functions = {"rope3d": rope3d, "qk_norm_rope3d": qk_norm_rope3d}
    if info.name not in functions:
        raise Unavailable(f"no diffusers steps are written down for {info.name}")
    return functions[info.name]


# --- this project ----------------------------------------------------------------------------


def _kernel(info: OpInfo, arguments: Arguments, **options: Any) -> Function:
    x = next(x for x in arguments.values() if isinstance(x, Tensor))
    if not x.is_cuda and not INTERPRETED:
        raise Unavailable("kernels do not run on a CPU, except in Triton's interpreter")
    if not x.is_cuda and x.shape[0] * x.shape[1] > INTERPRETER_TOKENS:
        raise Unavailable(f"over {INTERPRETER_TOKENS} tokens are too many for the interpreter")
    if reason := triton_reason("x", x):
        raise Unavailable(reason)
    if INTERPRETED:
        from cogvx_kernels.tools import interpreter

        interpreter.install()
    return partial(info.op, backend="kernel", **options)


def _kernel_inplace(info: OpInfo, arguments: Arguments) -> Function:
    if "inplace" not in inspect.signature(info.op).parameters:
        raise Unavailable(f"{info.name} has no inplace")
    return _kernel(info, arguments, inplace=True)


def _auto(info: OpInfo, arguments: Arguments) -> Function:
    if _device(arguments).type != "cpu" or INTERPRETED:
        raise Unavailable("auto is the kernel here")
    return partial(info.op, backend="auto")


# --- peers -----------------------------------------------------------------------------------


def _liger(info: OpInfo, arguments: Arguments) -> Function:
    """Liger turns q and k at once, in place; the two halves of the batch stand for them here."""
    if info.name != "rope3d":
        raise Unavailable("Liger has no norm with its rotation")
    x = arguments["x"]
    if not x.is_cuda:
        raise Unavailable("Liger's kernels do not run on a CPU")
    try:
        from liger_kernel.transformers.rope import liger_rotary_pos_emb
    except ImportError as error:
        raise Unavailable(f"liger-kernel does not import ({error})") from None
    if x.shape[0] % 2 or not x.is_contiguous():
        raise Unavailable("Liger's kernel is in place for a contiguous x and an even batch alone")
    cos, sin = (torch.cat([arguments[name]] * 2, -1)[None] for name in ("cos", "sin"))

    def rope3d(x: Tensor, **_: Any) -> Tensor:
        q, k = (half.transpose(1, 2) for half in x.chunk(2))
        liger_rotary_pos_emb(q, k, cos, sin)
        return x

    return rope3d


PROVIDERS = (
    Provider("eager", "the plain-torch reference, as it is", _eager),
    Provider(
        "diffusers-eager",
        "diffusers' own steps on (batch, heads, seq, dim); rounds between norm and rotation",
        _diffusers,
        conventions=(MODEL,),
        overwrites=True,
    ),
    Provider("compile", "torch.compile of the reference, fullgraph, default mode", _compile),
    Provider(
        "compile-max-autotune",
        "torch.compile of the reference, fullgraph, max-autotune-no-cudagraphs",
        partial(_compile, mode="max-autotune-no-cudagraphs"),
        asked=True,
    ),
    Provider("cogvx", "the kernel, into new tensors", _kernel, ours=True, on_cpu=False),
    Provider(
        "cogvx-inplace",
        "the kernel, over its arguments",
        _kernel_inplace,
        ours=True,
        passes=("forward",),
        overwrites=True,
        on_cpu=False,
    ),
    Provider("cogvx-auto", 'backend="auto", which on a CPU is the reference', _auto, ours=True),
    Provider(
        "liger",
        "liger-kernel's rotary: in place; no text, no norm, half-split pairs, full-width tables",
        _liger,
        conventions=(HALF_SPLIT,),
        passes=("forward",),
        overwrites=True,
    ),
)


def providers_of(info: OpInfo) -> tuple[Provider, ...]:
    """All of the above, and the peers that the op itself names."""
    peers = (
        Provider(name, "another library's", lambda info, arguments, f=function: f)
        for name, function in info.peers.items()
    )
    return (*PROVIDERS, *peers)
