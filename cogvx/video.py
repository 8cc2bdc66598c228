"""A file to a tensor and back: `(batch, frames, channels, height, width)`, values in [-1, 1].

What a file has is made to fit what is wanted by four rules:

- size: the largest centred part that has the wanted shape is cut out, then resized with
  antialiasing. Rotation is undone first; pixels count as square;
- frame rate: at each wanted time the frame shown nearest to it (the earlier of two equally near),
  by the file's own time stamps, so that a variable rate needs no rule of its own;
- frames: without a count, the longest clip that the VAE's frame rule allows; with one, exactly so
  many from the start, or an error;
- colour: as the file is tagged; untagged is BT.709 from 720 lines up and BT.601 below, as players
  take it. Interlaced frames stay interlaced.

A file is refused from its header, before a frame is decoded, when it is beyond the limits below.
PyAV is an extra, reached for when a file is opened: `pip install cogvx[video]`.
"""

import bisect
import itertools
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import frames as frame_rule
from .config import VAEConfig
from .files import atomic_path

PathLike = str | os.PathLike[str]

PIXEL_LIMIT = 1 << 26  # of one frame; 8K video has half
FRAME_LIMIT = 1 << 18  # two hours at 30 a second
BYTE_LIMIT = 1 << 36
RATE_LIMIT = 1000

# Files with frames in them. Not here: playlists and scripts, which name other files to open.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpeg,mpegts,ogg,asf,gif,gif_pipe,apng,"
    "png_pipe,jpeg_pipe,bmp_pipe,webp_pipe,tiff_pipe"
)
BT709, BT601, LIMITED = 1, 5, 1  # as H.273 numbers them
WRITTEN = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".gif": "gif"}
QUALITY = 15  # x264's crf: 0 is lossless, 18 is said to look it


class VideoError(ValueError):
    """A file that is not what it should be; the message names it and says what is wrong."""


@dataclass(frozen=True)
class VideoInfo:
    """What is in a file, as it is shown: size after rotation; `fps` the average, `duration` in
    seconds; `rotation` in quarter turns, counter-clockwise."""

    frames: int
    height: int
    width: int
    fps: float
    duration: float
    rotation: int


@dataclass(frozen=True)
class Clip:
    """Frames of a file, chosen and sized, not yet read. `chosen` are their numbers in the file.

    `chunks` reads it front to back in constant memory, as often as it is called.
    """

    path: str
    chosen: tuple[int, ...]
    height: int
    width: int
    fps: float

    @property
    def frames(self) -> int:
        return len(self.chosen)

    def chunks(self, sizes: int | Sequence[int]) -> Iterator[Tensor]:
        """The clip in pieces `(1, frames, 3, height, width)`, fp32 in [-1, 1].

        sizes: frames of a piece (the last may be shorter), or of each (`frames.encode_plan`).
        Raises VideoError when the file ends before the clip does, or cannot be decoded.
        """
        if isinstance(sizes, int):
            sizes = [min(sizes, self.frames - n) for n in range(0, self.frames, sizes)]
        if sum(sizes) > self.frames:
            raise ValueError(f"Clip: sizes must add up to {self.frames} frames; got {sum(sizes)}")
        shown = self._shown()
        for size in sizes:
            yield torch.stack(list(itertools.islice(shown, size)))[None]

    def read(self) -> Tensor:
        """The whole clip as one tensor."""
        return next(self.chunks(self.frames))

    def _shown(self) -> Iterator[Tensor]:
        position = 0
        with _opened(self.path) as (container, stream):
            for number, picture in enumerate(container.decode(stream)):
                if number == self.chosen[position]:
                    frame = _to_tensor(self.path, picture, self.height, self.width)
                    while position < self.frames and self.chosen[position] == number:
                        yield frame
                        position += 1
                if position == self.frames:
                    return
        raise VideoError(
            f"{self.path}: must have frame {self.chosen[position]} of the {self.chosen[-1] + 1} "
            "that its header promises; the file ends before it, truncated or damaged"
        )


def probe(path: PathLike) -> VideoInfo:
    """What is in a video or image file: its packets are counted, only its first frame is decoded.

    Raises VideoError for what is missing, empty, truncated, without video or beyond the limits.
    """
    return _examine(path)[0]


