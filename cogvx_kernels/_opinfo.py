"""What an op promises, as data: `OpInfo`, after PyTorch's own. And `SIZES`, the real sizes.

One contract test, `cogvx-kernels verify`, `cogvx-kernels aot` and the benchmarks all read these; a
room describes its op once, in its `opinfo.py`.
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
    channels: int = 128  # of the VAE, where it is at the size of the pixels

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the video: 16 by 16 of them are a token."""
        return 16 * self.height, 16 * self.width

    @property
    def video_len(self) -> int:
        return self.frames * self.height * self.width

    @property
    def seqlen(self) -> int:
        return self.text_len + self.video_len


# Named after the model, the video's height and width in pixels, and its frames. `card` is the
# design card's transformer, 48 heads of 40; `tiny` is for a machine without a GPU.
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
    """A tensor argument before it exists: whoever makes it chooses memory, values and dtype.

    values  "normal"; "rows" (normal, with an offset and a scale for each row); "weight" (near 1);
            "cos", "sin" (of the same angles); "flip" (normal, but 0 or 2 where integers are asked
            for, the same for both dims of a pair: rows plus twice their negative are rows);
            "matrix" (normal / sqrt(last dim); as integers -1, 0, 1); "few" (normal; -2 to 2);
            "lifted" (as "matrix", or normal with fewer than 3 dims; -128, 0, 128: of their sums
            a GELU is exactly a ReLU); "index" (int64 in [0, below), whatever the dtype under test)
    layout  a key of `testing.LAYOUTS`
    dtype   None for the dtype under test, "wide" for at least fp32
    below   of "index" alone: how many there are to choose from
    """

    shape: tuple[int, ...]
    values: str = "normal"
    layout: str = "contiguous"
    dtype: str | None = None
    below: int = 0

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """What the tensor is made of when `dtype` is under test."""
        if self.values == "index":
            return torch.int64
        return torch.promote_types(dtype, torch.float32) if self.dtype == "wide" else dtype


@dataclass(frozen=True)
class Sample:
    """Arguments of one call by name, tensors as `TensorSpec`, and why this call is worth a test.

    exact  whether there are small integers on which every order of computing gives the same bits
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
    """The least that a call must move through memory, and the arithmetic it does."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Budget:
    """What a compiled kernel may cost, at a named size and dtype, on every target it is held to.

    registers   for each thread, on NVIDIA targets
    shared      bytes of shared memory for each block
    access      bits of the narrowest global load or store of a big tensor, 128 being the widest
    narrow      how many narrower accesses there may be: those of tables, weights and shares
    convention  one of the op's, where it is not the call `at_size`
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
    """An op, its law, and what is promised of it.

    op, reference   called with a sample's arguments; op also takes backend=
    samples         small and ragged
    random_sample   one more, drawn from a generator, for the fuzz test
    at_size         the arguments at one of SIZES, laid out as a model has them
    conventions     further calls worth timing, by name, each at one of SIZES
    tokens          names of the arguments over the joint sequence, (batch, seqlen, ...)
    videos          or of those over the frames of a video, (batch, channels, frames, ...)
    batched         names of others with a part for each sample of the batch, (batch, ...)
    differentiable  names of the arguments with a gradient
    summed          those of them whose gradient is a sum over rows
    constant        which of its outputs have no gradient, by number
    products        whether it is made of matrix products, whose sums have no order of their own
    rounds_between  whether it rounds to the dtype before it is done, and goes on from there
    variants        further arguments of the op that change no value, but allow no gradient
    cost            of the forward and of the backward, of a sample's arguments
    launch          calls its launchers, given the room's kernel module and a sample's arguments;
                    None if its kernel is not Triton's
    rows            how many rows are normalised, of a call's arguments; None: each last dim is one
    resized         for an op on videos: a small call of so large a batch and so many frames
    gradcheck       for an op on videos: a call small enough for finite differences
    budgets         of its kernels, ahead of time
    peers           name -> a function with the op's arguments, from other libraries, if installed
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
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name
