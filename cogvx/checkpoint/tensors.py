"""Safetensors files, through the `safetensors` package, read and written without a memory map.

A mapped file that another process truncates kills this one (SIGBUS), and one that is written over
changes weights in use; what is read with pread(2) can do neither.
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

from ..files import (
    MIB,
    UNFINISHED,
    CheckpointError,
    atomic_path,
    open_regular,
    recognized,
    short_repr,
)

HEADER_BYTES = 8 * MIB


class Entry(NamedTuple):
    """A tensor as the header of its file describes it, in the format's words: F32, BF16, …"""

    dtype: str
    shape: tuple[int, ...]


class TensorFile:
    """One safetensors file, open: its header checked in full, its tensors read when asked for.

    `entries` are in the order of the file. Raises CheckpointError, naming the file, for every file
    that is not exactly what its header says: cut short, too long, with holes or overlaps, or no
    safetensors.
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
                    f"{self.path}: must be {_said(file.read(length))}; got {size:,} bytes and "
                    f"{short_repr(str(error), 200)}{_ends(self.path)}"
                ) from error
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def _entry(self, name: str) -> Entry:
        part = self._file.get_slice(name)
        return Entry(part.get_dtype(), tuple(part.get_shape()))

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own, on the CPU.

        It is copied once more, because the library aligns to 16 bytes and torch to 64: no kernel
        can tell it from one that torch made.
        """
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
    """What to do with a file that is something else."""
    if came.endswith("video"):
        return "; `cogvx encode` makes a file of latents from a video"
    if "pickle" in came:
        return "; it is not opened, because a pickle can run any code"
    return ""


def _ends(path: Path) -> str:
    return "; by its name, a download that is not finished" if path.suffix in UNFINISHED else ""


def _said(header: bytes) -> str:
    """What a file with this header must be; a look for the sake of a message, not the check."""
    ends = re.findall(rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d{1,18})\s*\]', header)
    if not ends:
        return "safetensors"
    return f"{8 + len(header) + max(map(int, ends)):,} bytes of safetensors, as its header says"


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, metadata) of one safetensors file, on the CPU.

    Raises CheckpointError for a file that is damaged or no safetensors file.
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
    """Writes one safetensors file, whole or not at all (see `atomic_path`).

    tensors: by name, of any device and strides; what is not contiguous on the CPU is copied there.
    dtype: what floating tensors are converted to; by default they stay what they are.

    Raises TypeError for what safetensors cannot hold, and ValueError for more names than
    `read_tensors` would take.
    """
    with atomic_path(path) as part:
        fill(part, tensors, metadata, dtype)


def fill(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None,
    dtype: torch.dtype | None,
) -> None:
    """`write_tensors` under a name that is temporary already."""
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
        plain[name] = held.clone() if place in seen else held  # the library takes no two of one
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
        pass  # what could not be read again replaces nothing
