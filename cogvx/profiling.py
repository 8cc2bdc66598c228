"""Named ranges of a generation, and traces of them by torch.profiler or for Nsight Systems."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from .files import atomic_path

NVTX = "nvtx"  # in place of a file: ranges for a profiler from outside
_NOTHING = nullcontext()


def annotate(name: str) -> AbstractContextManager[object]:
    """A range around a part of a generation, under torch.profiler or `emit_nvtx`; else nothing.

    The ops of cogvx_kernels have ranges there of torch's own, `cogvx::<op>`.
    """
    if torch.compiler.is_compiling() or not torch._C._autograd._profiler_enabled():
        return _NOTHING
    return torch.autograd.profiler.record_function(name)


@contextmanager
def profiled(target: Path | None) -> Iterator[None]:
    """Profile a block: a trace for Perfetto in the file `target`, or "nvtx", or None for neither.

    The file appears when the block has ended without an error.
    """
    if target is None:
        yield
    elif str(target) == NVTX:
        with torch.autograd.profiler.emit_nvtx():
            yield
    else:
        with torch.profiler.profile() as profiler:  # of the CPU, and of a GPU if there is one
            yield
        with atomic_path(target) as part:
            profiler.export_chrome_trace(str(part))
