"""Check and lock the outputs of a command before any work."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl


@contextmanager
def output(
    path: Path, force: bool, suffixes: tuple[str, ...], option: str = "--out"
) -> Iterator[None]:
    """Lock a file to be written (`claimed`); check its suffix, and that it is new or `force`."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{option} must end in {' or '.join(suffixes)}; got {path}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{option} must be a file in a folder that exists; got {path}")
    with claimed(path, option):
        if path.exists() and not force:
            raise ValueError(f"{path}: exists already; --force replaces it")
        yield


@contextmanager
def claimed(path: Path, option: str = "--out") -> Iterator[None]:
    """Lock an output, so that a second command with the same output fails at its start.

    Locks a hidden file beside the output. The system releases the lock when the process ends, and
    the file of a killed process is reused. Without file locks on this platform or file system,
    nothing is locked.

    Raises OSError if nothing can be written there, BlockingIOError if another process holds it.
    """
    path = path.absolute()
    lock = path.with_name(f".{path.name[:200]}.lock")
    try:
        handle = _locked(lock)
    except BlockingIOError as error:
        raise BlockingIOError(
            f"{path}: another command is writing it at this moment; wait, or choose another "
            f"{option}"
        ) from error
    except OSError as error:
        raise OSError(
            f"{option} must be where a file can be written; got {path}: {error.strerror}"
        ) from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is still locked
        os.close(handle)


def _locked(path: Path) -> int:
    """Open and lock a file, created if needed; returns its handle."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if sys.platform != "win32":
                _lock(handle)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its previous owner has removed it meanwhile


if sys.platform != "win32":

    def _lock(handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass
