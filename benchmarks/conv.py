"""`python -m benchmarks.conv`: torch's convolutions at the decoder's shapes, in every way there is.

A 3-D convolution as one and as planes (`cogvx_kernels.conv3d`), in both layouts, with and without a
bias; doubling a picture and convolving it, as it says, as four folded convolutions, and as one that
makes all four phases. Every result is compared before anything is timed; then all of a shape run in
turn, there and back. Exit status 1 if one is wrong, which gets no row.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvx_kernels import conv3d
from cogvx_kernels.resample import phase_weights, pixel_phases

from . import conditions, report
from .__main__ import DTYPES
from .timing import Times, matmul_rate, measure, sets_to_rotate

LAYOUTS = {"NCDHW": torch.contiguous_format, "NDHWC": torch.channels_last_3d}
# Of the largest of a result, what the largest error may be: in 16 bits roundings, of planes each
# one's and then their sum's; in fp32 the order of thousands of sums, as in `benchmarks.model`.
MAY_ERR = {torch.float32: 1e-5, torch.float16: 4 * 2**-10, torch.bfloat16: 4 * 2**-7}
LAPS = {"cuda": 2, "cpu": 6}

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A convolution of `frames` results; `kernel` over frames, rows and columns, which are padded.

    doubled: of pictures, which are doubled first; height and width are before that
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

    def smaller(self) -> "Case":
        """For a CPU: an eighth of the channels and of the sides."""
        inputs, outputs = self.inputs // 8, self.outputs // 8
        size = self.frames, self.height // 8, self.width // 8
        return Case(inputs, outputs, *size, self.kernel, self.doubled)

    def flops(self, way: str) -> int:
        taps = self.kernel[0] * self.kernel[1] * self.kernel[2]
        pixels = self.height * self.width * (4 if self.doubled else 1)
        if way in ("folded", "phases"):
            taps = 4
        return 2 * self.inputs * self.outputs * taps * self.frames * pixels

    def x(self, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        frames = self.frames + self.kernel[0] - 1
        random = torch.Generator(device).manual_seed(seed)
        shape = (1, self.inputs, frames, self.height, self.width)
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=random)


# What a decoder of 480x720 convolves, a chunk of 2 latent frames at a time.
CASES = (
    Case(512, 512, 4, 60, 90),
    Case(512, 256, 8, 120, 180),
    Case(256, 256, 8, 240, 360),
    Case(256, 128, 8, 480, 720),
    Case(128, 128, 8, 480, 720),
    Case(128, 128, 8, 480, 720, (3, 1, 1)),
    Case(512, 512, 2, 60, 90, (1, 3, 3), doubled=True),
    Case(256, 256, 4, 120, 180, (1, 3, 3), doubled=True),
    Case(256, 256, 8, 240, 360, (1, 3, 3), doubled=True),
)


@dataclass
class Row:
    """A way of a case. Numbers of its own are only given on a GPU; everywhere a ratio.

    tflop_per_s        of the products that this way makes
    percent_of_matmul  that over the rate of a large matrix product in the same run
    extra_mib          of the device's memory, at its most, beside arguments and result
    ratio              the first way's median over this one's: 2 is twice as fast
    relative_gap       the largest error over the largest value
    """

    case: str
    way: str
    layout: str
    bias: bool
    dtype: str
    device: str
    relative_gap: float
    ratio: float | None = None
    noise_percent: float | None = None
    median_ms: float | None = None
    tflop_per_s: float | None = None
    percent_of_matmul: float | None = None
    extra_mib: float | None = None

    def cells(self) -> dict[str, Any]:
        return asdict(self)


# --- the ways --------------------------------------------------------------------------------


def ways(case: Case, weight: Tensor, bias: Tensor) -> Iterator[tuple[str, str, bool, Function]]:
    """(way, layout, with a bias or not, function of x in that layout); first the plain one."""
    padding = (0, case.kernel[1] // 2, case.kernel[2] // 2)
    names = ("nearest", "folded", "phases") if case.doubled else ("conv3d", "conv2d")
    for with_bias, way, layout in itertools.product((True, False), names, LAYOUTS):
        b = bias if with_bias else None
        w = weight.contiguous(memory_format=LAYOUTS[layout])
        if case.doubled:
            yield way, layout, with_bias, partial(_doubled(way, layout, w[:, :, 0]), bias=b)
        else:
            yield (
                way,
                layout,
                with_bias,
                partial(conv3d, weight=w, bias=b, padding=padding, algo=way),
            )


def _doubled(way: str, layout: str, weight: Tensor) -> Callable[..., Tensor]:
    """Pictures of a video, doubled and convolved."""
    near = torch.channels_last if layout == "NDHWC" else torch.contiguous_format
    if way == "nearest":
        weight = weight.contiguous(memory_format=near)

        def nearest(x: Tensor, bias: Tensor | None) -> Tensor:
            wide = F.interpolate(_pictures(x, near), scale_factor=2.0)
            return _video(F.conv2d(wide, weight, bias, padding=1))

        return nearest
    # Once: they are weights.
    kernels = phase_weights(weight).contiguous(memory_format=near)
    if way == "phases":

        def at_once(x: Tensor, bias: Tensor | None) -> Tensor:
            whole = F.conv2d(_pictures(x, near), kernels, padding=1)
            small = pixel_phases(whole)  # (pictures, channels, height, row, width, column)
            bias = small.new_zeros(()) if bias is None else bias.view(-1, 1, 1, 1, 1)
            count, channels, height, _, width, _ = small.shape
            out = _empty((count, channels, 2 * height, 2 * width), small, near)
            torch.add(small, bias, out=out.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)))
            return _video(out)

        return at_once
    apart = kernels.unflatten(0, (2, 2, -1))  # (row, column, out, in, 2, 2)

    def each(x: Tensor, bias: Tensor | None) -> Tensor:
        small = _pictures(x, near)
        count, _, height, width = small.shape
        out = _empty((count, len(weight), 2 * height, 2 * width), small, near)
        for row, column in itertools.product((0, 1), repeat=2):
            kernel = apart[row, column].contiguous(memory_format=near)
            phase = F.conv2d(small, kernel, bias, padding=1)
            out[..., row::2, column::2] = phase[..., row : row + height, column : column + width]
        return _video(out)

    return each


def _pictures(x: Tensor, near: torch.memory_format) -> Tensor:
    """The frames of one sample; those of NCDHW are copied, as in diffusers."""
    return x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=near)


def _empty(shape: tuple[int, ...], like: Tensor, near: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=near)


def _video(x: Tensor) -> Tensor:
    return x.unsqueeze(0).transpose(1, 2)


# --- compared, timed -------------------------------------------------------------------------


def run(
    case: Case, dtype: torch.dtype, device: torch.device, budget: float
) -> tuple[list[Row], list[str]]:
    """A row for each way that is right, and what is to be said of the others."""
    random = torch.Generator(device).manual_seed(0)
    shape = (case.outputs, case.inputs, *case.kernel)
    weight = torch.empty(shape, dtype=dtype, device=device).normal_(generator=random)
    weight /= weight[0].numel() ** 0.5
    bias = torch.empty(case.outputs, dtype=dtype, device=device).normal_(generator=random)
    x = case.x(0, dtype, device)
    truths = {with_bias: _truth(case, x, weight, bias if with_bias else None)
              for with_bias in (True, False)}  # fmt: skip
    rows, functions, said = [], [], []
    for way, layout, with_bias, function in ways(case, weight, bias):
        name = f"{case}: {way}, {layout}, {'with' if with_bias else 'no'} bias"
        row = Row(
            str(case),
            way,
            layout,
            with_bias,
            str(dtype).removeprefix("torch."),
            device.type,
            relative_gap=0.0,
        )
        try:
            with torch.no_grad():
                row.extra_mib, out = _weighed(function, x.contiguous(memory_format=LAYOUTS[layout]))
        except torch.OutOfMemoryError:
            said.append(f"left out: {name}, out of memory")
            continue
        truth = truths[with_bias]
        row.relative_gap = float((out - truth).abs().max() / truth.abs().max())
        if not row.relative_gap <= MAY_ERR[dtype]:
            said.append(f"wrong, and not timed: {name}, off by {row.relative_gap:.2g}")
            continue
        rows.append(row)
        functions.append(function)
    del truths
    _time(case, rows, functions, dtype, device, budget)
    return rows, said


def _truth(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In fp32 of 16 bits, whose products it holds; of fp32 in fp64. As one convolution."""
    wide = torch.float64 if x.dtype is torch.float32 else torch.float32
    x, weight = x.to(wide), weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    x = F.interpolate(x, scale_factor=(1.0, 2.0, 2.0)) if case.doubled else x
    with torch.backends.cudnn.flags(allow_tf32=False), torch.no_grad():
        padding = (0, case.kernel[1] // 2, case.kernel[2] // 2)
        return conv3d(x, weight, bias, padding, algo="conv3d")


def _weighed(function: Function, x: Tensor) -> tuple[float | None, Tensor]:
    """MiB of a GPU's memory beside x and the result; and that."""
    if not x.is_cuda:
        return None, function(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = function(x)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - out.nbytes) / 2**20, out


def _time(
    case: Case,
    rows: Sequence[Row],
    functions: Sequence[Function],
    dtype: torch.dtype,
    device: torch.device,
    budget: float,
) -> None:
    """All by turns, there and back, into their rows; x is another one every time."""
    nsets = 1 if device.type == "cpu" else sets_to_rotate(case.x(0, dtype, device).nbytes, device)
    laps: list[list[Times]] = [[] for _ in rows]
    there = list(range(len(rows)))
    for index in [*there, *reversed(there)] * (LAPS[device.type] // 2):
        layout = LAYOUTS[rows[index].layout]
        calls = [
            partial(functions[index], case.x(seed, dtype, device).contiguous(memory_format=layout))
            for seed in range(1, nsets + 1)
        ]
        with torch.no_grad():
            laps[index].append(measure(calls, device, budget / LAPS[device.type]))
        del calls
    for row, mine in zip(rows, laps, strict=True):
        out, back = (sum(some[1:], some[0]).median for some in (mine[::2], mine[1::2]))
        median = sum(mine[1:], mine[0]).median
        row.ratio = sum(laps[0][1:], laps[0][0]).median / median
        row.noise_percent = 100 * abs(out / back - 1)
        if device.type == "cuda":
            row.median_ms = 1e3 * median
            row.tflop_per_s = case.flops(row.way) / median / 1e12
            ceiling = matmul_rate(device, dtype, 0.5)
            row.percent_of_matmul = 100e12 * row.tflop_per_s / ceiling


# --- as a program ----------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    torch.backends.cudnn.benchmark = arguments.cudnn_benchmark
    if device.type == "cpu":
        torch.set_num_threads(1)
    command = " ".join(["python -m benchmarks.conv", *(sys.argv[1:] if argv is None else argv)])
    found = conditions.conditions(device, command.partition(" --out")[0])
    rows: list[Row] = []
    said: list[str] = []
    for case in CASES if arguments.case is None else [CASES[i] for i in arguments.case]:
        case = case.smaller() if device.type == "cpu" else case
        more, words = run(case, dtype, device, arguments.budget)
        rows, said = rows + more, said + words
    found["sm_clock_mhz"] = conditions.clock(device)
    print(table(rows))
    for line in said:
        print(line)
    print(report.small_print(found))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        report.add_to_csv(arguments.out / "conv.csv", rows, found)
        report.write_json(arguments.out / "conv.json", rows, found, said=said)
    return 1 if any(line.startswith("wrong") for line in said) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conv", description=__doc__)
    add = parser.add_argument
    cases = ", ".join(f"{i}: {case}" for i, case in enumerate(CASES))
    add("--case", type=int, action="append", choices=range(len(CASES)), help=cases)
    add("--dtype", choices=DTYPES, help="default: bfloat16, on a CPU float32")
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    add("--budget", type=float, default=0.2, help="seconds for each way (%(default)s)")
    add("--cudnn-benchmark", action="store_true", help="let cuDNN try its algorithms first")
    add("--out", type=Path, metavar="DIR", help="write conv.json there, add to its conv.csv")
    return parser


_COLUMNS = {
    "ratio": ("ratio", "{:.2f}"),
    "noise_percent": ("noise %", "{:.1f}"),
    "median_ms": ("ms", "{:.4g}"),
    "tflop_per_s": ("TFLOP/s", "{:.0f}"),
    "percent_of_matmul": ("% matmul", "{:.0f}"),
    "extra_mib": ("MiB", "{:.0f}"),
    "relative_gap": ("gap", "{:.0e}"),
}


def table(rows: Sequence[Row]) -> str:
    """Rows under each other, by case; absent numbers as dots."""
    lines: list[str] = []
    for case, some in itertools.groupby(rows, lambda row: row.case):
        titles = "".join(f"{title:>10}" for title, _ in _COLUMNS.values())
        lines += ["", case, f"  {'way':<26}{titles}"]
        for row in some:
            cells = row.cells()
            numbers = (
                "·" if cells[name] is None else form.format(cells[name])
                for name, (_, form) in _COLUMNS.items()
            )
            way = f"{row.way}, {row.layout}{'' if row.bias else ', no bias'}"
            lines.append(f"  {way:<26}{''.join(f'{x:>10}' for x in numbers)}")
    return "\n".join(lines[1:])


if __name__ == "__main__":
    sys.exit(main())
