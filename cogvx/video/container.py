"""What reading and writing share: PyAV, a file opened within limits, errors that name it."""

import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from numbers import Real
from types import ModuleType
from typing import Any

PathLike = str | os.PathLike[str]

PIXEL_LIMIT = 1 << 26  # of one frame; 8K video has half
FRAME_LIMIT = 1 << 18  # two hours at 30 a second
BYTE_LIMIT = 1 << 36
RATES = 0.001, 1000  # frames a second

# Files with frames in them. Not here: playlists and scripts, which name other files to open.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpeg,mpegts,ogg,asf,gif,gif_pipe,apng,"
    "png_pipe,jpeg_pipe,bmp_pipe,webp_pipe,tiff_pipe"
)
BT709, BT601, LIMITED = 1, 5, 1  # as H.273 numbers them


class VideoError(ValueError):
    """A file that is not what it should be; the message names it and says what is wrong."""


def pyav() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise VideoError(
            "video: PyAV must be installed to read and write files: pip install cogvx[video]"
        ) from error
    return av


@contextmanager
def named_errors(path: PathLike, what: str) -> Iterator[None]:
    """Errors of FFmpeg and of the system become VideoErrors that name the file."""
    try:
        yield
    except (pyav().FFmpegError, OSError) as error:
        raise VideoError(f"{path}: {what}: {error.strerror or error}") from error


@contextmanager
def opened(path: PathLike) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream, within the limits."""
    limit = {"max_pixels": str(PIXEL_LIMIT)}
    with named_errors(path, "cannot be read"):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise VideoError(f"{path}: must be a file; got a directory or a device")
        if not 0 < status.st_size <= BYTE_LIMIT:
            raise VideoError(f"{path}: must have 1 to {BYTE_LIMIT} bytes; got {status.st_size}")
        file = open(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb")
    # Without a name, so that FFmpeg goes by the bytes alone and never opens another file.
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    with (
        named_errors(path, "is no video, or a truncated or damaged one"),
        file,
        pyav().open(file, options=options, stream_options=[limit] * 16) as container,
    ):
        if not container.streams.video:
            raise VideoError(f"{path}: must have a video stream; it has none")
        stream = container.streams.video[0]
        height, width = stream.height or 0, stream.width or 0
        if not 0 < height * width <= PIXEL_LIMIT:
            came = f"{height}x{width}" if height * width else "no size, or one far beyond that"
            raise VideoError(f"{path}: a frame must have 1 to {PIXEL_LIMIT} pixels; got {came}")
        check_count(path, stream.frames)
        stream.codec_context.options = limit
        stream.thread_type = "AUTO"
        yield container, stream


def check_count(path: PathLike, count: int) -> None:
    if count > FRAME_LIMIT:
        raise VideoError(f"{path}: must have at most {FRAME_LIMIT} frames; got {count}")


def check_fps(
    where: PathLike, fps: float, least: float = RATES[0], most: float = RATES[1]
) -> Fraction:
    """The rate as a fraction. Raises VideoError unless it lies between `least` and `most`."""
    if not isinstance(fps, Real) or not (math.isfinite(fps) and least <= fps <= most):
        raise VideoError(
            f"{where}: fps must be above 0 (at least {least:g}) and at most {most:g}; got {fps}"
        )
    return Fraction(fps).limit_denominator(1001)


def precise() -> Any:
    kinds = pyav().video.reformatter.Interpolation
    return kinds.BICUBIC | kinds.ACCURATE_RND | kinds.FULL_CHR_H_INT
