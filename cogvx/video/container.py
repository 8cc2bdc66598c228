"""Open video files by PyAV, within limits; errors name the file."""

import errno
import math
import os
import re
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from numbers import Real
from types import ModuleType
from typing import Any, BinaryIO

PathLike = str | os.PathLike[str]

PIXEL_LIMIT = 1 << 26  # of one frame; 8K video has half
FRAME_LIMIT = 1 << 18  # two hours at 30 a second
BYTE_LIMIT = 1 << 36
RATES = 0.001, 1000  # frames a second

# FFmpeg's demuxers that may be used, and usual suffixes. Not playlists and scripts, which open
# other files.
FORMATS = {
    "mov,mp4,m4a,3gp,3g2,mj2": ".mp4 .mov .m4v .qt .3gp .3g2 .mj2 .f4v .avif .heic .heif",
    "matroska,webm": ".mkv .webm",
    "avi": ".avi .divx",
    "flv": ".flv",
    "mpeg": ".mpg .mpeg .vob",
    "mpegts": ".ts .mts .m2ts",
    "ogg": ".ogv .ogg",
    "asf": ".wmv .asf",
    "ivf": ".ivf",
    "yuv4mpegpipe": ".y4m",
    "gif": ".gif",
    "apng": ".apng",
}
PICTURE_FORMATS = {
    "png_pipe": ".png",
    "jpeg_pipe": ".jpg .jpeg",
    "bmp_pipe": ".bmp",
    "webp_pipe": ".webp",
    "tiff_pipe": ".tif .tiff",
}
PICTURE_SUFFIXES = tuple(" ".join(PICTURE_FORMATS.values()).split())
SUFFIXES = *" ".join(FORMATS.values()).split(), *PICTURE_SUFFIXES
# Streams without a container, hence without times: recognised for a precise error.
RAW_FORMATS = "h264,hevc,vvc,m4v,mpegvideo,h263,h261,vc1,obu,av1,mjpeg,dirac,cavsvideo"
# Opening a file, FFmpeg decodes frames to complete the header, without a limit of pixels. It may
# use only these decoders, which then parse headers and decode nothing.
PROBED = "h264,hevc,mpeg1video,mpeg2video,mpeg4,mjpeg,png"
OPTIONS = {
    "format_whitelist": ",".join([*FORMATS, *PICTURE_FORMATS, RAW_FORMATS]),
    "protocol_whitelist": "none",
    "codec_whitelist": PROBED,
}
BT709, BT601, LIMITED = 1, 5, 1  # as H.273 numbers them


class VideoError(ValueError):
    """Invalid video file; the message names it and the fault."""


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
    """Convert errors of FFmpeg and the system to VideoErrors that name the file."""
    try:
        yield
    except (pyav().FFmpegError, OSError) as error:
        raise VideoError(f"{path}: {what}: {error.strerror or error}") from error


