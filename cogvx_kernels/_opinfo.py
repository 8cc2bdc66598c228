"""`OpInfo`, the metadata of an op for tests and tools, after PyTorch's; and `SIZES` of real models.

Each op package has one in its `opinfo.py`; the contract test, `cogvx-kernels verify` and `aot`, and
the benchmarks read it.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Size:
    """A model at a resolution, with classifier-free guidance in one batch of 2."""

    frames: int  # of tokens, as height and width are
    height: int
    width: int
    nheads: int
    headdim: int
    text_len: int = 226
    batch: int = 2
    channels: int = 128  # of the VAE at full resolution

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the video; a token covers 16 by 16 pixels."""
        return 16 * self.height, 16 * self.width

    @property
    def video_len(self) -> int:
        return self.frames * self.height * self.width

    @property
    def seqlen(self) -> int:
        return self.text_len + self.video_len


# Named by model, height x width in pixels, and frames. `card` has heads that are no power of two,
# 48 of 40 dims; `tiny` is for a machine without a GPU.
SIZES: Mapping[str, Size] = {
    "2b-480x720-49f": Size(13, 30, 45, 30, 64),
    "5b-480x720-49f": Size(13, 30, 45, 48, 64),
    "1.5-5b-768x1360-81f": Size(11, 48, 85, 48, 64),
    "1.5-5b-768x1360-161f": Size(21, 48, 85, 48, 64),
    "card-480x720-49f": Size(13, 30, 45, 48, 40),
    "tiny": Size(2, 4, 6, 4, 64, text_len=16, batch=1, channels=32),
}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor argument, not yet allocated; memory and dtype are chosen by `testing.materialize`.

    values  how it is filled at random, and in exact tests with integers:
            "normal"      normal; -125 to 125
            "rows"        normal, with an offset and a scale for each row; 1 and -1
            "weight"      near 1; -125 to 125
            "cos", "sin"  of the same angles; of quarter turns
            "flip"        normal; 0 or 2, the same for both dims of a pair
            "few"         normal; -2 to 2
            "matrix"      normal / sqrt(last dim); -1 to 1
            "lifted"      as "matrix", or as "normal" with fewer than 3 dims; -128, 0 or 128, of
                          whose sums a GELU is exactly a ReLU
            "index"       int64 in [0, below), whatever the dtype under test
    layout  a key of `testing.LAYOUTS`
    dtype   None for the dtype under test, "wide" for at least fp32
    below   upper bound of "index"
    """

    shape: tuple[int, ...]
    values: str = "normal"
    layout: str = "contiguous"
    dtype: str | None = None
    below: int = 0

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """The tensor's dtype when `dtype` is under test."""
        if self.values == "index":
            return torch.int64
        return torch.promote_types(dtype, torch.float32) if self.dtype == "wide" else dtype


@dataclass(frozen=True)
class Sample:
    """Arguments of one call by name, tensors as `TensorSpec`, and the reason to test it.

    exact  small integers give the same bits in every order of computation
    """

    reason: str
    arguments: Mapping[str, Any]
    exact: bool = True

    def __str__(self) -> str:
        return self.reason.replace(" ", "_")

    def specs(self) -> dict[str, TensorSpec]:
        return {k: v for k, v in self.arguments.items() if isinstance(v, TensorSpec)}


@dataclass(frozen=True)
class Cost:
    """Least bytes that a call moves through memory, and its arithmetic."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Budget:
    """Limits of a compiled kernel at a size and dtype, on every target.

    registers   for each thread, on NVIDIA targets
    shared      bytes of shared memory for each block
    access      bits of the narrowest global load or store of a large tensor; 128 is the widest
    narrow      number of narrower accesses allowed: of tables, weights and partial sums
    convention  one of the op's `conventions`; "" for `at_size`
    """

    kernel: str
    size: str
    registers: int
    shared: int
    access: int = 128
    narrow: int = 0
    dtype: torch.dtype = torch.bfloat16
    convention: str = ""


@dataclass(frozen=True)
class OpInfo:
    """Metadata for one op: reference, samples, costs, budgets.

    op, reference   called with a sample's arguments; op also takes backend=
    samples         small and irregular calls
    random_sample   another call from a random generator, for the fuzz test
    at_size         the call at one of SIZES, laid out as in a model
    conventions     further calls to time, by name, each at one of SIZES
    tokens          arguments over the joint sequence, (batch, seqlen, ...)
    videos          arguments over the frames of a video, (batch, channels, frames, ...)
    batched         other arguments with a batch dim, (batch, ...)
    differentiable  arguments with a gradient
    summed          those whose gradient is a sum over rows
    constant        indices of the outputs without a gradient
    products        made of matrix products, whose sums have no order of their own
    rounds_between  rounds intermediate results to the dtype
    variants        options of the op that change no value, but allow no gradient
    cost            (forward, backward) of a sample's arguments
    launch          calls the launchers of the op's kernel module with a sample's arguments; None
                    if the kernel is not Triton's
    rows            number of rows that are normalised; None if each last dim is one
    resized         for an op on videos: a small call with a batch size and a number of frames
    gradcheck       for an op on videos: a call small enough for finite differences
    budgets         of its kernels, compiled ahead of time
    """

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    samples: tuple[Sample, ...]
    random_sample: Callable[[random.Random], Sample]
    at_size: Callable[[Size], Sample]
    differentiable: tuple[str, ...]
    cost: Callable[[Mapping[str, Any]], tuple[Cost, Cost]]
    torch_ops: tuple[str, ...]
    launch: Callable[[Any, Mapping[str, Any]], None] | None
    tokens: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    batched: tuple[str, ...] = ()
    summed: tuple[str, ...] = ()
    constant: tuple[int, ...] = ()
    rows: Callable[[Mapping[str, Any]], int] | None = None
    resized: Callable[[int, int], Sample] | None = None
    gradcheck: Sample | None = None
    products: bool = False
    rounds_between: bool = False
    conventions: Mapping[str, Callable[[Size], Sample]] = field(default_factory=dict)
    variants: tuple[Mapping[str, Any], ...] = ()
    budgets: tuple[Budget, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)

    def __str__(self) -> str:
        return self.name
