"""Every format that is read; streams, packets and rates of files as cameras write them."""

import av
import pytest
import torch

from cogvx.video import SUFFIXES, VideoError, open_video, probe, read_video, reading, write_video

from .clips import BIKES, copy_packets, levels_of, write_levels

LEVELS = [40, 80, 120, 160, 200]
ALL_FORMATS = [  # suffix, muxer, codec, pixels
    (".mp4", "mp4", "libx264", "yuv420p"),
    (".mp4", "mp4", "libx265", "yuv420p"),
    (".mp4", "mp4", "libsvtav1", "yuv420p"),
    (".m4v", "mp4", "mpeg4", "yuv420p"),
    (".mov", "mov", "prores", "yuv422p10le"),
    (".mov", "mov", "qtrle", "rgb24"),
    (".qt", "mov", "mjpeg", "yuvj420p"),
    (".f4v", "f4v", "libx264", "yuv420p"),
    (".3gp", "3gp", "mpeg4", "yuv420p"),
    (".3g2", "3g2", "libx264", "yuv420p"),
    (".mj2", "mp4", "jpeg2000", "yuv420p"),
    (".mkv", "matroska", "ffv1", "yuv420p"),
    (".mkv", "matroska", "libx265", "yuv420p"),
    (".webm", "webm", "libvpx", "yuv420p"),
    (".webm", "webm", "libvpx-vp9", "yuv420p"),
    (".webm", "webm", "libsvtav1", "yuv420p"),
    (".avi", "avi", "mpeg4", "yuv420p"),
    (".avi", "avi", "mjpeg", "yuvj420p"),
    (".avi", "avi", "rawvideo", "yuv420p"),
    (".divx", "avi", "msmpeg4", "yuv420p"),
    (".flv", "flv", "libx264", "yuv420p"),
    (".flv", "flv", "flv", "yuv420p"),
    (".flv", "flv", "libx265", "yuv420p"),
    (".mpg", "mpeg", "mpeg1video", "yuv420p"),
    (".mpeg", "mpeg", "mpeg2video", "yuv420p"),
    (".vob", "vob", "mpeg2video", "yuv420p"),
    (".ts", "mpegts", "libx264", "yuv420p"),
    (".mts", "mpegts", "libx265", "yuv420p"),
    (".m2ts", "mpegts", "mpeg2video", "yuv420p"),
    (".ogv", "ogg", "libvpx", "yuv420p"),
    (".ogg", "ogv", "libvpx", "yuv420p"),
    (".wmv", "asf", "wmv2", "yuv420p"),
    (".asf", "asf", "wmv1", "yuv420p"),
    (".ivf", "ivf", "libvpx-vp9", "yuv420p"),
    (".y4m", "yuv4mpegpipe", "wrapped_avframe", "yuv420p"),
    (".gif", "gif", "gif", "gray"),
    (".apng", "apng", "apng", "rgb24"),
]
PICTURES = [
    (".png", "image2", "png", "rgb24"),
    (".jpg", "image2", "mjpeg", "yuvj420p"),
    (".jpeg", "image2", "mjpeg", "yuvj420p"),
    (".bmp", "image2", "bmp", "bgr24"),
    (".webp", "webp", "libwebp", "yuv420p"),
    (".tif", "image2", "tiff", "rgb24"),
    (".tiff", "image2", "tiff", "rgb24"),
    (".avif", "avif", "libsvtav1", "yuv420p"),
]
UNWRITTEN = {".heic", ".heif"}  # as .avif, with HEVC, by which no muxer writes them
QUIET = {"libsvtav1": {"svtav1-params": "lp=1"}, "libx265": {"x265-params": "log-level=none"}}


def wrote(path, muxer, codec, pixels, levels):
    return write_levels(
        path, levels, size=(64, 96), format=muxer, codec=codec, pixels=pixels,
        options=QUIET.get(codec),
    )  # fmt: skip


@pytest.mark.parametrize(("suffix", "muxer", "codec", "pixels"), ALL_FORMATS)
def test_videos_of_every_format(tmp_path, suffix, muxer, codec, pixels):
    path = wrote(tmp_path / f"a{suffix}", muxer, codec, pixels, LEVELS)
    info = probe(path)
    assert (info.frames, info.height, info.width, info.fps) == (5, 64, 96, 25)
    assert levels_of(read_video(path, frames=5)) == pytest.approx(LEVELS, abs=6)


@pytest.mark.parametrize(("suffix", "muxer", "codec", "pixels"), PICTURES)
def test_pictures_of_every_format(tmp_path, suffix, muxer, codec, pixels):
    path = wrote(tmp_path / f"a{suffix}", muxer, codec, pixels, LEVELS[:1])
    assert levels_of(read_video(path, frames=1)) == pytest.approx(LEVELS[:1], abs=3)
    assert probe(path).frames == 1


