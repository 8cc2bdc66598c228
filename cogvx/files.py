"""Safe reading of untrusted files, and atomic writes.

Paths that lead out of a folder, pipes, devices and oversized JSON are rejected with a
`CheckpointError` before they are opened or parsed.
"""

import codecs
import contextlib
import glob
import itertools
import json
import math
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .validation import NUMBER_DIGITS, short_repr

if sys.platform != "win32":
    import fcntl

MIB = 1 << 20
CONFIG_BYTES = MIB
INDEX_BYTES = 8 * MIB  # the largest model that a config allows needs 4
JSON_ITEMS = 400_000  # so that no JSON takes more than 100 MB, parsed

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
UNFINISHED = (".part", ".incomplete", ".download", ".crdownload", ".aria2", ".tmp")

# Signatures of files that are often mistaken for others: (offset, bytes, description).
_SIGNATURES = (
    (
        0,
        b"version https://git-lfs.github.com/",
        "a git-lfs pointer, not the file that it stands for: run `git lfs pull` in its folder, or "
        "download the model with `hf download`",
    ),
    (0, b"PK\x03\x04", "a zip archive, such as torch.save makes (a pickle is in it)"),
    (0, b"\x80\x02", "a pickle, such as torch.save makes"),
    (0, b"\x80\x04", "a pickle"),
    (0, b"\x80\x05", "a pickle"),
    (0, b"\x1f\x8b", "gzip: unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (0, b"\xfd7zXZ\0", "xz: unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "zstd: unpack it first"),
    (257, b"ustar", "a tar archive: unpack it first"),
    (4, b"ftyp", "an MP4 or MOV video"),
    (0, b"\x1aE\xdf\xa3", "a WebM or Matroska video"),
    (8, b"AVI ", "an AVI video"),
    (8, b"WEBP", "a WebP image"),
    (0, b"GIF8", "a GIF image"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"GGUF", "a GGUF file, which is another format for weights"),
    (0, b"\x89HDF", "an HDF5 file, which is another format for weights"),
    (0, b"\x93NUMPY", "a NumPy array"),
)


class CheckpointError(ValueError):
    """Invalid folder or file; the message names it, what was expected and what was found."""


def recognized(start: bytes) -> str:
    """Describe the kind of a file by its first bytes; "" if it is unknown.

    start: at least its first 512 bytes, or all of them.
    """
    if not start:
        return "an empty file: download or save it again"
    for offset, signature, words in _SIGNATURES:
        if start.startswith(signature, offset):
            return words
    if not start.strip(b"\0"):
        return "zeros: a download or a copy that broke off"
    text = start[:512].lstrip(b"\xef\xbb\xbf \t\r\n")
    if re.match(rb"<(!doctype html|html|head|body|!--|\?xml)", text, re.IGNORECASE):
        return "a web page (HTML), not the file itself: download it again"
    if text[:200].isascii() and text[:200].decode("ascii").replace("\n", "").isprintable():
        line = text[:60].decode("ascii").split("\n")[0]
        return f"text, which begins {short_repr(line)}: an error of a server, perhaps"
    return ""


def member(folder: Path, name: object) -> Path:
    """Path of the regular file `name` in `folder`; nothing is opened.

    Raises CheckpointError unless it is the plain name of a regular file inside the folder: for a
    path, a pipe, a device, a folder, a link that leads out. (Links of a Hugging Face cache, from
    `snapshots` to the `blobs` of the model or of the cache, are allowed.)
    """
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name) or ".." in name:
        raise CheckpointError(
            f"{folder}: a file must go by a plain name, without folders; got {short_repr(name)}"
        )
    root = folder.resolve()
    try:
        real = (folder / name).resolve()
        mode = real.stat().st_mode
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: has no file {name}{unfinished(folder, name)}") from error
    except (OSError, RuntimeError) as error:  # a loop of links
        raise CheckpointError(f"{folder / name}: cannot be found: {error}") from error
    caches = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    # huggingface_hub 2 stores large files once for all models
    caches += [
        cache.parents[1] / "blobs" for cache in caches if cache.parent.name.startswith("models--")
    ]
    if not any(home == real.parent or home in real.parents for home in (root, *caches)):
        raise CheckpointError(
            f"{folder / name}: must lie in its folder; it is a link to {real}. Copy the file, or "
            "load the folder that it leads to"
        )
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{folder / name}: must be a regular file; got {_kind(mode)}")
    return folder / name


