"""Seeded bugs of the frame cache: (name, file, old, new, tests), as `tests.mutants.Mutant`.

Those in csrc/ need the extension rebuilt in the mutated copy: `build`.
"""

import os
import subprocess
import sys
from pathlib import Path

# Needed in a copy, besides cogvx_kernels/ and tests/, to build it.
SOURCES = ("csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def build(copy: Path) -> None:
    """Compile the extension of a copy of the project, for the CPU: about 15 seconds."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=copy, check=True, capture_output=True, env={**os.environ, "COGVX_CUDA": "0"},
    )  # fmt: skip


CPU = "csrc/frame_cache_cpu.cpp"
ENTRY = "csrc/frame_cache.cpp"
SCHEMAS = "csrc/ops.cpp"
KERNEL = "cogvx_kernels/frame_cache/kernel.py"
OP = "cogvx_kernels/frame_cache/op.py"
REFERENCE = "cogvx_kernels/frame_cache/reference.py"

FRAME_CACHE_MUTANTS = tuple(
    (name, file, old, new, "frame_cache")
    for file, name, old, new in (
        (CPU, "cached frames in reverse order",
         "in_frame(append.cache, t)\n", "in_frame(append.cache, append.cache_len - 1 - t)\n"),
        (CPU, "the cache not updated", "t >= append.chunk_len && moves", "moves && false"),
        (CPU, "the cache one frame late",
         "in_frame(append.cache, t - append.chunk_len), t)",
         "in_frame(append.cache, t - append.chunk_len), t - (t > append.cache_len))"),
        (CPU, "a cached frame overwritten before it is read",
         "t = append.skipped; t < append.cache_len + append.chunk_len; ++t)",
         "t = append.cache_len + append.chunk_len - 1; t >= append.skipped; --t)"),
        (CPU, "copies of the last frame", "std::max<int64_t>(0, t - append.cache_len)",
         "(t < append.cache_len ? append.chunk_len - 1 : t - append.cache_len)"),
        (CPU, "the cache read at the start of a clip",
         "t < append.cache_len && append.past == Past::kCache;", "t < append.cache_len;"),
        (CPU, "zeros before the clip not written",
         "      zero(to, tile.extent, append.element_size);\n", ""),
        (CPU, "zeros in the first frame of the border only",
         "t < append.joined_len; ++t", "t < 1; ++t"),
        (CPU, "offsets of columns in 32 bits", "int64_t offset = 0;", "int32_t offset = 0;"),
        (CPU, "offsets of frames in 32 bits",
         "view.data + t * view.frame_stride * append.element_size",
         "view.data + static_cast<int32_t>(t * view.frame_stride) * append.element_size"),
        (CPU, "halves of a square of vectors swapped",
         "(kHalf * (kLanes / 2)", "((1 - kHalf) * (kLanes / 2)"),
        (CPU, "remaining rows not copied",
         "  copy_each<T>(to, from, rows, extent.rows, 0, extent.run);\n", ""),
        (CPU, "remaining elements not copied",
         "  copy_each<T>(to, from, 0, rows, run, extent.run);\n", ""),
        (CPU, "tiles that overlap by one element",
         "first[kInner] *= tiles.extent.run;", "first[kInner] *= tiles.extent.run - 1;"),
        (ENTRY, "the border not zeroed", "describe_borders(append, *joined, padding);", ""),
        (ENTRY, "the right border one column too far left",
         "{padding, width - padding,", "{padding, width - padding - 1,"),
        (ENTRY, "the interior one column off",
         "padding * (padded.stride(kRow) + padded.stride(kCol))",
         "padding * padded.stride(kRow)"),
        (ENTRY, "frames of a push skipped that are needed",
         "nullptr ? append.chunk_len : 0;", "nullptr ? append.chunk_len + 1 : 0;"),
        (ENTRY, "frames in the cache's memory read too late",
         "may_overlap ? torch::stable::clone(frames) : frames", "frames"),
        (ENTRY, "dimensions merged across a gap",
         "part.tensor->stride(dim) == part.strides[at] * sizes[at]",
         "part.tensor->stride(dim) >= part.strides[at] * sizes[at]"),
        (ENTRY, "columns before rows in channels-last",
         "kChannelsLast[] = {kBatch, kFrame, kRow, kCol,",
         "kChannelsLast[] = {kBatch, kFrame, kCol, kRow,"),
        (SCHEMAS, "the cache of a push not declared as mutated",
         "frame_cache_push(Tensor(a!) cache", "frame_cache_push(Tensor cache"),
        (KERNEL, "version counters not increased",
         "    torch.autograd.graph.increment_version(cache)",
         "    pass"),
        (KERNEL, "the functional form in place",
         "next_cache = _new_cache(cache, frames, cache_len, channels_last)\n    if",
         "next_cache = _new_cache(cache, frames, cache_len, channels_last) if cache is None else "
         "cache\n    if"),
        (KERNEL, "a fake without its border", "height + 2 * padding, width + 2 * padding",
         "height, width"),
        (KERNEL, "a fake that is contiguous", "    if channels_last:\n", "    if False:\n"),
        (OP, "the next cache's gradient forgotten",
         "djoined[:, :, chunk_len:] + dnext]", "djoined[:, :, chunk_len:]]"),
        (OP, "the copies' gradient forgotten",
         "dframes[:, :, :1] + dcache.sum(2, keepdim=True)", "dframes[:, :, :1]"),
        (OP, "gradients dropped silently", "if x.requires_grad and torch.is_grad_enabled():",
         "if False:"),
        (OP, "the reference's cache not updated", "    cache.copy_(next_cache)\n    joined = F.pad",
         "    joined = F.pad"),
        (REFERENCE, "copies of the reference's last frame", "past = frames[:, :, :1]",
         "past = frames[:, :, -1:]"),
    )
)  # fmt: skip