def test_every_suffix_has_been_tried():
    assert {suffix for suffix, *_ in ALL_FORMATS + PICTURES} | UNWRITTEN == set(SUFFIXES)


def test_files_are_opened_by_options_that_every_pyav_has(tmp_path, monkeypatch):
    """`stream_options` is refused for formats without a header, and gone from newer versions."""
    paths = [tmp_path / "a.flv", tmp_path / "a.mpg", tmp_path / "a.mp4"]
    for path, muxer in zip(paths, ("flv", "mpeg", "mp4"), strict=True):
        codec = "mpeg2video" if muxer == "mpeg" else "libx264"
        wrote(path, muxer, codec, "yuv420p", LEVELS)
    plain = av.open

    def without(file, *, format=None, options=None):
        return plain(file, format=format, options=options)

    monkeypatch.setattr(av, "open", without)
    assert [probe(path).frames for path in paths] == [5, 5, 5]


@pytest.mark.parametrize(
    ("suffix", "muxer", "codec"),
    [
        (".h264", "h264", "libx264"),
        (".hevc", "hevc", "libx265"),
        (".m2v", "mpeg2video", "mpeg2video"),
        (".m4v", "m4v", "mpeg4"),
        (".obu", "obu", "libsvtav1"),
        (".mjpeg", "mjpeg", "mjpeg"),
    ],
)
def test_streams_without_a_container_are_refused_in_words(tmp_path, suffix, muxer, codec):
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = wrote(tmp_path / f"my clip{suffix}", muxer, codec, pixels, LEVELS)
    with pytest.raises(VideoError, match=r"a container .*ffmpeg -framerate 25 -i '/.*my clip"):
        probe(path)


def test_an_animated_webp_is_refused_in_words(tmp_path):
    path = wrote(tmp_path / "a.webp", "webp", "libwebp_anim", "yuv420p", LEVELS)
    with pytest.raises(VideoError, match="an animated WebP.* Save it as GIF"):
        probe(path)


def test_other_formats_are_refused_in_words(tmp_path):
    path = wrote(tmp_path / "a.nut", "nut", "mpeg4", "yuv420p", LEVELS)
    with pytest.raises(VideoError, match=r"of a format that is read \(.*\.mp4 .*ffmpeg -i"):
        probe(path)


GROUPS = "keyint=12:min-keyint=12:scenecut=0:bframes=2:open-gop="
MID_GOP = {
    "h264.ts": ("mpegts", "libx264", {"x264-params": GROUPS + "0"}),
    "open.ts": ("mpegts", "libx264", {"x264-params": GROUPS + "1"}),
    "hevc.ts": ("mpegts", "libx265", {"x265-params": GROUPS + "1:log-level=none"}),
    "hevc.mkv": ("matroska", "libx265", {"x265-params": GROUPS + "1:log-level=none"}),
    "h264.mp4": ("mp4", "libx264", {"x264-params": GROUPS + "1"}),
    "h264.flv": ("flv", "libx264", {"x264-params": GROUPS + "0"}),
    "mpeg2.mpg": ("mpeg", "mpeg2video", {"g": "12", "bf": "2", "sc_threshold": "1000000000"}),
    "mpeg4.avi": ("avi", "mpeg4", {"g": "12", "bf": "2", "sc_threshold": "1000000000"}),
    "vp9.webm": ("webm", "libvpx-vp9", {"g": "12"}),
    "vp8.mkv": ("matroska", "libvpx", {"g": "12"}),
}


@pytest.mark.parametrize("name", MID_GOP)
def test_recordings_that_begin_in_the_middle_of_a_group(tmp_path, name):
    """Frames that cannot be decoded are neither counted nor read; the others keep their places."""
    muxer, codec, options = MID_GOP[name]
    levels = list(range(20, 220, 5))
    whole = write_levels(tmp_path / f"whole.{name}", levels, codec=codec, format=muxer,
                         options=options, size=(64, 96))  # fmt: skip
    assert probe(whole).frames == len(levels)
    path = copy_packets(whole, tmp_path / name, lambda n, data: data if n > 5 else None, muxer)
    info = probe(path)
    assert 24 <= info.frames <= 34 and info.fps == 25
    assert info.duration == pytest.approx(info.frames / 25, abs=0.002)
    clip = read_video(path, frames=info.frames)
    assert levels_of(clip) == pytest.approx(levels[-info.frames :], abs=4)
    assert read_video(path).shape[1] == (info.frames - 1) // 8 * 8 + 1
    assert open_video(path, fps=12.5, frames=8).chosen == tuple(range(0, 16, 2))