def unfinished(folder: Path, name: str = "") -> str:
    """Hint at an interrupted download, for the message about a missing file; else "".

    name: of the file; by default any.
    """
    with contextlib.suppress(OSError):
        left = [path.name for path in itertools.islice(folder.iterdir(), 1000)]
        left = sorted(file for file in left if file.endswith(UNFINISHED) and name in file)
        if left:
            return f"; {left[0]} is a download that is not finished"
    if any(parent.parent.match("models--*/snapshots") for parent in (folder, *folder.parents)):
        return "; the download to this cache is not complete: run it again, with a connection"
    return ""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; anything else is rejected before it can block."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path}: must be a regular file; got {_kind(mode)}")
        file = open(path, "rb", opener=_without_waiting)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: does not exist") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error}") from error
    except ValueError as error:  # a NUL in the name
        raise CheckpointError(f"{short_repr(str(path))}: must be a path; {error}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CheckpointError(f"{path}: must be a regular file; it changed while it was opened")
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((name for test, name in kinds.items() if test(mode)), "a device")


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """Read a JSON object from a file of at most `limit` bytes."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise CheckpointError(
            f"{path}: must be JSON of at most {limit:,} bytes; got {path.stat().st_size:,}"
        )
    return parse_json(data, str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object strictly.

    Raises CheckpointError for repeated keys, NaN and infinities, numbers of more than 24
    characters, too deep or too many items, and invalid UTF-8.
    """
    if sum(map(data.count, (b"{", b"[", b","))) > JSON_ITEMS:
        raise CheckpointError(f"{where}: must hold at most {JSON_ITEMS:,} items of JSON")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_repeats,
            parse_int=lambda digits: int(_short(digits)),
            parse_float=_finite,
            parse_constant=_finite,
        )
    except RecursionError as error:
        raise CheckpointError(f"{where}: must not nest so deeply") from error
    except ValueError as error:
        marked = data.startswith(codecs.BOM_UTF8)  # which transformers does not read either
        came = "a byte-order mark before it: save it as UTF-8 without" if marked else ""
        if not marked and data.lstrip()[:1] not in (b"{", b"["):
            came = recognized(data)
        why = f"got {came}" if came else error
        raise CheckpointError(f"{where}: must be JSON; {why}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: must hold a JSON object; got {short_repr(value)}")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {short_repr(key)} comes twice")
        found[key] = value
    return found


def _short(digits: str) -> str:
    if len(digits) > NUMBER_DIGITS:
        raise ValueError(f"a number of {len(digits):,} characters is too long")
    return digits


def _finite(digits: str) -> float:
    value = float(_short(digits))
    if not math.isfinite(value):
        raise ValueError(f"{digits} is not a finite number")
    return value


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Temporary path of the same name, in a new folder beside `path`, renamed to it on success.

    Readers see the old file or the whole new one, even if this process is killed. If the body
    raises, KeyboardInterrupt included, the temporary folder is removed. Those of killed processes
    are removed by the next call for `path`.

    Raises FileNotFoundError if the folder does not exist or the body writes no file,
    IsADirectoryError if `path` is a folder, and OSError, naming `path`, if the folder cannot be
    written.

    >>> with atomic_path("clip.mp4") as part:
    ...     encode(video, part)
    """
    path = Path(path)
    folder = _part_folder(path)
    try:
        with _held(folder):
            part = folder / path.name
            yield part
            os.chmod(part, 0o666 & ~_umask())
            sync(part)
            os.replace(part, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sync(path.parent)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise the OSError that `atomic_path(path)` would raise before its body runs.

    Creates and removes a temporary folder: permission bits do not show a read-only disk.
    """
    shutil.rmtree(_part_folder(Path(path)), ignore_errors=True)


def _part_folder(path: Path) -> Path:
    """Create a temporary folder beside `path`."""
    if path.is_dir():
        raise IsADirectoryError(f"atomic_path: path must name a file; got the folder {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"atomic_path: path must lie in a folder that exists; got {path}")
    prefix, suffix = f".{path.stem[:100]}.", f".part{path.suffix[:50]}"
    remove_abandoned(path.parent, f"{glob.escape(prefix)}*{glob.escape(suffix)}")
    try:
        return Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=path.parent))
    except OSError as error:  # it names the temporary folder
        reason = f"its folder cannot be written to ({error.strerror})"
        raise OSError(error.errno, reason, os.fspath(path)) from error


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Lock a folder, until the process ends at the latest; yields whether it is locked.

    False if another process holds the lock, or without file locks. Links are not followed.
    """
    if sys.platform == "win32":
        yield False
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(handle)


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Remove the temporary folders of `atomic_path` whose processes have ended."""
    for part in folder.glob(pattern):
        with contextlib.suppress(OSError), _held(part) as held:
            if held:
                shutil.rmtree(part)


def _umask() -> int:
    umask = os.umask(0o077)  # read by setting it; meanwhile other threads get a stricter one
    os.umask(umask)
    return umask


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    if sys.platform != "win32":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
