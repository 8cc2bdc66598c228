"""Benchmark "conv": torch's convolutions at the decoder's shapes, by kernel, layout and bias.

A 3-D convolution as one and as planes (`cogvx_kernels.conv3d`), in both layouts, with and without a
bias; an upsampled picture's convolution as it is, as four folded ones, and as one that makes all
four phases. `python -m benchmarks.conv` is `python -m benchmarks --op conv`.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvx_kernels import conv3d
from cogvx_kernels._opinfo import Cost
from cogvx_kernels.resample import fold_frames, phase_weights, pixel_phases, unfold_frames

from .ops import without_grad
from .registry import MODEL_SIZE, Benchmark, Case, Check, Entry, Options, register
from .timing import Call

LAYOUTS = {"NCDHW": torch.contiguous_format, "NDHWC": torch.channels_last_3d}
# Of the largest of a result, what the largest error may be: in 16 bits roundings, of planes each
# one's and then their sum's; in fp32 the order of thousands of sums, as in `benchmarks.model`.
MAY_ERR = {torch.float32: 1e-5, torch.float16: 4 * 2**-10, torch.bfloat16: 4 * 2**-7}

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """A convolution of `frames` results; `kernel` over frames, rows and columns, which are padded.

    doubled: of pictures, which are upsampled first; height and width are before that
    """

    inputs: int
    outputs: int
    frames: int
    height: int
    width: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    doubled: bool = False

    def __str__(self) -> str:
        kernel = "x".join(map(str, self.kernel[self.doubled :]))
        return (
            f"{'2x and ' if self.doubled else ''}{kernel}, {self.inputs} to {self.outputs}, "
            f"{self.frames} of {self.height}x{self.width}"
        )

    def at(self, size: str) -> "Shape":
        """The shape itself, or for a CPU an eighth of the channels and of the sides."""
        if size != "tiny":
            return self
        names = ("inputs", "outputs", "height", "width")
        return dataclasses.replace(self, **{name: getattr(self, name) // 8 for name in names})

    @property
    def padding(self) -> tuple[int, int, int]:
        return 0, self.kernel[1] // 2, self.kernel[2] // 2

    def cost(self, algorithm: str, dtype: torch.dtype) -> Cost:
        """Bytes of arguments and result; operations of the products that the algorithm makes."""
        taps = self.kernel[0] * self.kernel[1] * self.kernel[2]
        pixels = self.frames * self.height * self.width
        results = pixels * (4 if self.doubled else 1)
        weights = self.inputs * self.outputs
        elements = self.inputs * pixels + self.outputs * results + weights * taps
        if algorithm in ("folded", "phases"):
            taps = 4
        return Cost(elements * dtype.itemsize, 2 * weights * taps * results)

    def x(self, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        frames = self.frames + self.kernel[0] - 1
        shape = (1, self.inputs, frames, self.height, self.width)
        return _random(shape, seed, dtype, device)


# The convolutions of a decoder of 480x720, a chunk of 2 latent frames at a time.
SHAPES = (
    Shape(512, 512, 4, 60, 90),
    Shape(512, 256, 8, 120, 180),
    Shape(256, 256, 8, 240, 360),
    Shape(256, 128, 8, 480, 720),
    Shape(128, 128, 8, 480, 720),
    Shape(128, 128, 8, 480, 720, (3, 1, 1)),
    Shape(512, 512, 2, 60, 90, (1, 3, 3), doubled=True),
    Shape(256, 256, 4, 120, 180, (1, 3, 3), doubled=True),
    Shape(256, 256, 8, 240, 360, (1, 3, 3), doubled=True),
)
BY_NAME = {str(shape): shape for shape in SHAPES}
ALGORITHMS = {False: ("conv3d", "conv2d"), True: ("nearest", "folded", "phases")}


def _names(doubled: bool) -> list[tuple[str, str, str, bool]]:
    """(name of the entry, algorithm, layout, with a bias)."""
    return [
        (f"{algorithm}, {layout}{'' if bias else ', no bias'}", algorithm, layout, bias)
        for bias in (True, False)
        for algorithm in ALGORITHMS[doubled]
        for layout in LAYOUTS
    ]


def _random(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    random = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, dtype=dtype, device=device).normal_(generator=random)


def cases(options: Options) -> Iterator[Case]:
    for name in options.selects(list(BY_NAME)):
        yield _case(BY_NAME[name].at(options.size), name, options)


def _case(shape: Shape, name: str, options: Options) -> Case:
    dtype, device = options.dtype, options.device
    weight = _random((shape.outputs, shape.inputs, *shape.kernel), 0, dtype, device)
    weight /= weight[0].numel() ** 0.5
    bias = _random((shape.outputs,), 1, dtype, device)
    x = shape.x(0, dtype, device)
    biases = {True: bias, False: None}
    references = {some: _reference(shape, x, weight, b) for some, b in biases.items()}

    def entry(name: str, algorithm: str, layout: str, with_bias: bool) -> Entry:
        near = LAYOUTS[layout]
        function = _function(shape, algorithm, layout, weight, bias if with_bias else None)

        def check(which: str) -> list[Check]:
            reference = references[with_bias]
            with torch.no_grad():
                out = function(x.contiguous(memory_format=near))
            error = float((out - reference).abs().max() / reference.abs().max())
            return [Check(error <= MAY_ERR[dtype], error, f"off by {error:.2g}")]

        def calls(which: str, count: int) -> list[Call]:
            sets = (shape.x(seed, dtype, device) for seed in range(1, count + 1))
            return [without_grad(partial(function, s.contiguous(memory_format=near))) for s in sets]

        return Entry(name, check, calls, ("forward",), cost=shape.cost(algorithm, dtype))

    names = [x for x in _names(shape.doubled) if not options.providers or x[0] in options.providers]
    return Case(
        "conv",
        f"{name}, at an eighth" if options.size == "tiny" else name,
        [entry(*of) for of in names],
        ("forward",),
        "every element with the same convolution in fp32, or of fp32 in fp64",
        x.nbytes,
    )


def _reference(shape: Shape, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In fp32 of 16 bits, whose products it holds; of fp32 in fp64. As one convolution."""
    wide = torch.float64 if x.dtype is torch.float32 else torch.float32
    x, weight = x.to(wide), weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    x = F.interpolate(x, scale_factor=(1.0, 2.0, 2.0)) if shape.doubled else x
    with torch.backends.cudnn.flags(allow_tf32=False), torch.no_grad():
        return conv3d(x, weight, bias, shape.padding, algo="conv3d")