def open_video(
    path: PathLike,
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
    multiple: int = 8,
    vae: VAEConfig = frame_rule.RELEASED,
) -> Clip:
    """Chooses frames and size, by the rules above; nothing is read yet.

    frames: how many, from the start; None for the longest clip that `vae` can take.
    height, width: in pixels; None for the file's own, brought down to a multiple of `multiple`
        (of one alone given, the other follows from the file's shape).
    fps: frames a second; None for the file's frames as they are.
    """
    info, times, tick = _examine(path)
    if fps is not None and not 0 < fps <= RATE_LIMIT:
        raise VideoError(f"{path}: fps must be above 0 and at most {RATE_LIMIT}; got {fps}")
    chosen = range(info.frames) if fps is None else _nearest(path, times, tick, fps, info)
    valid = [n for n in frame_rule.nearest_valid(len(chosen), vae) if n <= len(chosen)]
    wanted = max(valid, default=0) if frames is None else frames
    if not 1 <= wanted <= len(chosen):
        at = "" if fps is None else f" at {fps:g} a second"
        longest = f"; the VAE takes {frame_rule.rule(vae)}, at most {valid[-1]}" if valid else ""
        raise VideoError(
            f"{path}: must have at least {max(wanted, 1)} frames{at}; got {len(chosen)}{longest}"
        )
    height, width = _size(path, info, height, width, multiple)
    rate = info.fps if fps is None else float(fps)
    return Clip(os.fspath(path), tuple(chosen[:wanted]), height, width, rate)


def read_video(path: PathLike, **options: Any) -> Tensor:
    """`(1, frames, 3, height, width)` fp32 in [-1, 1]; options as of `open_video`."""
    return open_video(path, **options).read()


def stream_video(path: PathLike, chunk: int | Sequence[int], **options: Any) -> Iterator[Tensor]:
    """The same in pieces, in constant memory; options as of `open_video`, which knows the total."""
    return open_video(path, **options).chunks(chunk)


def read_image(path: PathLike, height: int | None = None, width: int | None = None) -> Tensor:
    """`(1, 3, height, width)` fp32 in [-1, 1]: a picture, or the first frame of a video."""
    return read_video(path, frames=1, height=height, width=width)[:, 0]


def write_video(
    path: PathLike, video: Tensor | Iterable[Tensor], fps: float, *, crf: int = QUALITY
) -> int:
    """Writes a clip and returns its number of frames: `.mp4`, `.mov`, `.mkv` (H.264) or `.gif`.

    video: (1, frames, 3, height, width) in about [-1, 1], clamped; or an iterator of such chunks,
        taken one at a time.
    crf: x264's; 0 loses nothing but what rounding to its colours does.

    The file appears under its name when all of it is written, and not at all otherwise. Colours are
    BT.709, tagged so. Even sizes are yuv420p, which everything plays; an odd one is yuv444p, which
    keeps it. Raises VideoError, naming the frame, for a value that is not finite.
    """
    av = _pyav()
    format = WRITTEN.get(Path(path).suffix.lower())
    if format is None:
        raise VideoError(f"{path}: its name must end in one of {', '.join(WRITTEN)}")
    if not 0 < fps <= RATE_LIMIT:
        raise VideoError(f"{path}: fps must be above 0 and at most {RATE_LIMIT}; got {fps}")
    rate = Fraction(fps).limit_denominator(1001)
    stream = number = None
    with (
        _named_errors(path, "cannot be written"),
        atomic_path(path) as temporary,
        av.open(os.fspath(temporary), "w", format=format) as container,
    ):
        for number, frame in enumerate(_frames(path, video)):
            height, width = frame.shape[1:]
            if stream is None:
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


def write_contact_sheet(path: PathLike, video: Tensor, most: int = 12) -> None:
    """A PNG of up to `most` frames of a clip, evenly spaced, row by row."""
    av = _pyav()
    frames = video[0, torch.linspace(0, video.shape[1] - 1, min(most, video.shape[1])).long()]
    columns = math.ceil(math.sqrt(len(frames) * video.shape[-2] / video.shape[-1]))
    blank = frames.new_ones(-len(frames) % columns, *frames.shape[1:])
    rows = torch.cat([frames, blank]).view(-1, columns, *frames.shape[1:])
    sheet = rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # (3, height, width)
    picture = _to_picture(os.fspath(path), sheet)
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt = picture.width, picture.height, "rgb24"
    codec.time_base = picture.time_base = Fraction(1)
    with atomic_path(path) as temporary:
        packets = [*codec.encode(picture), *codec.encode(None)]
        Path(temporary).write_bytes(b"".join(bytes(packet) for packet in packets))


