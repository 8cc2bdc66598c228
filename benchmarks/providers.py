"""Who is timed: each a function that, once and untimed, makes a function with the op's arguments.

`Unavailable` says why one of them is not in the table; nothing is left out in silence.
"""

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from cogvx_kernels._backend import INTERPRETED, triton_reason
from cogvx_kernels.frame_cache import frame_cache_append
from cogvx_kernels.testing import OpInfo

from .inputs import HALF_SPLIT, MODEL
from .peers import Arguments, Function, Maker, Unavailable, adaln, ffn, rope, vae

# The interpreter takes about a millisecond a program, of which there is one for each token, or for
# some thousands of a video's elements.
INTERPRETER_TOKENS = 4096
INTERPRETER_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class Provider:
    """Somebody to time.

    ours         held to the rule of numerics; another may err up to `OTHERS_MAY_ERR` times as much
    ops          it is about; none for every op
    conventions  keys of `inputs.conventions` it takes part in; none for every one
    passes       of "forward", "backward"
    overwrites   its arguments: they are made anew where they matter
    asked        runs only if asked for by name
    on_cpu       its time there means something: false of kernels, which are interpreted there
    triton       whether it is there for ops with a kernel of Triton's, or for those with another
                 kernel; None: for both
    """

    name: str
    note: str
    make: Callable[[OpInfo, Arguments], Function]
    ours: bool = False
    ops: tuple[str, ...] = ()
    conventions: tuple[str, ...] = ()
    passes: tuple[str, ...] = ("forward", "backward")
    overwrites: bool = False
    asked: bool = False
    on_cpu: bool = True
    triton: bool | None = None


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
    return _compiled(info.reference, mode)


def _compiled(function: Function, mode: str | None = None) -> Function:
    torch.compiler.reset()  # no leftovers of the sizes and conventions before
    functorch_config.donated_buffer = False  # a graph that is kept cannot give its buffers away
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def _peer(makers: Mapping[str, Maker], info: OpInfo, arguments: Arguments) -> Function:
    return makers[info.name](arguments)


def _compiled_peer(makers: Mapping[str, Maker], info: OpInfo, arguments: Arguments) -> Function:
    function = makers[info.name](arguments)
    if makers is SPLIT_CAT and arguments.get("index") is not None:
        raise Unavailable("tokens that are looked for break the graph")
    return _compiled(function)


# --- this project ----------------------------------------------------------------------------


def _kernel(info: OpInfo, arguments: Arguments, **options: object) -> Function:
    x = next(x for x in arguments.values() if isinstance(x, Tensor))
    if not x.is_cuda and not INTERPRETED:
        raise Unavailable("kernels do not run on a CPU, except in Triton's interpreter")
    if not x.is_cuda and info.videos and x.numel() > INTERPRETER_ELEMENTS:
        raise Unavailable(f"over {INTERPRETER_ELEMENTS} elements are too many for the interpreter")
    if not x.is_cuda and not info.videos and x.shape[0] * x.shape[1] > INTERPRETER_TOKENS:
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


def _kernel_gemm(gemm: str, info: OpInfo, arguments: Arguments) -> Function:
    if gemm == "dense" and arguments.get("index") is not None:
        raise Unavailable("it takes no index")
    return _kernel(info, arguments, gemm=gemm)


def _extension(info: OpInfo, arguments: Arguments) -> Function:
    if importlib.util.find_spec("cogvx_kernels._C") is None:
        raise Unavailable("the C++/CUDA extension is not built")
    return partial(info.op, backend="kernel")


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


def _auto(info: OpInfo, arguments: Arguments) -> Function:
    if _device(arguments).type != "cpu" or INTERPRETED or info.launch is None:
        raise Unavailable("auto is the kernel here")
    return partial(info.op, backend="auto")


# --- all of them -----------------------------------------------------------------------------

DIFFUSERS = {**rope.DIFFUSERS, **adaln.DIFFUSERS}
SPLIT_CAT: Mapping[str, Maker] = {"expert_ffn": ffn.split_cat}
CUBLASLT: Mapping[str, Maker] = {"expert_ffn": ffn.cublaslt_gelu}
GROUPED_MM: Mapping[str, Maker] = {"expert_ffn": ffn.grouped_mm}


