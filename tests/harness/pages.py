"""Guard pages: memory mapped without access. Linux."""

import ctypes
import mmap
import os

PAGE = mmap.PAGESIZE

# Python names the flag from 3.13 on; the number is that of Linux on x86-64 and arm64.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_PROT_NONE = 0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def map_pages(size: int) -> mmap.mmap:
    """Map `size` bytes of zeros, which take no memory until they are touched.

    They are unmapped with the last reference; a tensor from `torch.frombuffer` holds one. Raises
    OSError if the system refuses.
    """
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)


def forbid(pages: mmap.mmap, start: int, size: int) -> None:
    """Make a load or store in these pages end the process with SIGSEGV."""
    first = ctypes.c_char.from_buffer(pages, start)
    if _libc.mprotect(ctypes.addressof(first), size, _PROT_NONE) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"mprotect: {os.strerror(error)}")
