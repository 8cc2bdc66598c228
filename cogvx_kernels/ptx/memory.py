"""Global memory of a launch: copies of its tensors, each at an address of its own, all checked.

A storage is in the middle of a region of 2**36 bytes, so that a wrong offset meets nothing. Its
address equals the real one modulo 256, so that the alignment that Triton specialised on stays true.
A region knows the spans of the launch's tensors in it: what lies in the storage but in no tensor is
out of bounds.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .values import Array

REGION_BITS = 36
PAD = 256
VIEWS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "V16"}


@dataclass
class Region:
    """A storage: `address` of its first byte, `place` of its copy, `spans` of tensors in bytes."""

    name: str
    storage: Any  # None if nothing is behind the addresses
    address: int
    size: int
    place: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)


def extent(x: Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor spans: the first, and past the last."""
    if x.numel() == 0:
        return 0, 0
    first = x.storage_offset() * x.element_size()
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return int(first), int(first + (last + 1) * x.element_size())


class Memory:
    """Memory behind named tensors; `dry`: nothing behind it (tensors may be meta)."""

    def __init__(self, tensors: list[tuple[str, Tensor]], dry: bool = False) -> None:
        self.dry = dry
        self.regions: list[Region] = []
        self.addresses: dict[str, int] = {}
        self.loaded: set[int] = set()  # regions, by the number in their addresses
        self.stored: set[int] = set()
        by_storage: dict[int, Region] = {}
        total = PAD
        for name, x in tensors:
            storage = x.untyped_storage()
            region = by_storage.get(storage._cdata)
            if region is None:
                pointer = 0 if x.is_meta else storage.data_ptr()
                address = (2 * len(self.regions) + 3 << REGION_BITS - 1) + pointer % PAD
                region = Region(name, None if dry else storage, address, storage.nbytes())
                if not dry:
                    region.place = total + pointer % PAD
                    total += -(-(region.size + 2 * PAD) // PAD) * PAD
                by_storage[storage._cdata] = region
                self.regions.append(region)
            span = extent(x)
            self.addresses[name] = region.address + span[0]
            region.spans.append(span)
        self.bytes = _aligned(total)
        for region in self.regions:
            region.spans = _joined(region.spans)
            if region.storage is not None and region.size:
                self.bytes[region.place : region.place + region.size] = _bytes(region.storage)
        self.views = {width: self.bytes.view(kind) for width, kind in VIEWS.items()}
        # Of each 2 bytes: the CTA of this launch that wrote it, and read it (0 none, -1 several).
        self.writer = np.zeros(total // 2 + PAD, np.int32)
        self.reader = np.zeros(total // 2 + PAD, np.int32)

    @property
    def footprint(self) -> int:
        """Bytes that the tensors span, twice if they were both loaded and stored.

        Once if the CTAs that ran touched them not at all: others may.
        """
        return sum(
            (last - first) * (2 if number in self.loaded & self.stored else 1)
            for number, region in enumerate(self.regions, 1)
            for first, last in region.spans
        )

    def note(self, a: Array, numbers: set[int]) -> None:
        """Add to `loaded` or `stored` the regions of valid addresses."""
        low, high = int(a.min()) >> REGION_BITS, int(a.max()) >> REGION_BITS
        numbers.update((low,) if low == high else np.unique(a >> np.uint64(REGION_BITS)).tolist())

    def write_back(self) -> None:
        """Copy all bytes to the tensors."""
        for region in self.regions:
            if region.storage is not None and region.size:
                copy = self.bytes[region.place : region.place + region.size]
                _bytes(region.storage)[:] = copy

    def locate(self, a: Array, width: int, align: int = 0) -> tuple[Array | None, str | None]:
        """Places of addresses in `bytes` (None if dry), or the fault of an access to them."""
        low, high = int(a.min()), int(a.max())
        align = align or width
        if (a & np.uint64(align - 1)).any():
            bad = int(a[(a & np.uint64(align - 1)) != 0].flat[0])
            return None, f"misaligned: {self.describe(bad)} is no multiple of {align} bytes"
        number = low >> REGION_BITS
        if number == high >> REGION_BITS and 0 < number <= len(self.regions):
            region = self.regions[number - 1]
            first, last = low - region.address, high + width - region.address
            if any(s <= first and last <= e for s, e in region.spans):
                return (None if self.dry else a - np.uint64(region.address - region.place)), None
        where = np.empty(a.shape, np.uint64)
        for number in (int(n) for n in np.unique(a >> np.uint64(REGION_BITS))):
            at = (a >> np.uint64(REGION_BITS)) == number
            if not 0 < number <= len(self.regions):
                return None, f"out of bounds: {int(a[at].flat[0]):#x} is in no tensor"
            region = self.regions[number - 1]
            offset = a[at].astype(np.int64) - region.address
            inside = np.zeros(offset.shape, bool)
            for first, last in region.spans:
                inside |= (offset >= first) & (offset + width <= last)
            if not inside.all():
                bad, count = int(a[at][~inside].flat[0]), int((~inside).sum())
                return None, f"out of bounds: {self.describe(bad)}, {width} bytes, {count} lanes"
            where[at] = (offset + region.place).astype(np.uint64)
        return (None if self.dry else where), None

    def describe(self, address: int) -> str:
        number = address >> REGION_BITS
        if not 0 < number <= len(self.regions):
            return f"{address:#x}"
        region = self.regions[number - 1]
        spans = ", ".join(f"[{s}, {e})" for s, e in region.spans)
        return f"byte {address - region.address} of {region.name} (spans {spans} of {region.size})"


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in order, those that touch made one."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        else:
            joined.append((first, last))
    return joined


def _bytes(storage: Any) -> Array:
    array: Array = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    return array


def _aligned(size: int) -> Array:
    raw = np.zeros(size + PAD, np.uint8)
    skip = -raw.ctypes.data % PAD
    return raw[skip : skip + size]
