"""Read and write safetensors files, without memory-mapping.

Truncating a mapped file kills the process that uses it (SIGBUS), and overwriting it changes weights
in use; pread(2) avoids both.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import MIB, UNFINISHED, CheckpointError, atomic_path, open_regular, recognized
from ..validation import short_repr

HEADER_BYTES = 8 * MIB


class Entry(NamedTuple):
    """Header entry of a tensor; the dtype as in the format: F32, BF16, …"""

    dtype: str
    shape: tuple[int, ...]


class TensorFile:
    """Open safetensors file: the header is checked in full, tensors are read on request.

    `entries` are in the order of the file. Raises CheckpointError, naming the file, if it does not
    match its header exactly (truncated, too long, holes, overlaps) or is no safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with open_regular(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(512)
            if start[8:9] != b"{" and (came := recognized(start)):
                raise CheckpointError(
                    f"{self.path}: must be a safetensors file; got {came} ({size:,} bytes)"
                    + _next(came)
                )
            length = int.from_bytes(start[:8], "little")
            if length > min(size - 8, HEADER_BYTES):
                raise CheckpointError(
                    f"{self.path}: must begin with the length of its header, at most "
                    f"{min(max(size - 8, 0), HEADER_BYTES):,} in a file of {size:,} bytes; got "
                    f"{length:,}" + _ends(self.path)
                )
            try:
                self._file = safe_open(self.path, framework="pt", backend="pread")
                self.entries = {name: self._entry(name) for name in self._file.offset_keys()}
            except SafetensorError as error:
                file.seek(8)
                raise CheckpointError(
                    f"{self.path}: must be {_expected(file.read(length))}; got {size:,} bytes and "
                    f"{short_repr(str(error), 200)}{_ends(self.path)}"
                ) from error
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def _entry(self, name: str) -> Entry:
        part = self._file.get_slice(name)
        return Entry(part.get_dtype(), tuple(part.get_shape()))

    def read(self, name: str) -> Tensor:
        """Read a tensor to the CPU, aligned to 64 bytes as torch's (the library aligns to 16)."""
        try:
            return self._file.get_tensor(name).clone()
        except (SafetensorError, RuntimeError, TypeError) as error:  # a shape beyond torch's, say
            why = short_repr(str(error), 200)
            raise CheckpointError(
                f"{self.path}: {short_repr(name)} cannot be read: {why}"
            ) from error

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)


def _next(came: str) -> str:
    """Advice for a file of another kind."""
    if came.endswith("video"):
        return "; `cogvx encode` makes a file of latents from a video"
    if "pickle" in came:
        return "; it is not opened, because a pickle can run any code"
    return ""


def _ends(path: Path) -> str:
    return "; by its name, a download that is not finished" if path.suffix in UNFINISHED else ""


def _expected(header: bytes) -> str:
    """Expected size, for the error message only."""
    ends = re.findall(rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d{1,18})\s*\]', header)
    if not ends:
        return "safetensors"
    return f"{8 + len(header) + max(map(int, ends)):,} bytes of safetensors, by its header"


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read (tensors by name, metadata) of a safetensors file to the CPU.

    Raises CheckpointError for a damaged or other file.
    """
    with TensorFile(path) as file:
        return {name: file.read(name) for name in file.entries}, file.metadata


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a safetensors file atomically (see `atomic_path`).

    tensors: by name, of any device and strides.
    dtype: of floating tensors; by default unchanged.

    Raises TypeError for tensors that safetensors cannot hold, and ValueError for more names than
    `read_tensors` accepts.
    """
    with atomic_path(path) as part:
        fill(part, tensors, metadata, dtype)


def fill(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None,
    dtype: torch.dtype | None,
) -> None:
    """`write_tensors` to a path that is already temporary."""
    plain: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise TypeError(
                f"write_tensors: names must be text, not __metadata__; got {short_repr(name)}"
            )
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
            raise TypeError(
                f"write_tensors: {short_repr(name)} must be a dense tensor with data; got "
                f"{'one on meta' if isinstance(tensor, Tensor) else type(tensor).__name__}"
            )
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        held = tensor.detach().to("cpu", kind).contiguous().resolve_neg().resolve_conj()
        place = held.untyped_storage().data_ptr()
        plain[name] = held.clone() if place in seen else held  # the library rejects shared storage
        seen.add(place)
    try:
        save_file(plain, path, None if metadata is None else dict(metadata))
    except SafetensorError as error:  # a full disk
        raise OSError(f"write_tensors: {path} cannot be written: {error}") from error
    except (KeyError, TypeError) as error:
        raise TypeError(
            f"write_tensors: dtypes must be among those of safetensors, and metadata text by text; "
            f"got {short_repr(str(error), 200)}"
        ) from error
    with TensorFile(path):
        pass  # an unreadable file must not replace the old one
