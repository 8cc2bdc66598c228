"""Write tensors `(1, frames, 3, height, width)` in [-1, 1] to videos or sheets of frames."""

import math
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..extras import extra
from ..files import atomic_path, check_writable
from .container import (
    BT709,
    LIMITED,
    PIXEL_LIMIT,
    RATES,
    PathLike,
    VideoError,
    check_fps,
    named_errors,
    precise,
    pyav,
)

WRITTEN = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".gif": "gif"}
GIF_RATES = 0.01, 50  # delays are in 1/100 s, and viewers slow down a delay of 1
SIDE_LIMIT = 16384  # of x264
QUALITY = 15  # x264's crf: 0 is lossless, 18 looks so
GAP = 2  # pixels between the pictures of a sheet
MARGIN = 4  # pixels around its text


def check_video_output(
    path: PathLike,
    fps: float | None = None,
    height: int | None = None,
    width: int | None = None,
) -> None:
    """Raises the VideoError that `write_video` would raise, as far as known beforehand.

    Checks the suffix, that the folder exists and is writable, and, if given, fps (above 0 and at
    most 1000; of a GIF at most 50) and size in pixels. An existing file is no error: `write_video`
    replaces it.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in WRITTEN:
        raise VideoError(
            f"{path}: its name must end in one of {', '.join(WRITTEN)}; got {suffix or 'no suffix'}"
        )
    if fps is not None:
        _rate(path, fps)
    if height is not None and width is not None:
        _check_size(path, height, width)
    with named_errors(path, "cannot be written"):
        check_writable(path)


def write_video(
    path: PathLike, video: Tensor | Iterable[Tensor], fps: float, *, crf: int = QUALITY
) -> int:
    """Write a clip to `.mp4`, `.mov`, `.mkv` (H.264) or `.gif`; returns its number of frames.

    video: (1, frames, 3, height, width) in about [-1, 1], clamped; or an iterator of such chunks.
    crf: x264's quality; 0 is lossless but for colour conversion.

    The file is written atomically. Colours are BT.709, and tagged. Even sizes are yuv420p, which
    all players support, odd ones yuv444p. Raises VideoError, naming the frame, for NaN or infinity.
    """
    av = pyav()
    check_video_output(path, fps)
    format, rate = WRITTEN[Path(path).suffix.lower()], _rate(path, fps)
    stream = number = None
    with (
        named_errors(path, "cannot be written"),
        atomic_path(path) as temporary,
        av.open(os.fspath(temporary), "w", format=format) as container,
    ):
        for number, frame in enumerate(_frames(path, video)):
            height, width = frame.shape[1:]
            if stream is None:
                _check_size(path, height, width)
                stream = _start(container, format, rate, height, width, crf)
                prepare = _palette(height, width, rate) if format == "gif" else _to_yuv(stream)
            if (height, width) != (stream.height, stream.width):
                raise VideoError(
                    f"{path}: frame {number} must be {stream.height}x{stream.width}, as the first; "
                    f"got {height}x{width}"
                )
            picture = _to_picture(f"{path}: frame {number}", frame)
            picture.pts, picture.time_base = number, 1 / rate
            for ready in prepare(picture):
                container.mux(stream.encode(ready))
        if stream is None or number is None:
            raise VideoError(f"{path}: must have at least 1 frame; got none")
        for ready in prepare(None):
            container.mux(stream.encode(ready))
        container.mux(stream.encode(None))
    return number + 1


def write_contact_sheet(
    path: PathLike, video: Tensor, most: int = 12, caption: str | None = None
) -> None:
    """Write a PNG of up to `most` frames of a clip, evenly spaced, with the first and the last.

    A caption is drawn above, and the number of each frame below it; that needs Pillow, from the
    extra `video`.
    """
    chosen = _evenly(video.shape[1], most)
    frames = video[0, chosen]
    if caption is not None:
        numbers = [_label(f"frame {n}", video.shape[-1]) for n in chosen]
        frames = torch.cat([frames, torch.stack(numbers).to(frames)], 2)
    columns = math.ceil(math.sqrt(len(frames) * video.shape[-2] / video.shape[-1]))
    blank = frames.new_ones(-len(frames) % columns, *frames.shape[1:])
    sheet = _sheet(torch.cat([frames, blank]).unflatten(0, (-1, columns)))
    if caption is not None:
        width = sheet.shape[-1]
        lines = _wrapped(caption, width)
        sheet = torch.cat([*(_label(line, width).to(sheet) for line in lines), sheet], 1)
    _write_png(path, sheet)


def write_sheet(path: PathLike, rows: Tensor) -> None:
    """Write a PNG of pictures, (rows, columns, 3, height, width) in [-1, 1], with gray lines of
    `GAP` pixels between them."""
    _write_png(path, _sheet(rows))


def _sheet(rows: Tensor) -> Tensor:
    """(rows, columns, 3, height, width) -> (3, height, width), with gray lines between them."""
    spaced = F.pad(rows, (0, GAP, 0, GAP))
    return spaced.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)[:, :-GAP, :-GAP]


def _write_png(path: PathLike, sheet: Tensor) -> None:
    av = pyav()
    picture = _to_picture(os.fspath(path), sheet)
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt = picture.width, picture.height, "rgb24"
    codec.time_base = picture.time_base = Fraction(1)
    with atomic_path(path) as temporary:
        packets = [*codec.encode(picture), *codec.encode(None)]
        Path(temporary).write_bytes(b"".join(bytes(packet) for packet in packets))


def _evenly(count: int, most: int) -> list[int]:
    """Choose up to `most` of `count` frames: by a whole stride if that keeps half of them."""
    if count <= most:
        return list(range(count))
    for step in range(2, count):
        kept = (count - 1) // step + 1
        if (count - 1) % step == 0 and most // 2 <= kept <= most:
            return list(range(0, count, step))
    return torch.linspace(0, count - 1, most).round().long().tolist()


def _font(width: int) -> Any:
    """Pillow's default font, in a size for pictures of this width."""
    fonts = extra("PIL.ImageFont", "write_contact_sheet", "cogvx[video]")
    return fonts.load_default(size=20 if width >= 160 else 10)


def _wrapped(text: str, width: int) -> list[str]:
    """Wrap the text to the width of a picture."""
    font, available = _font(width), width - 2 * MARGIN
    for letters in range(max(1, len(text)), 0, -1):
        lines = textwrap.wrap(text, letters) or [""]
        if all(font.getlength(line) <= available for line in lines):
            break
    return lines


def _label(text: str, width: int) -> Tensor:
    """Draw a line of black text on white, (3, height, width) in [-1, 1]; cut to the width."""
    font = _font(width)
    height = sum(font.getmetrics()) + 2 * MARGIN
    line = extra("PIL.Image", "write_contact_sheet", "cogvx[video]").new("L", (width, height), 255)
    drawing = extra("PIL.ImageDraw", "write_contact_sheet", "cogvx[video]").Draw(line)
    drawing.text((MARGIN, MARGIN), text, fill=0, font=font)
    pixels = torch.frombuffer(bytearray(line.tobytes()), dtype=torch.uint8).view(height, width)
    return (pixels / 127.5 - 1).expand(3, -1, -1)


def _rate(path: PathLike, fps: float) -> Fraction:
    limits = GIF_RATES if Path(path).suffix.lower() == ".gif" else RATES
    return check_fps(path, fps, *limits)


def _check_size(path: PathLike, height: int, width: int) -> None:
    if not (1 <= height <= SIDE_LIMIT and 1 <= width <= SIDE_LIMIT) or height * width > PIXEL_LIMIT:
        raise VideoError(
            f"{path}: height and width must be 1 to {SIDE_LIMIT}, with at most {PIXEL_LIMIT:,} "
            f"pixels; got {height}x{width}"
        )


def _frames(path: PathLike, video: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    for chunk in [video] if isinstance(video, Tensor) else video:
        if chunk.dim() != 5 or chunk.shape[0] != 1 or chunk.shape[2] != 3:
            raise VideoError(
                f"{path}: video must be (1, frames, 3, height, width); got {tuple(chunk.shape)}"
            )
        yield from chunk[0]


def _to_picture(where: str, frame: Tensor) -> Any:
    """Convert (3, height, width) in [-1, 1] to an 8-bit picture, rounded."""
    if not frame.isfinite().all():
        raise VideoError(f"{where}: must be finite; got NaN or infinity")
    pixels = ((frame.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    picture = pyav().VideoFrame(frame.shape[2], frame.shape[1], "rgb24")
    rows = torch.frombuffer(picture.planes[0], dtype=torch.uint8).view(picture.height, -1)
    rows[:, : 3 * picture.width] = pixels.permute(1, 2, 0).flatten(1)
    return picture


def _start(container: Any, format: str, rate: Fraction, height: int, width: int, crf: int) -> Any:
    stream = container.add_stream("gif" if format == "gif" else "libx264", rate=rate)
    stream.height, stream.width = height, width
    if format == "gif":
        # The encoder's optimisation compares palette indices across different palettes.
        stream.pix_fmt, stream.options = "pal8", {"gifflags": "0"}
    else:
        stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        # With mb-tree x264 is not deterministic (libavcodec 62, frames of 64x64); without it, 250
        # files of three clips were three files.
        stream.options = {"crf": str(crf), "mbtree": "0"}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED
    return stream


def _to_yuv(stream: Any) -> Callable[[Any], list[Any]]:
    target = {"format": stream.pix_fmt, "dst_colorspace": BT709, "dst_color_range": LIMITED}
    target["interpolation"] = precise()
    return lambda picture: [picture.reformat(**target)] if picture else []


def _palette(height: int, width: int, rate: Fraction) -> Callable[[Any], list[Any]]:
    """Quantise each frame to its own 256 colours, in constant memory."""
    av = pyav()
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=1 / rate)
    split, sink = graph.add("split"), graph.add("buffersink")
    make, use = graph.add("palettegen", "stats_mode=single"), graph.add("paletteuse", "new=1")
    source.link_to(split)
    split.link_to(make, 0, 0)
    split.link_to(use, 1, 0)
    make.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()

    def push(picture: Any) -> list[Any]:
        graph.vpush(picture)
        ready = []
        with suppress(av.BlockingIOError, av.EOFError):
            while True:
                ready.append(graph.vpull())
        return ready

    return push
