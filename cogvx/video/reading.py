"""A file to a tensor `(batch, frames, channels, height, width)`, values in [-1, 1].

What a file has is made to fit what is wanted by four rules:

- size: the largest centred part that has the wanted shape is cut out, then resized with
  antialiasing. Rotation is undone first; pixels count as square;
- frame rate: at each wanted time the frame shown nearest to it (the earlier of two equally near),
  by the file's own time stamps, so that a variable rate needs no rule of its own;
- frames: without a count, the longest clip that the VAE's frame rule allows; with one, exactly so
  many from the start, or an error;
- colour: as the file is tagged; untagged is BT.709 from 720 lines up and BT.601 below, as players
  take it. Interlaced frames stay interlaced.
"""

import bisect
import itertools
import math
import os
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
)


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
        with opened(self.path) as (container, stream):
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
    if fps is not None:
        check_fps(path, fps)
    info, times, tick = _examine(path)
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


def _examine(path: PathLike) -> tuple[VideoInfo, Sequence[int], Fraction]:
    """What is in a file, and when each frame is shown: times in ticks, the ticks in seconds."""
    times: list[int | None] = []
    with opened(path) as (container, stream):
        fps = Fraction(stream.average_rate or stream.guessed_rate or 0)
        tick = stream.time_base
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise VideoError(f"{path}: is truncated or damaged after frame {len(times)}")
            if packet.size and not packet.is_discard:
                times.append(packet.pts)
            check_count(path, len(times))
    with opened(path) as (container, stream):
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
    check_count(path, count)
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
        interpolation=precise(),
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