def test_a_transport_stream_that_is_cut_anywhere(tmp_path):
    levels = list(range(20, 220, 5))
    path = write_levels(tmp_path / "a.ts", levels, options={"x264-params": GROUPS + "0"})
    data = path.read_bytes()
    path.write_bytes(data[3000:])
    frames = probe(path).frames
    assert 12 <= frames < 40
    assert levels_of(read_video(path, frames=frames)) == pytest.approx(levels[-frames:], abs=4)
    damaged = bytearray(data)
    damaged[len(data) // 376 * 188 + 1] |= 0x80  # transport_error_indicator
    path.write_bytes(damaged)
    with pytest.raises(VideoError, match="truncated or damaged after frame"):
        probe(path)


def test_frames_that_are_not_shown_are_not_counted(tmp_path):
    """A hidden frame of VP8, and one of MPEG-4 that is not coded."""
    path = write_levels(tmp_path / "a.webm", LEVELS, codec="libvpx", options={"g": "12"})
    change = {2: lambda data: bytes([data[0] & ~0x10]) + data[1:]}
    copy_packets(path, tmp_path / "b.webm", lambda n, data: change.get(n, bytes)(data))
    assert levels_of(read_video(tmp_path / "b.webm", frames=4)) == pytest.approx(
        LEVELS[:2] + LEVELS[3:], abs=4
    )
    assert probe(tmp_path / "b.webm").frames == 4
    path = write_levels(tmp_path / "a.avi", LEVELS, codec="mpeg4")
    change = {2: lambda data: b"\0\0\1\xb6\x51\x4f"}  # P, at 2 of 25, not coded
    copy_packets(path, tmp_path / "b.avi", lambda n, data: change.get(n, bytes)(data))
    assert probe(tmp_path / "b.avi").frames == 4


def test_probing_decodes_one_frame_where_packets_are_frames(tmp_path, monkeypatch):
    decoded = []

    def counted(*values):
        for picture in plain(*values):
            decoded.append(picture)
            yield picture

    plain = reading._decoded
    monkeypatch.setattr(reading, "_decoded", counted)
    assert probe(BIKES).frames == 250 and len(decoded) == 1


def add_picture(container, disposition):
    stream = container.add_stream("mjpeg", rate=1)
    stream.height, stream.width, stream.pix_fmt = 16, 16, "yuvj420p"
    stream.disposition = disposition
    return stream


def mux_picture(container, stream):
    picture = av.VideoFrame(16, 16, "yuvj420p")
    for plane in picture.planes:
        plane.update(bytes(plane.buffer_size))
    picture.pts = 0
    container.mux([*stream.encode(picture), *stream.encode(None)])


@pytest.mark.parametrize("name", ["a.mkv", "a.mov"])
def test_the_stream_that_players_show(tmp_path, name):
    """Not the first, which is a picture."""
    kinds = av.stream.Disposition
    with av.open(str(tmp_path / name), "w") as container:
        first = add_picture(container, kinds(0))
        second = container.add_stream("libx264", rate=8)
        second.height, second.width, second.pix_fmt = 32, 64, "yuv420p"
        second.disposition = kinds.default
        mux_picture(container, first)
        for number in range(9):
            picture = av.VideoFrame(64, 32, "gray").reformat(format="yuv420p")
            picture.pts = number
            container.mux(second.encode(picture))
        container.mux(second.encode(None))
    info = probe(tmp_path / name)
    assert (info.frames, info.height, info.width) == (9, 32, 64)
    assert read_video(tmp_path / name).shape == (1, 9, 3, 32, 64)


def test_a_cover_is_no_video(tmp_path):
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        cover = add_picture(container, av.stream.Disposition.attached_pic)
        sound = container.add_stream("aac", rate=44100, layout="mono")
        samples = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        samples.planes[0].update(bytes(samples.planes[0].buffer_size))
        samples.sample_rate, samples.pts = 44100, 0
        packets = [*sound.encode(samples), *sound.encode(None)]
        mux_picture(container, cover)
        container.mux(packets)
    with pytest.raises(VideoError, match="it has a cover picture alone"):
        probe(path)


@pytest.mark.parametrize("fps", [8, 10, 12.5, 16, 24, 25, 30, 50])
@pytest.mark.parametrize("frames", [9, 17])
def test_a_gif_has_the_rate_it_was_written_with(tmp_path, fps, frames):
    """Though its delays are hundredths of a second: 8 a second are 13, 12, 13, 12, …"""
    clip = torch.linspace(-1, 1, frames).view(1, -1, 1, 1, 1).expand(1, frames, 3, 8, 8)
    write_video(tmp_path / "a.gif", clip, fps)
    info = probe(tmp_path / "a.gif")
    assert info.fps == fps and info.duration == pytest.approx(frames / fps, abs=0.01)
    with av.open(tmp_path / "a.gif") as container:
        times = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert times == pytest.approx([100 * n / fps for n in range(frames)], abs=0.51)