@contextmanager
def opened(path: PathLike) -> Iterator[tuple[Any, Any]]:
    """Open a file: its container and the video stream that players show."""
    with named_errors(path, "cannot be read"):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise VideoError(f"{path}: must be a file; got a directory or a device")
        if not 0 < status.st_size <= BYTE_LIMIT:
            raise VideoError(f"{path}: must have 1 to {BYTE_LIMIT} bytes; got {status.st_size}")
        file = open(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb")
    with (
        named_errors(path, "is no video, or a truncated or damaged one"),
        file,
        _container(path, file) as container,
    ):
        _check_format(path, container, file)
        stream = _shown_stream(path, container)
        _check_pixels(path, stream.height or 0, stream.width or 0)
        check_count(path, stream.frames)
        stream.codec_context.options = {"max_pixels": str(PIXEL_LIMIT)}
        stream.thread_type = "AUTO"
        try:
            yield container, stream
        except pyav().FFmpegError as error:
            if not stream.height or not stream.width:  # not in the header, only in frames
                _check_pixels(path, *_size_in_logs(file))
            raise error


def _container(path: PathLike, file: BinaryIO) -> Any:
    # Without a name, so that FFmpeg never opens another file.
    # A photo with more images in it (a gain map, a depth map, MPF) looks like motion JPEG.
    photo = file.read(3) == b"\xff\xd8\xff" and b"MPF\0" in file.read(1 << 18)
    file.seek(0)
    try:
        return pyav().open(file, format="jpeg_pipe" if photo else None, options=OPTIONS)
    except pyav().FFmpegError as error:
        if error.errno != errno.EINVAL:
            raise
        raise VideoError(
            f"{path}: is no video of a format that is read ({' '.join(SUFFIXES)}), or a truncated "
            f"or damaged one. ffmpeg -i {quoted(path)} clip.mp4 converts many others"
        ) from error


def _check_format(path: PathLike, container: Any, file: BinaryIO) -> None:
    name = container.format.name
    if name in RAW_FORMATS.split(","):
        raise VideoError(
            f"{path}: is a stream without a container ({container.format.long_name}), whose frames "
            "have no times. Put it into one, at its frame rate: "
            f"ffmpeg -framerate 25 -i {quoted(path)} -c copy clip.mp4"
        )
    if name == "webp_pipe":
        position = file.tell()
        file.seek(12)
        header = file.read(9)
        file.seek(position)
        if header.startswith(b"VP8X") and header[8] & 2:
            raise VideoError(
                f"{path}: is an animated WebP, which FFmpeg does not decode. Save it as GIF, for "
                f"example: magick {quoted(path)} clip.gif"
            )


def _shown_stream(path: PathLike, container: Any) -> Any:
    """The stream that FFmpeg and players show; never a cover picture or a tile."""
    kinds = pyav().stream.Disposition
    streams = [s for s in container.streams.video if not s.disposition & kinds.attached_pic]
    if not streams:
        found = "a cover picture alone" if container.streams.video else "none"
        raise VideoError(f"{path}: must have a video stream; it has {found}")
    best = container.streams.best("video")
    if best not in streams:
        best = max(streams, key=lambda stream: bool(stream.disposition & kinds.default))
    tiles = [stream for stream in streams if stream.disposition & kinds.dependent]
    if tiles and not best.disposition & kinds.default:  # which a whole picture has
        raise VideoError(
            f"{path}: is a photo in {len(tiles)} tiles (HEIC or AVIF), which are not put "
            "together. Save it as JPEG or PNG"
        )
    if best.codec_context is None:
        raise VideoError(
            f"{path}: has a codec that this FFmpeg cannot decode. Convert it to H.264: "
            f"ffmpeg -i {quoted(path)} clip.mp4"
        )
    return best


def _check_pixels(path: PathLike, height: int, width: int) -> None:
    if height * width > PIXEL_LIMIT:
        raise VideoError(
            f"{path}: a frame must have at most {PIXEL_LIMIT:,} pixels; got {height}x{width}"
        )


def _size_in_logs(file: BinaryIO) -> tuple[int, int]:
    """Height and width for which a decoder rejects the first frame; 0, 0 otherwise.

    Parsed from FFmpeg's log, because PyAV does not expose a size beyond the limit.
    """
    logging = pyav().logging
    level = logging.get_level()
    file.seek(0)
    logging.set_level(logging.ERROR)
    try:
        with logging.Capture() as logs, pyav().open(file, options=OPTIONS) as container:
            stream = container.streams.best("video")
            stream.codec_context.options = {"max_pixels": str(PIXEL_LIMIT)}
            next(container.decode(stream), None)
    except pyav().FFmpegError:
        pass
    finally:
        logging.set_level(level)
    found = re.search(r"size (\d+)x(\d+) (?:exceeds|is invalid)", " ".join(log[2] for log in logs))
    return (int(found[2]), int(found[1])) if found else (0, 0)


def quoted(path: PathLike) -> str:
    """Quote a path for a shell."""
    return shlex.quote(os.fspath(path))


def check_count(path: PathLike, count: int) -> None:
    if count > FRAME_LIMIT:
        raise VideoError(f"{path}: must have at most {FRAME_LIMIT} frames; got {count}")


def check_fps(
    where: PathLike, fps: float, least: float = RATES[0], most: float = RATES[1]
) -> Fraction:
    """Convert a rate to a fraction. Raises VideoError unless it is in [least, most]."""
    if not isinstance(fps, Real) or not (math.isfinite(fps) and least <= fps <= most):
        raise VideoError(
            f"{where}: fps must be above 0 (at least {least:g}) and at most {most:g}; got {fps}"
        )
    return Fraction(fps).limit_denominator(1001)


def precise() -> Any:
    kinds = pyav().video.reformatter.Interpolation
    return kinds.BICUBIC | kinds.ACCURATE_RND | kinds.FULL_CHR_H_INT
