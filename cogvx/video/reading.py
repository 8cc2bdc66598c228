"""A file to a tensor `(batch, frames, channels, height, width)`, values in [-1, 1].

What is read, by content and not by suffix: MP4, MOV, M4V, 3GP, MJ2, MKV, WebM, AVI, FLV, MPEG-PS
and -TS, Ogg, WMV/ASF, IVF, Y4M, GIF, APNG; of pictures PNG, JPEG, BMP, WebP, TIFF, AVIF and HEIC
(`SUFFIXES`). Refused, with what to do: streams without a container (.h264, .hevc, .m2v, .obu: their
frames have no times), animated WebP, photos in tiles (as phones write HEIC).

What a file has is made to fit what is wanted by these rules:

- stream: of several video streams the one that players show (FFmpeg's best); a cover picture never;
- orientation: as players show it: display matrices and EXIF orientations that mirror or turn by
  quarter turns, in all eight combinations. Other angles and shears are refused;
- size: the largest centred part that has the wanted shape is cut out, then resized with
  antialiasing. Pixels count as square;
- frame rate: at each wanted time the frame shown nearest to it (the earlier of two equally near),
  by the file's own time stamps, so that a variable rate needs no rule of its own;
- frames: without a count, the longest clip that the VAE's frame rule allows; with one, exactly so
  many from the start, or an error. The start is the first frame that can be decoded: a recording
  that begins in the middle of a group of pictures has frames before it that cannot;
- colour: as the file is tagged; untagged is BT.709 from 720 lines up and BT.601 below, as players
  take it. Interlaced frames stay interlaced.
"""

import bisect
import itertools
import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import frames as frame_rule
from ..config import VAEConfig
from .container import (
    BT601,
    BT709,
    PIXEL_LIMIT,
    PathLike,
    VideoError,
    check_count,
    check_fps,
    opened,
    precise,
    pyav,
    quoted,
)


@dataclass(frozen=True)
class VideoInfo:
    """What is in a file, as it is shown: size after rotation; `fps` the average, `duration` in
    seconds. The stored picture is mirrored left to right if `mirrored`, then turned by `rotation`
    quarter turns counter-clockwise, to be shown."""

    frames: int
    height: int
    width: int
    fps: float
    duration: float
    rotation: int
    mirrored: bool = False


@dataclass(frozen=True)
class Clip:
    """Frames of a file, chosen and sized, not yet read. `chosen` are their numbers in the file,
    without the first `skipped` packets, which no keyframe comes before.

    `chunks` reads it front to back in constant memory, as often as it is called.
    """

    path: str
    chosen: tuple[int, ...]
    height: int
    width: int
    fps: float
    skipped: int = 0

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
        with opened(self.path) as (container, stream):
            for number, picture in enumerate(_decoded(container, stream, self.skipped)):
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
    """What is in a video or image file; formats and rules as of `open_video`.

    Its packets are counted and its first frame is decoded. All frames are decoded only where
    packets may not be frames: the file begins without a keyframe, times are missing or repeated,
    the codec has hidden frames.

    Raises VideoError for what is missing, empty, truncated, without video or beyond the limits.
    """
    return _examine(path).info


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
    """Choose frames and size of a video or picture; its frames are not read yet.

    Read are mp4, mov, m4v, 3gp, mkv, webm, avi, flv, mpg, ts, ogv, wmv, ivf, y4m, gif, apng, and of
    pictures png, jpg, bmp, webp, tiff, avif, heic (`SUFFIXES` lists them); the content decides, not
    the suffix. The frames are of the stream that players show, upright as players show them:
    rotation and mirroring are undone, then the middle is cut out in the wanted shape and resized.

    frames: how many, from the start; None for the longest clip that `vae` can take.
    height, width: in pixels; None for the file's own, brought down to a multiple of `multiple`
        (of one alone given, the other follows from the file's shape).
    fps: frames a second; None for the file's frames as they are.
    """
    if fps is not None:
        check_fps(path, fps)
    found = _examine(path)
    info = found.info
    chosen = range(info.frames) if fps is None else _nearest(path, found, fps)
    valid = [n for n in frame_rule.nearest_valid(len(chosen), vae) if n <= len(chosen)]
    wanted = max(valid, default=0) if frames is None else frames
    if not 1 <= wanted <= len(chosen):
        at = "" if fps is None else f" at {fps:g} a second"
        longest = (
            f"; the VAE takes {frame_rule.encoder_chunking(vae).rule}, at most {valid[-1]}"
            if valid
            else ""
        )
        raise VideoError(
            f"{path}: must have at least {max(wanted, 1)} frames{at}; got {len(chosen)}{longest}"
        )
    height, width = _size(path, info, height, width, multiple)
    rate = info.fps if fps is None else float(fps)
    return Clip(os.fspath(path), tuple(chosen[:wanted]), height, width, rate, found.skipped)


def read_video(path: PathLike, **options: Any) -> Tensor:
    """`(1, frames, 3, height, width)` fp32 in [-1, 1]; formats, rules and options as of
    `open_video`."""
    return open_video(path, **options).read()


def stream_video(path: PathLike, chunk: int | Sequence[int], **options: Any) -> Iterator[Tensor]:
    """The same in pieces, in constant memory; options as of `open_video`, which knows the total."""
    return open_video(path, **options).chunks(chunk)


def read_image(path: PathLike, height: int | None = None, width: int | None = None) -> Tensor:
    """`(1, 3, height, width)` fp32 in [-1, 1]: a picture, or the first frame of a video."""
    return read_video(path, frames=1, height=height, width=width)[:, 0]


@dataclass(frozen=True)
class _Examined:
    """What is in a file, and when each frame is shown: `times` in ticks of `tick` seconds."""

    info: VideoInfo
    times: Sequence[int]
    tick: Fraction
    skipped: int


def _examine(path: PathLike) -> _Examined:
    with opened(path) as (container, stream):
        fps = Fraction(stream.average_rate or stream.guessed_rate or 0)
        tick = stream.time_base
        skipped, times, certain = _packet_times(path, container, stream)
    with opened(path) as (container, stream):
        pictures = _decoded(container, stream, skipped)
        first = next(pictures, None)
        if first is None:
            raise VideoError(f"{path}: must have at least 1 frame; it has none that can be decoded")
        if not certain or _may_be_fields(container, stream, first):
            packets, times = len(times), [first.pts]
            for picture in pictures:
                times.append(picture.pts)
                check_count(path, len(times))
            fps = fps * len(times) / packets if len(times) < 0.75 * packets else fps
        gif = container.format.name == "gif"
    stamped = sorted(time for time in times if time is not None)
    if len(stamped) == len(times) > 1 and stamped[0] < stamped[-1] and tick:
        span = (stamped[-1] - stamped[0]) * tick
        fps = _rate_in_ticks(len(times) - 1, span, tick) if gif else fps
        fps = fps or (len(times) - 1) / span
        duration = float(span + 1 / fps)
    else:
        fps = fps or Fraction(1)
        stamped, tick, duration = list(range(len(times))), 1 / fps, float(len(times) / fps)
    turns, mirrored = _orientation(path, first)
    sides = (first.width, first.height) if turns % 2 else (first.height, first.width)
    info = VideoInfo(len(times), *sides, float(fps), duration, turns, mirrored)
    return _Examined(info, stamped, tick, skipped)


def _packet_times(
    path: PathLike, container: Any, stream: Any
) -> tuple[int, list[int | None], bool]:
    """How many packets come before the first keyframe; when each one after them is shown, in ticks;
    whether each of these is sure to be one frame."""
    times: list[int | None] = []
    seen = skipped = 0
    keyed = damaged = hidden = False
    origin = None
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.is_keyframe and not keyed:  # what came before cannot be decoded
            keyed, skipped, times, damaged, hidden = True, seen, [], False, False
        seen += 1
        damaged = damaged or packet.is_corrupt
        if damaged and keyed:
            break
        origin = packet.pts if not times else origin
        hidden = hidden or _may_be_hidden(stream.codec_context.name, memoryview(packet))
        if not packet.is_discard:
            times.append(packet.pts)
        check_count(path, len(times))
    if damaged:
        raise VideoError(f"{path}: is truncated or damaged after frame {len(times)}")
    known = [time for time in times if time is not None]
    leading = origin is None or any(time < origin for time in known)  # lack what they refer to
    certain = keyed and not (skipped or hidden or leading) and len(set(known)) == len(times)
    return skipped, times, certain


def _may_be_hidden(codec: str, data: memoryview) -> bool:
    """Whether a packet may hold nothing to show: a reference frame alone, or a repetition."""
    if codec == "vp8":
        return not data[0] & 0x10  # show_frame, RFC 6386 section 9.1
    if codec == "vp9":  # show_existing_frame, show_frame; a superframe ends in its index
        return not data[0] & 0x0A and data[-1] >> 5 != 0b110
    return codec == "mpeg4" and len(data) < 20  # a VOP that is not coded


def _may_be_fields(container: Any, stream: Any, first: Any) -> bool:
    """Whether two packets may be one frame: the fields of interlaced H.264 without a container that
    joins them."""
    apart = container.format.name in ("mpegts", "mpeg") and stream.codec_context.name == "h264"
    return apart and first.interlaced_frame


def _decoded(container: Any, stream: Any, skipped: int) -> Iterator[Any]:
    """The frames of a stream as shown, from the packet after the first `skipped` on."""
    for packet in container.demux(stream):
        if packet.size and skipped:
            skipped -= 1
        elif packet.size or packet.dts is None:  # an empty one with a time would end the decoder
            yield from packet.decode()


def _rate_in_ticks(intervals: int, span: Fraction, tick: Fraction) -> Fraction:
    """The simplest rate whose times, rounded to ticks, can span so long: 8 and not 7.96."""
    if span <= tick:
        return intervals / span
    least, most = intervals / (span + tick), intervals / (span - tick)
    rates = ((intervals / span).limit_denominator(n) for n in itertools.count(1))
    return next(rate for rate in rates if least <= rate <= most)


def _orientation(path: PathLike, picture: Any) -> tuple[int, bool]:
    """How a stored picture is shown: mirrored left to right or not, then turned counter-clockwise
    by so many quarters."""
    # x' = ax + cy, y' = bx + dy; y grows downwards
    a, b, _, c, d, *_ = _display_matrix(picture) or [0] * 9
    if not (a or b or c or d):
        return 0, False
    (across, along), (low, high) = sorted((abs(b), abs(c))), sorted((abs(a), abs(d)))
    upright, turned = low > 100 * along, across > 100 * high
    if not (upright or turned):
        rows = ", ".join(f"{value / (1 << 16):g}" for value in (a, b, c, d))
        raise VideoError(
            f"{path}: must be shown upright, mirrored or turned by quarter turns; its display "
            f"matrix is {rows}. ffmpeg -i {quoted(path)} turned.mp4 draws it as shown"
        )
    mirrored = a * d < b * c
    if mirrored:  # x counts from the other side
        a, b = -a, -b
    if upright:
        return (0 if a > 0 else 2), mirrored
    return (1 if c > 0 else 3), mirrored


def _display_matrix(picture: Any) -> Sequence[int]:
    """Nine numbers in fixed point, or none."""
    try:
        data = picture.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV cannot list EXIF, which FFmpeg has made a matrix of: a copy without it
        data = _without_exif(picture).side_data.get("DISPLAYMATRIX")
    except KeyError:
        return ()
    return struct.unpack("=9i", bytes(data)) if data is not None else ()


def _without_exif(picture: Any) -> Any:
    graph = pyav().filter.Graph()
    source = graph.add_buffer(
        width=picture.width,
        height=picture.height,
        format=picture.format.name,
        time_base=Fraction(1),
    )
    delete, sink = graph.add("sidedata", "mode=delete:type=31"), graph.add("buffersink")
    source.link_to(delete)
    delete.link_to(sink)
    graph.configure()
    graph.vpush(picture)
    return graph.vpull()


def _nearest(path: PathLike, found: _Examined, fps: float) -> Sequence[int]:
    """For each wanted time the frame shown nearest to it."""
    rate, times = Fraction(fps).limit_denominator(1001), found.times
    count = max(1, math.floor(Fraction(found.info.duration).limit_denominator(10**6) * rate))
    check_count(path, count)
    step = 1 / (rate * found.tick)
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
        interpolation=precise(),
    )
    stored = torch.frombuffer(rgb.planes[0], dtype=torch.uint8).view(rgb.height, -1)
    turns, mirrored = _orientation(path, picture)
    pixels = stored[:, : 3 * rgb.width].reshape(rgb.height, rgb.width, 3)
    frame = pixels.permute(2, 0, 1)
    frame = (frame.flip(2) if mirrored else frame).rot90(turns, (1, 2))
    shown_height, shown_width = frame.shape[1:]
    scale = min(shown_height / height, shown_width / width)  # of the largest part of that shape
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (shown_height - rows) // 2, (shown_width - columns) // 2
    frame = frame[:, top : top + rows, left : left + columns].float() / 127.5 - 1
    if (rows, columns) == (height, width):
        return frame
    size = (height, width)
    sized: Tensor = F.interpolate(frame[None], size, mode="bilinear", antialias=True)
    return sized[0]
