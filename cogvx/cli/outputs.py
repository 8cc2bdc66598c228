"""Outputs of a command: checked and locked before any work."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl


@contextmanager
def output(path: Path, force: bool, suffixes: tuple[str, ...]) -> Iterator[None]:
    """Hold a file to be written (`claimed`), of one of the kinds, that must not exist unless
    `force`."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"--out must end in {' or '.join(suffixes)}; got {path}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"--out must be a file in a folder that exists; got {path}")
    with claimed(path):
        if path.exists() and not force:
            raise ValueError(f"{path}: exists already; --force replaces it")
        yield


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold an output for this process: a second command that wants it is refused at its start.

    The lock is that of a hidden file beside the output. The system releases it with the process,
    however that ends, and a file left by a killed process is taken over. Where the file system or
    the platform has no such locks, nothing is refused.

    Raises OSError if nothing can be written there, BlockingIOError if another process holds it.
    """
    path = path.absolute()
    lock = path.with_name(f".{path.name[:200]}.lock")
    try:
        handle = _locked(lock)
    except BlockingIOError as error:
        raise BlockingIOError(
            f"{path}: another command is writing it at this moment; wait, or choose another --out"
        ) from error
    except OSError as error:
        raise OSError(
            f"--out must be where a file can be written; got {path}: {error.strerror}"
        ) from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # before the lock is released, so that it is this one
        os.close(handle)


def _locked(path: Path) -> int:
    """A handle of the file, created if need be, that holds its lock."""
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
        os.close(handle)  # whoever held it has removed it meanwhile


if sys.platform != "win32":

    def _lock(handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass
