"""Seeded bugs of the frame cache: name, file, a text of it, what takes its place, tests.

Those in csrc/ need the extension built anew in the copy they are put into: `build`. It must pass
the tests there without a mutant, as everything must.
"""

import os
import subprocess
import sys
from pathlib import Path

# What a copy needs besides cogvx_kernels/ and tests/, to be built.
SOURCES = ("csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def build(copy: Path) -> None:
    """Compile the extension of a copy of the project, for the CPU: some 15 seconds."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=copy, check=True, capture_output=True, env={**os.environ, "COGVX_CUDA": "0"},
    )  # fmt: skip


CPU = "csrc/frame_cache_cpu.cpp"
DOOR = "csrc/frame_cache.cpp"
SCHEMAS = "csrc/ops.cpp"
KERNEL = "cogvx_kernels/frame_cache/kernel.py"
OP = "cogvx_kernels/frame_cache/op.py"
REFERENCE = "cogvx_kernels/frame_cache/reference.py"

FRAME_CACHE_MUTANTS = tuple(
    (name, file, old, new, "frame_cache")
    for file, name, old, new in (
        (CPU, "the newest cached frame first",
         "in_frame(append.cache, t)\n", "in_frame(append.cache, append.kept - 1 - t)\n"),
        (CPU, "the cache not updated", "t >= append.arriving && moves", "moves && false"),
        (CPU, "the cache one frame late",
         "in_frame(append.cache, t - append.arriving), t)",
         "in_frame(append.cache, t - append.arriving), t - (t > append.kept))"),
        (CPU, "a cached frame overwritten before it is read",
         "for (int64_t step = 0; step < append.steps(); ++step)",
         "for (int64_t step = append.steps() - 1; step >= 0; --step)"),
        (CPU, "copies of the last frame", "std::max<int64_t>(0, t - append.kept)",
         "(t < append.kept ? append.arriving - 1 : t - append.kept)"),
        (CPU, "the cache read where a clip begins with copies",
         "t < append.kept && append.past == Past::kCache;", "t < append.kept;"),
        (CPU, "zeros before the clip not written",
         "      zero(to, tile.extent, append.element_size);\n", ""),
        (CPU, "zeros in the first frame of the border alone",
         "t < append.joining; ++t", "t < 1; ++t"),
        (CPU, "offsets of columns in 32 bits", "int64_t offset = 0;", "int32_t offset = 0;"),
        (CPU, "offsets of frames in 32 bits",
         "view.data + t * view.frame_stride * append.element_size",
         "view.data + static_cast<int32_t>(t * view.frame_stride) * append.element_size"),
        (CPU, "halves of a square of vectors exchanged",
         "(kHalf * (kLanes / 2)", "((1 - kHalf) * (kLanes / 2)"),
        (CPU, "rows left over by the squares not copied",
         "  copy_each<T>(to, from, rows, extent.rows, 0, extent.run);\n", ""),
        (CPU, "elements left over by the squares not copied",
         "  copy_each<T>(to, from, 0, rows, run, extent.run);\n", ""),
        (CPU, "the tile after the first in place of it",
         "first[kInner] *= tiles.extent.run;", "first[kInner] *= tiles.extent.run - 1;"),
        (DOOR, "the border not zeroed", "describe_borders(append, *joined, padding);", ""),
        (DOOR, "the border on the right a col too far left",
         "{padding, width - padding,", "{padding, width - padding - 1,"),
        (DOOR, "the middle a col off", "padding * (padded.stride(kRow) + padded.stride(kCol))",
         "padding * padded.stride(kRow)"),
        (DOOR, "an exchange that moves the chunk too",
         "append.kept + (in_place ? 0 : append.arriving)", "append.kept + append.arriving"),
        (DOOR, "frames of a push stepped over that count",
         "std::max<int64_t>(0, append.arriving - append.joining);",
         "std::max<int64_t>(0, append.arriving - append.joining) + (append.joining == 0);"),
        (DOOR, "frames in the cache's memory read too late",
         "could_touch(cache, frames) ? torch::stable::clone(frames) : frames", "frames"),
        (DOOR, "dimensions merged across a gap",
         "part.tensor->stride(dim) == part.strides[at] * sizes[at]",
         "part.tensor->stride(dim) >= part.strides[at] * sizes[at]"),
        (DOOR, "two that overlap both written to", "!could_touch(cache, joined)", "true"),
        (DOOR, "channels last in another order",
         "kChannelsLast[] = {kBatch, kFrame, kRow, kCol,",
         "kChannelsLast[] = {kBatch, kFrame, kCol, kRow,"),
        (SCHEMAS, "joined written to in secret", "Tensor(b!) joined", "Tensor joined"),
        (KERNEL, "autograd not told", "    torch.autograd.graph.increment_version(tensors)",
         "    pass"),
        (KERNEL, "autograd told of one of two", "_written(cache, joined)", "_written(cache)"),
        (KERNEL, "the functional form in place",
         "following = _new_cache(cache, frames, kept, channels_last)\n    if",
         "following = _new_cache(cache, frames, kept, channels_last) if cache is None else cache\n"
         "    if"),
        (KERNEL, "a fake without its border", "height + 2 * padding, width + 2 * padding",
         "height, width"),
        (KERNEL, "a fake that is contiguous", "    if channels_last:\n", "    if False:\n"),
        (OP, "the next cache's gradient forgotten",
         "djoined[:, :, arriving:] + dfollowing]", "djoined[:, :, arriving:]]"),
        (OP, "the copies' gradient forgotten",
         "dframes[:, :, :1] + dcache.sum(2, keepdim=True)", "dframes[:, :, :1]"),
        (OP, "gradients cut in silence", "if x.requires_grad and torch.is_grad_enabled():",
         "if False:"),
        (OP, "the reference's cache not updated", "    cache.copy_(following)\n    joined = F.pad",
         "    joined = F.pad"),
        (REFERENCE, "copies of the reference's last frame", "past = frames[:, :, :1]",
         "past = frames[:, :, -1:]"),
    )
)  # fmt: skip