# --- the algorithms --------------------------------------------------------------------------


def _function(
    shape: Shape, algorithm: str, layout: str, weight: Tensor, bias: Tensor | None
) -> Function:
    """A function of x in that layout."""
    weight = weight.contiguous(memory_format=LAYOUTS[layout])
    if not shape.doubled:
        return partial(conv3d, weight=weight, bias=bias, padding=shape.padding, algo=algorithm)
    near = torch.channels_last if layout == "NDHWC" else torch.contiguous_format
    weight = weight[:, :, 0].contiguous(memory_format=near)
    # Once: they are weights.
    kernels = phase_weights(weight).contiguous(memory_format=near)
    apart = kernels.unflatten(0, (2, 2, -1))  # (row, column, out, in, 2, 2)

    def nearest(x: Tensor) -> Tensor:
        wide = F.interpolate(fold_frames(x).contiguous(memory_format=near), scale_factor=2.0)
        return unfold_frames(F.conv2d(wide, weight, bias, padding=1), 1)

    def at_once(x: Tensor) -> Tensor:
        small = pixel_phases(
            F.conv2d(fold_frames(x).contiguous(memory_format=near), kernels, padding=1)
        )
        count, channels, height, _, width, _ = small.shape  # (.., row, .., column)
        add = small.new_zeros(()) if bias is None else bias.view(-1, 1, 1, 1, 1)
        out = _empty((count, channels, 2 * height, 2 * width), small, near)
        torch.add(small, add, out=out.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)))
        return unfold_frames(out, 1)

    def each(x: Tensor) -> Tensor:
        small = fold_frames(x).contiguous(memory_format=near)
        count, _, height, width = small.shape
        out = _empty((count, len(weight), 2 * height, 2 * width), small, near)
        for row, column in itertools.product((0, 1), repeat=2):
            kernel = apart[row, column].contiguous(memory_format=near)
            phase = F.conv2d(small, kernel, bias, padding=1)
            out[..., row::2, column::2] = phase[..., row : row + height, column : column + width]
        return unfold_frames(out, 1)

    return {"nearest": nearest, "phases": at_once, "folded": each}[algorithm]


def _empty(shape: tuple[int, ...], like: Tensor, near: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=near)


def _entries() -> list[str]:
    return [name for doubled in (False, True) for name, *_ in _names(doubled)]


register(
    Benchmark(
        "conv", cases, _entries, lambda: list(BY_NAME), ("tiny", MODEL_SIZE),
        budget=0.2, group="conv",
    )
)  # fmt: skip

if __name__ == "__main__":
    from .__main__ import main

    sys.exit(main(group="conv"))
