"""Files that are missing, damaged, no video, or meant to harm: `VideoError` says what is wrong."""

import resource
import struct
import zlib

import av
import pytest
from PIL import Image

from cogvx.video import VideoError, open_video, probe, read_image

from .clips import BIKES, copy_packets, write_levels


def write_png(path, height, width):
    """A black one-bit picture, written row by row: a small file however large it is."""

    def block(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(b"\0" * (1 + (width + 7) // 8)) for _ in range(height))
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = [block(b"IHDR", head), block(b"IDAT", rows + packer.flush()), block(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    return path


def test_missing_empty_or_no_file(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video " * 100)
    for name, message in (
        ("nowhere.mp4", "No such file"),
        ("empty.mp4", "must have 1 to"),
        ("text.mp4", "is no video"),
        (".", "must be a file"),
    ):
        with pytest.raises(VideoError, match=message) as caught:
            probe(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(VideoError, match="must be a file"):
        probe("/dev/zero")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.98])
def test_truncated(tmp_path, share):
    """With the index at the end, and with it in front, as on the web."""
    data = BIKES.read_bytes()
    (tmp_path / "end.mp4").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(VideoError, match="truncated or damaged"):
        probe(tmp_path / "end.mp4")
    with (
        av.open(str(BIKES)) as source,
        av.open(str(tmp_path / "web.mp4"), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = (tmp_path / "web.mp4").read_bytes()
    assert probe(tmp_path / "web.mp4").frames == 250
    (tmp_path / "web.mp4").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(VideoError, match="truncated or damaged"):
        probe(tmp_path / "web.mp4")


def test_sound_alone(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame(format="s16", layout="mono", samples=1024)
        sound.sample_rate, sound.pts = 8000, 0
        container.mux([*stream.encode(sound), *stream.encode(None)])
    with pytest.raises(VideoError, match="must have a video stream; it has none"):
        probe(tmp_path / "a.mkv")


def test_times_that_span_an_age(tmp_path):
    path = write_levels(tmp_path / "a.mkv", [50, 60], times=[0, 10**9])
    assert open_video(path, frames=2).frames == 2
    with pytest.raises(VideoError, match="at most 262144 frames"):
        open_video(path, fps=1000)


@pytest.mark.parametrize("height, width", [(40000, 40000), (9000, 9000), (1, 100_000_000)])
def test_a_picture_that_would_fill_the_memory(tmp_path, height, width):
    path = write_png(tmp_path / "bomb.png", height, width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(VideoError, match="pixels|no video"):
        read_image(path, 64, 64)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) * 1024 < 100e6


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "webp", "gif", "tiff"])
def test_the_size_of_a_picture_that_is_too_large_is_named(tmp_path, kind):
    """Files that are small, with headers that are not."""
    path = tmp_path / f"a.{kind}"
    if kind == "png":
        write_png(path, 16000, 9000)
    else:
        Image.new("RGB", (48, 32)).save(path)
    data = bytearray(path.read_bytes())
    if kind == "jpg":
        struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, 16000, 9000)
        data[-2:-2] = bytes(1 << 20)  # fewer could not be so large a picture
    elif kind == "bmp":
        struct.pack_into("<II", data, 18, 9000, 16000)
    elif kind == "webp":
        struct.pack_into("<HH", data, data.index(b"\x9d\x01\x2a") + 3, 9000, 16000)
    elif kind == "gif":
        struct.pack_into("<HH", data, 6, 9000, 16000)
    elif kind == "tiff":
        for tag, value in ((256, 9000), (257, 16000)):
            struct.pack_into("<I", data, data.index(struct.pack("<HHI", tag, 4, 1)) + 8, value)
    path.write_bytes(data)
    with pytest.raises(VideoError, match="must have at most 67,108,864 pixels; got 16000x9000"):
        read_image(path, 64, 64)


def test_a_stream_that_appears_late_and_large(tmp_path):
    """FLV and MPEG have no list of streams, so that FFmpeg opens decoders without our limit."""
    write_levels(tmp_path / "a.flv", [50, 60], size=(400, 400), codec="flv", format="flv")

    def larger(number, data):
        bits = f"{int.from_bytes(data, 'big'):0{8 * len(data)}b}"
        assert int(bits[33:49], 2) == 400  # the width, after 17 + 5 + 8 + 3 bits
        bits = bits[:33] + f"{60000:016b}" * 2 + bits[65:]
        return int(bits, 2).to_bytes(len(data), "big")

    path = copy_packets(tmp_path / "a.flv", tmp_path / "b.flv", larger, "flv")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(VideoError, match="at most 67,108,864 pixels; got 60000x60000"):
        probe(path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 100e6


def test_a_header_of_a_million_frames(tmp_path):
    path = write_levels(tmp_path / "a.avi", [50] * 4, codec="mpeg4")
    data = bytearray(path.read_bytes())
    length = data.index(b"strh") + 8 + 32
    assert data[length : length + 4] == struct.pack("<I", 4)
    data[length : length + 4] = struct.pack("<I", 1_000_000)
    path.write_bytes(data)
    with pytest.raises(VideoError, match="at most 262144 frames; got 1000000"):
        probe(path)


def test_a_list_of_other_files(tmp_path):
    """A playlist would make FFmpeg open what it names."""
    (tmp_path / "a.mp4").write_text(f"#EXTM3U\n#EXTINF:10,\n{BIKES}\n#EXT-X-ENDLIST\n")
    (tmp_path / "b.mp4").write_text(f"ffconcat version 1.0\nfile '{BIKES}'\n")
    (tmp_path / "c%d.mp4").write_text("a name that is a pattern")
    for name in ("a.mp4", "b.mp4", "c%d.mp4"):
        with pytest.raises(VideoError, match="is no video"):
            probe(tmp_path / name)


def test_a_file_that_ends_between_two_looks(tmp_path):
    path = write_levels(tmp_path / "a.mp4", [50] * 24)
    clip = open_video(path)
    write_levels(path, [50] * 8)
    with pytest.raises(VideoError, match="frame 8 of the 24 of its header"):
        clip.read()