PROVIDERS = (
    Provider("eager", "the plain-torch reference, as it is: computes in fp32", _eager),
    Provider(
        "diffusers-eager",
        "diffusers' own steps on (batch, heads, seq, dim); rounds between norm and rotation",
        partial(_peer, rope.DIFFUSERS),
        ops=tuple(rope.DIFFUSERS),
        conventions=(MODEL,),
        overwrites=True,
    ),
    Provider(
        "diffusers-eager",
        "diffusers' own steps, each modality apart; rounds after each",
        partial(_peer, adaln.DIFFUSERS),
        ops=tuple(adaln.DIFFUSERS),
    ),
    Provider(
        "split-cat",
        "linear, GELU, linear for each expert, between split and cat; routed: gather, index_add",
        partial(_peer, SPLIT_CAT),
        ops=tuple(SPLIT_CAT),
    ),
    Provider("compile", "torch.compile of the reference, fullgraph, default mode", _compile),
    Provider(
        "compile-max-autotune",
        "torch.compile of the reference, fullgraph, max-autotune-no-cudagraphs",
        partial(_compile, mode="max-autotune-no-cudagraphs"),
        asked=True,
    ),
    Provider(
        "compile-diffusers",
        "torch.compile of diffusers' steps, fullgraph, default mode",
        partial(_compiled_peer, adaln.DIFFUSERS),
        ops=tuple(adaln.DIFFUSERS),
    ),
    Provider(
        "compile-split-cat",
        "torch.compile of split-cat, fullgraph, default mode",
        partial(_compiled_peer, SPLIT_CAT),
        ops=tuple(SPLIT_CAT),
    ),
    Provider(
        "diffusers-eager",
        "GroupNorm, nearest maps of the latents, multiply, add, SiLU; rounds after each",
        partial(_peer, vae.DIFFUSERS),
        ops=tuple(vae.DIFFUSERS),
    ),
    Provider(
        "compile-diffusers",
        "torch.compile of diffusers' steps, fullgraph, default mode",
        partial(_compiled_peer, vae.DIFFUSERS),
        ops=tuple(vae.DIFFUSERS),
    ),
    Provider(
        "torch-steps",
        "torch.cat and F.conv3d, on a GPU cuDNN's; or the sum and var_mean",
        partial(_peer, vae.STEPS),
        ops=tuple(vae.STEPS),
    ),
    Provider(
        "compile-torch-steps",
        "torch.compile of torch-steps, fullgraph, default mode",
        partial(_compiled_peer, vae.STEPS),
        ops=tuple(vae.STEPS),
    ),
    Provider(
        "cogvx",
        "the kernel, into new tensors",
        _kernel,
        ours=True,
        on_cpu=False,
        triton=True,
    ),
    Provider("cogvx", "the extension, into new tensors", _extension, ours=True, triton=False),
    Provider(
        "cogvx-append",
        "the extension, over the cache",
        _append,
        ours=True,
        ops=("frame_cache_join",),
        passes=("forward",),
        overwrites=True,
    ),
    Provider(
        "cogvx-inplace",
        "the kernel, over its arguments",
        _kernel_inplace,
        ours=True,
        passes=("forward",),
        overwrites=True,
        on_cpu=False,
        triton=True,
    ),
    Provider(
        "cogvx-grouped",
        'gemm="grouped", one Triton launch for each product',
        partial(_kernel_gemm, "grouped"),
        ours=True,
        ops=("expert_ffn",),
        on_cpu=False,
    ),
    Provider(
        "cogvx-dense",
        'gemm="dense", cuBLAS for each expert and sample',
        partial(_kernel_gemm, "dense"),
        ours=True,
        ops=("expert_ffn",),
        on_cpu=False,
    ),
    Provider("cogvx-auto", 'backend="auto", which on a CPU is the reference', _auto, ours=True),
    Provider(
        "cublaslt-gelu",
        "bias and tanh-GELU in cuBLASLt's epilogue, and addmm, for each expert and sample",
        partial(_peer, CUBLASLT),
        ops=tuple(CUBLASLT),
        passes=("forward",),
    ),
    Provider(
        "grouped-mm",
        "sort, gather, torch._grouped_mm, bias and GELU, again, ungather, combine",
        partial(_peer, GROUPED_MM),
        ops=tuple(GROUPED_MM),
    ),
    Provider(
        "compile-grouped-mm",
        "torch.compile of grouped-mm, fullgraph, default mode",
        partial(_compiled_peer, GROUPED_MM),
        ops=tuple(GROUPED_MM),
    ),
    Provider(
        "liger",
        "liger-kernel's rotary: in place; no text, no norm, half-split pairs, full-width tables",
        partial(_peer, rope.LIGER),
        ops=tuple(rope.LIGER),
        conventions=(HALF_SPLIT,),
        passes=("forward",),
        overwrites=True,
    ),
    Provider(
        "liger",
        "liger-kernel's LayerNorm, and torch.compile of the modulation",
        partial(_peer, adaln.LIGER),
        ops=tuple(adaln.LIGER),
    ),
    Provider(
        "sglang",
        "sglang's norm with a modulation picked for each token; writes the tokens' gates too",
        partial(_peer, adaln.SGLANG),
        ops=tuple(adaln.SGLANG),
        passes=("forward",),
    ),
    Provider(
        "liger",
        "liger-kernel's GroupNorm, and SiLU",
        partial(_peer, vae.LIGER),
        ops=tuple(vae.LIGER),
    ),
    Provider(
        "sglang",
        "sglang's GroupNorm with SiLU; or its cat and pad, and a copy of the last frames",
        partial(_peer, vae.SGLANG),
        ops=tuple(vae.SGLANG),
        passes=("forward",),
    ),
    Provider(
        "vllm-omni",
        "vLLM-Omni's GroupNorm with SiLU",
        partial(_peer, vae.VLLM_OMNI),
        ops=tuple(vae.VLLM_OMNI),
        passes=("forward",),
    ),
)


def providers_of(info: OpInfo) -> tuple[Provider, ...]:
    """Those of the above that are about the op, and the peers that it names itself."""
    peers = (
        Provider(name, "another library's", lambda info, arguments, f=function: f)
        for name, function in info.peers.items()
    )
    about = (p for p in PROVIDERS if not p.ops or info.name in p.ops)
    triton = info.launch is not None
    return (*(p for p in about if p.triton in (None, triton)), *peers)
