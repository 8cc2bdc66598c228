"""Read video files as tensors `(batch, frames, channels, height, width)` in [-1, 1].

Formats, recognised by content, not by suffix: MP4, MOV, M4V, 3GP, MJ2, MKV, WebM, AVI, FLV, MPEG-PS
and -TS, Ogg, WMV/ASF, IVF, Y4M, GIF, APNG; of pictures PNG, JPEG, BMP, WebP, TIFF, AVIF and HEIC
(`SUFFIXES`). Rejected, with advice: streams without a container (.h264, .hevc, .m2v, .obu: their
frames have no times), animated WebP, tiled photos (as phones write HEIC).

Frames are selected and converted by these rules:

- stream: of several video streams the one that players show (FFmpeg's best), never a cover picture;
- orientation: as in players: all eight mirrorings and quarter turns, by display matrix or EXIF.
  Other angles and shears are rejected;
- size: cropped to the largest centred part of the requested aspect ratio, then resized with
  antialiasing. Pixels count as square;
- frame rate: for each requested time the nearest frame (the earlier of two equally near), by the
  file's time stamps, so that variable rates work, too;
- frames: by default the longest clip that the VAE's frame rule allows; with a count, exactly so
  many from the start, or an error. The start is the first frame that can be decoded, which is later
  if a recording begins in the middle of a group of pictures;
- colour: as tagged; untagged is BT.709 from 720 lines up and BT.601 below, as in players.
  Interlaced frames stay interlaced.
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
    """Properties of a file: displayed size; average `fps`; `duration` in seconds. For display the
    stored picture is mirrored left to right if `mirrored`, then rotated by `rotation` quarter turns
    counter-clockwise."""

    frames: int
    height: int
    width: int
    fps: float
    duration: float
    rotation: int
    mirrored: bool = False


@dataclass(frozen=True)
class Clip:
    """Frames of a file, selected but not yet read. `chosen` are their numbers in the file, after
    the first `skipped` packets, which precede the first keyframe.

    `chunks` reads them in constant memory; it may be called again.
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
        """Read the clip in chunks `(1, frames, 3, height, width)`, fp32 in [-1, 1].

        sizes: frames of a chunk (the last may be shorter), or of each (`frames.encode_plan`).
        Raises VideoError if the file ends before the clip, or cannot be decoded.
        """
        if isinstance(sizes, int):
            sizes = [min(sizes, self.frames - n) for n in range(0, self.frames, sizes)]
        if sum(sizes) > self.frames:
            raise ValueError(f"Clip: sizes must add up to {self.frames} frames; got {sum(sizes)}")
        frames = self._frames()
        for size in sizes:
            yield torch.stack(list(itertools.islice(frames, size)))[None]

    def read(self) -> Tensor:
        """Read the whole clip."""
        return next(self.chunks(self.frames))

    def _frames(self) -> Iterator[Tensor]:
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
            "of its header; the file ends before it, truncated or damaged"
        )


def probe(path: PathLike) -> VideoInfo:
    """Properties of a video or image file; formats and rules: see `open_video`.

    Counts packets and decodes the first frame. All frames are decoded only if packets may not be
    frames: the file begins without a keyframe, times are missing or repeated, the codec has hidden
    frames.

    Raises VideoError for a missing, empty or truncated file, without video or beyond the limits.
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
    """Select frames and size of a video or picture; frames are not read yet.

    Formats: mp4, mov, m4v, 3gp, mkv, webm, avi, flv, mpg, ts, ogv, wmv, ivf, y4m, gif, apng, and
    pictures png, jpg, bmp, webp, tiff, avif, heic (`SUFFIXES`), recognised by content. Frames are
    those that players show, upright, cropped at the centre to the requested shape and resized.

    frames: number, from the start; None for the longest clip that `vae` can take.
    height, width: in pixels; by default the file's, rounded down to a multiple of `multiple`. If
        only one is given, the other keeps the file's aspect ratio.
    fps: frames per second; None for the file's own frames.
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
    """Read a clip, `(1, frames, 3, height, width)` fp32 in [-1, 1]; options of `open_video`."""
    return open_video(path, **options).read()


def stream_video(path: PathLike, chunk: int | Sequence[int], **options: Any) -> Iterator[Tensor]:
    """Read a clip in chunks, in constant memory; options of `open_video`, which has the total."""
    return open_video(path, **options).chunks(chunk)


def read_image(path: PathLike, height: int | None = None, width: int | None = None) -> Tensor:
    """Read a picture or the first frame of a video: `(1, 3, height, width)` fp32 in [-1, 1]."""
    return read_video(path, frames=1, height=height, width=width)[:, 0]


@dataclass(frozen=True)
class _Examined:
    """Properties of a file, and the time of each frame: `times` in ticks of `tick` seconds."""

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
    """Number of packets before the first keyframe; times of the others, in ticks; and whether each
    of these is certainly one frame."""
    times: list[int | None] = []
    seen = skipped = 0
    keyed = damaged = hidden = False
    origin = None
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.is_keyframe and not keyed:  # earlier packets cannot be decoded
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
    leading = origin is None or any(time < origin for time in known)  # lack their reference frames
    certain = keyed and not (skipped or hidden or leading) and len(set(known)) == len(times)
    return skipped, times, certain


def _may_be_hidden(codec: str, data: memoryview) -> bool:
    """True if a packet may have no frame to show: only a reference frame, or a repetition."""
    if codec == "vp8":
        return not data[0] & 0x10  # show_frame, RFC 6386 section 9.1
    if codec == "vp9":  # show_existing_frame, show_frame; a superframe ends in its index
        return not data[0] & 0x0A and data[-1] >> 5 != 0b110
    return codec == "mpeg4" and len(data) < 20  # a VOP that is not coded


def _may_be_fields(container: Any, stream: Any, first: Any) -> bool:
    """True if two packets may be one frame: fields of interlaced H.264 in a container that does
    not join them."""
    separate = container.format.name in ("mpegts", "mpeg") and stream.codec_context.name == "h264"
    return separate and first.interlaced_frame


def _decoded(container: Any, stream: Any, skipped: int) -> Iterator[Any]:
    """Decode the frames of a stream, after the first `skipped` packets."""
    for packet in container.demux(stream):
        if packet.size and skipped:
            skipped -= 1
        elif packet.size or packet.dts is None:  # an empty packet with a time would end the decoder
            yield from packet.decode()


def _rate_in_ticks(intervals: int, span: Fraction, tick: Fraction) -> Fraction:
    """Simplest rate whose times, rounded to ticks, match the span: 8, not 7.96."""
    if span <= tick:
        return intervals / span
    least, most = intervals / (span + tick), intervals / (span - tick)
    rates = ((intervals / span).limit_denominator(n) for n in itertools.count(1))
    return next(rate for rate in rates if least <= rate <= most)


def _orientation(path: PathLike, picture: Any) -> tuple[int, bool]:
    """Display orientation: (quarter turns counter-clockwise, mirrored left to right before)."""
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
    if mirrored:  # x is reversed
        a, b = -a, -b
    if upright:
        return (0 if a > 0 else 2), mirrored
    return (1 if c > 0 else 3), mirrored


def _display_matrix(picture: Any) -> Sequence[int]:
    """Nine fixed-point numbers, or none."""
    try:
        data = picture.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV cannot list EXIF, which FFmpeg has converted to a matrix: a copy without it
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
    """For each requested time the nearest frame."""
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
    """Convert to (3, height, width), fp32 in [-1, 1]: upright, cropped, resized."""
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