class PSNR:
    """Peak signal to noise in dB over chunks, of videos in [-1, 1] (the peak is 2)."""

    def __init__(self) -> None:
        self.squared = 0.0
        self.count = 0

    def add(self, a: Tensor, b: Tensor) -> None:
        if a.shape != b.shape:
            raise ValueError(f"PSNR: shapes must be equal; got {tuple(a.shape)}, {tuple(b.shape)}")
        difference = a.clamp(-1, 1).double() - b.clamp(-1, 1).to(a.device).double()
        self.squared += float(difference.square().sum())
        self.count += a.numel()

    @property
    def decibels(self) -> float:
        """Infinite for equal videos."""
        return 10 * math.log10(4 * self.count / self.squared) if self.squared else math.inf


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise in dB of two videos in [-1, 1]; what is beyond is clamped, as shown."""
    measure = PSNR()
    measure.add(a, b)
    return measure.decibels


def _pyav() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise VideoError(
            "video: PyAV must be installed to read and write files: pip install cogvx[video]"
        ) from error
    return av


@contextmanager
def _named_errors(path: PathLike, what: str) -> Iterator[None]:
    """Errors of FFmpeg and of the system become VideoErrors that name the file."""
    try:
        yield
    except (_pyav().FFmpegError, OSError) as error:
        raise VideoError(f"{path}: {what}: {error.strerror or error}") from error


@contextmanager
def _opened(path: PathLike) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream, within the limits."""
    limit = {"max_pixels": str(PIXEL_LIMIT)}
    with _named_errors(path, "cannot be read"):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise VideoError(f"{path}: must be a file; got a directory or a device")
        if not 0 < status.st_size <= BYTE_LIMIT:
            raise VideoError(f"{path}: must have 1 to {BYTE_LIMIT} bytes; got {status.st_size}")
        file = open(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb")
    # Without a name, so that FFmpeg goes by the bytes alone and never opens another file.
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    with (
        _named_errors(path, "is no video, or a truncated or damaged one"),
        file,
        _pyav().open(file, options=options, stream_options=[limit] * 16) as container,
    ):
        if not container.streams.video:
            raise VideoError(f"{path}: must have a video stream; it has none")
        stream = container.streams.video[0]
        height, width = stream.height or 0, stream.width or 0
        if not 0 < height * width <= PIXEL_LIMIT:
            came = f"{height}x{width}" if height * width else "no size, or one far beyond that"
            raise VideoError(f"{path}: a frame must have 1 to {PIXEL_LIMIT} pixels; got {came}")
        _check_count(path, stream.frames)
        stream.codec_context.options = limit
        stream.thread_type = "AUTO"
        yield container, stream


def _check_count(path: PathLike, count: int) -> None:
    if count > FRAME_LIMIT:
        raise VideoError(f"{path}: must have at most {FRAME_LIMIT} frames; got {count}")


def _examine(path: PathLike) -> tuple[VideoInfo, Sequence[int], Fraction]:
    """What is in a file, and when each frame is shown: times in ticks, the ticks in seconds."""
    times: list[int | None] = []
    with _opened(path) as (container, stream):
        fps = Fraction(stream.average_rate or stream.guessed_rate or 0)
        tick = stream.time_base
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise VideoError(f"{path}: is truncated or damaged after frame {len(times)}")
            if packet.size and not packet.is_discard:
                times.append(packet.pts)
            _check_count(path, len(times))
    with _opened(path) as (container, stream):
        first = next(container.decode(stream), None)
    if first is None or not times:
        raise VideoError(f"{path}: must have at least 1 frame; it has none that can be decoded")
    stamped = sorted(time for time in times if time is not None)
    if len(stamped) == len(times) > 1 and stamped[0] < stamped[-1] and tick:
        span = (stamped[-1] - stamped[0]) * tick
        fps = fps or (len(times) - 1) / span
        duration = float(span + 1 / fps)
    else:
        fps = fps or Fraction(1)
        stamped, tick, duration = list(range(len(times))), 1 / fps, float(len(times) / fps)
    height, width, turns = _shape(first)
    info = VideoInfo(len(times), height, width, float(fps), duration, turns)
    return info, stamped, tick


def _shape(picture: Any) -> tuple[int, int, int]:
    """Height and width as shown, and the quarter turns counter-clockwise that show it upright."""
    turns = round(picture.rotation / 90) % 4
    height, width = picture.height, picture.width
    return (width, height, turns) if turns % 2 else (height, width, turns)


def _nearest(
    path: PathLike, times: Sequence[int], tick: Fraction, fps: float, info: VideoInfo
) -> Sequence[int]:
    """For each wanted time the frame shown nearest to it."""
    rate = Fraction(fps).limit_denominator(1001)
    count = max(1, math.floor(Fraction(info.duration).limit_denominator(10**6) * rate))
    _check_count(path, count)
    step = 1 / (rate * tick)
    middles = [(a + b - 2 * times[0]) * step.denominator for a, b in itertools.pairwise(times)]
    return [bisect.bisect_left(middles, 2 * k * step.numerator) for k in range(count)]


def _size(
    path: PathLike, info: VideoInfo, height: int | None, width: int | None, multiple: int
) -> tuple[int, int]:
    if height is None and width is not None:
        height = round(info.height * width / info.width / multiple) * multiple
    elif width is None and height is not None:
        width = round(info.width * height / info.height / multiple) * multiple
    height = info.height // multiple * multiple if height is None else height
    width = info.width // multiple * multiple if width is None else width
    if not (height > 0 and width > 0 and height * width <= PIXEL_LIMIT):
        raise VideoError(
            f"{path}: height and width must be at least {multiple}, with at most {PIXEL_LIMIT} "
            f"pixels; got {height}x{width} of a file of {info.height}x{info.width}"
        )
    return height, width


def _to_tensor(path: PathLike, picture: Any, height: int, width: int) -> Tensor:
    """(3, height, width), fp32 in [-1, 1]: upright, cut to shape, resized."""
    untagged = int(picture.colorspace) == 2
    rgb = picture.reformat(
        format="rgb24",
        src_colorspace=(BT709 if picture.height >= 720 else BT601) if untagged else None,
        interpolation=_precise(),
    )
    stored = torch.frombuffer(rgb.planes[0], dtype=torch.uint8).view(rgb.height, -1)
    shown_height, shown_width, turns = _shape(picture)
    pixels = stored[:, : 3 * rgb.width].reshape(rgb.height, rgb.width, 3)
    frame = pixels.permute(2, 0, 1).rot90(turns, (1, 2))
    scale = min(shown_height / height, shown_width / width)  # of the largest part of that shape
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (shown_height - rows) // 2, (shown_width - columns) // 2
    frame = frame[:, top : top + rows, left : left + columns].float() / 127.5 - 1
    if (rows, columns) == (height, width):
        return frame
    size = (height, width)
    sized: Tensor = F.interpolate(frame[None], size, mode="bilinear", antialias=True)
    return sized[0]


def _frames(path: PathLike, video: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    for chunk in [video] if isinstance(video, Tensor) else video:
        if chunk.dim() != 5 or chunk.shape[0] != 1 or chunk.shape[2] != 3:
            raise VideoError(
                f"{path}: video must be (1, frames, 3, height, width); got {tuple(chunk.shape)}"
            )
        yield from chunk[0]


def _to_picture(where: str, frame: Tensor) -> Any:
    """(3, height, width) in [-1, 1] -> a picture in whole numbers from 0 to 255, rounded."""
    if not frame.isfinite().all():
        raise VideoError(f"{where}: must be finite; got NaN or infinity")
    pixels = ((frame.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    picture = _pyav().VideoFrame(frame.shape[2], frame.shape[1], "rgb24")
    rows = torch.frombuffer(picture.planes[0], dtype=torch.uint8).view(picture.height, -1)
    rows[:, : 3 * picture.width] = pixels.permute(1, 2, 0).flatten(1)
    return picture


def _start(container: Any, format: str, rate: Fraction, height: int, width: int, crf: int) -> Any:
    stream = container.add_stream("gif" if format == "gif" else "libx264", rate=rate)
    stream.height, stream.width = height, width
    if format == "gif":
        # The encoder's own saving compares palette indices of frames whose palettes differ.
        stream.pix_fmt, stream.options = "pal8", {"gifflags": "0"}
    else:
        stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        # With mb-tree x264 writes other bytes now and then (libavcodec 62, frames of 64x64): off,
        # 250 files of three clips were three files.
        stream.options = {"crf": str(crf), "mbtree": "0"}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED
    return stream


def _to_yuv(stream: Any) -> Callable[[Any], list[Any]]:
    how = {"format": stream.pix_fmt, "dst_colorspace": BT709, "dst_color_range": LIMITED}
    how["interpolation"] = _precise()
    return lambda picture: [picture.reformat(**how)] if picture else []


def _palette(height: int, width: int, rate: Fraction) -> Callable[[Any], list[Any]]:
    """Gives each frame the 256 colours that suit it, in constant memory."""
    av = _pyav()
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


def _precise() -> Any:
    kinds = _pyav().video.reformatter.Interpolation
    return kinds.BICUBIC | kinds.ACCURATE_RND | kinds.FULL_CHR_H_INT
