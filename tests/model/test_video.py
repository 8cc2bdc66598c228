"""Files in and out: real clips there and back, and what does not fit made to fit."""

import math
from pathlib import Path

import av
import pytest
import torch

from cogvx.config import VAEConfig
from cogvx.frames import encode_plan
from cogvx.memory import LiveBytes
from cogvx.video import (
    PSNR,
    VideoError,
    check_video_output,
    open_video,
    probe,
    psnr,
    read_image,
    read_video,
    stream_video,
    write_contact_sheet,
    write_video,
    writing,
)

from .clips import BIKES, BUNNY, CARPHONE, levels_of, write_levels

FACTORIZED = VAEConfig(factorized=True)


def test_a_file_is_probed():
    info = probe(BIKES)
    assert (info.frames, info.height, info.width, info.fps) == (250, 272, 640, 25.0)
    assert info.duration == pytest.approx(10)
    assert probe(CARPHONE).fps == pytest.approx(29.97, abs=1e-3)
    assert probe(BUNNY).frames == 132  # it has sound, too


def test_a_clip_is_read():
    clip = read_video(BIKES, frames=9)
    assert clip.shape == (1, 9, 3, 272, 640) and clip.dtype == torch.float32
    assert -1 <= clip.min() < -0.5 and 0.5 < clip.max() <= 1


def test_pixels_are_those_of_the_file():
    """Against PyAV's own conversion of the first frame."""
    with av.open(str(BIKES)) as container:
        picture = next(container.decode(video=0))
    wanted = torch.from_numpy(picture.to_ndarray(format="rgb24")).permute(2, 0, 1) / 127.5 - 1
    assert psnr(read_video(BIKES, frames=1)[0, 0], wanted) > 40


def test_the_longest_valid_clip_is_taken():
    assert open_video(BIKES).frames == 249  # 8k + 1 of 250
    assert open_video(BIKES, vae=FACTORIZED).frames == 249
    assert open_video(CARPHONE).frames == 120  # 8k
    assert open_video(CARPHONE, vae=FACTORIZED).frames == 117
    assert open_video(CARPHONE, frames=7).frames == 7


@pytest.mark.parametrize("height, width", [(272, 640), (64, 96), (96, 64), (480, 720), (40, 200)])
def test_any_size_is_made_to_fit(height, width):
    assert read_video(BIKES, frames=1, height=height, width=width).shape[-2:] == (height, width)


def test_the_middle_is_cut_out_at_its_shape():
    """A square of a wide clip shows what lies in its middle, not all of it squeezed."""
    whole = read_video(BIKES, frames=1)[..., 184:456]
    square = read_video(BIKES, frames=1, height=272, width=272)
    assert torch.equal(square, whole)
    small = read_video(BIKES, frames=1, height=136, width=136)
    assert psnr(small, torch.nn.functional.avg_pool2d(whole[0], 2)[None]) > 35


def test_the_size_follows_the_file():
    assert open_video(CARPHONE, multiple=16).height == 144
    assert (open_video(BIKES, multiple=64).height, open_video(BIKES, multiple=64).width) == (
        256,
        640,
    )
    assert open_video(BIKES, height=136).width == 320
    assert open_video(BIKES, width=320).height == 136
    with pytest.raises(VideoError, match="height and width must be at least 1024"):
        open_video(BIKES, multiple=1024)


def test_the_frame_rate_is_made_to_fit(tmp_path):
    clip = open_video(BIKES, fps=8)
    assert (clip.frames, clip.fps, clip.chosen[:6]) == (80, 8.0, (0, 3, 6, 9, 12, 16))
    assert open_video(BIKES, fps=50, frames=6).chosen == (0, 0, 1, 1, 2, 2)
    path = write_levels(tmp_path / "a.mp4", [16, 60, 100, 140, 180, 220])
    double = read_video(path, fps=50, frames=4)
    assert levels_of(double)[:2] == [levels_of(double)[0]] * 2


def test_a_variable_frame_rate_is_read_by_its_times(tmp_path):
    levels = [20, 60, 100, 140, 180, 220]
    path = write_levels(tmp_path / "a.mkv", levels, times=[0, 40, 500, 520, 1000, 2100])
    assert levels_of(read_video(path, frames=6)) == pytest.approx(levels, abs=2)
    assert open_video(path, fps=2, frames=4).chosen == (0, 2, 4, 4)
    assert levels_of(read_video(path, fps=2, frames=4)) == pytest.approx([20, 100, 180, 180], abs=2)


def test_the_total_is_known_and_true(tmp_path):
    """Also for files whose header does not count frames."""
    for name in ("a.mkv", "a.gif"):
        write_video(tmp_path / name, read_video(CARPHONE, frames=9), 8)
        clip = open_video(tmp_path / name)
        assert clip.frames == 9
        assert [chunk.shape[1] for chunk in clip.chunks(4)] == [4, 4, 1]


def test_a_stream_is_the_clip_in_constant_memory():
    clip = open_video(CARPHONE, height=64, width=64)
    plan = encode_plan(clip.frames)
    whole = clip.read()
    assert torch.equal(torch.cat(list(clip.chunks(plan)), 1), whole)
    assert torch.equal(torch.cat(list(stream_video(CARPHONE, 7, frames=16)), 1)[:, :16],
                       read_video(CARPHONE, frames=16))  # fmt: skip
    peaks = []
    for frames in (16, 64):
        with LiveBytes() as live:
            for _ in stream_video(CARPHONE, 8, frames=frames):
                pass
        peaks.append(live.peak)
    assert peaks[0] == peaks[1]


def test_rotation_is_undone(tmp_path):
    """The upper half is white; a turn to the left brings it to the left side."""
    path = write_levels(tmp_path / "a.mp4", [235] * 3, rotation=90)
    info = probe(path)
    assert (info.height, info.width, info.rotation) == (64, 32, 1)
    frame = read_video(path, frames=1)[0, 0]
    assert frame[..., 2:12].mean() > 0.8 and frame[..., -12:-2].mean() < -0.8
    path = write_levels(tmp_path / "b.mp4", [235] * 3, rotation=180)
    assert read_video(path, frames=1)[0, 0, :, 20:].mean() > 0.8


def test_there_and_back(tmp_path):
    clip = read_video(BUNNY, frames=9, height=240, width=432)
    assert write_video(tmp_path / "a.mp4", clip, 25) == 9
    back = read_video(tmp_path / "a.mp4", frames=9)
    assert psnr(clip, back) > 35
    assert (back - clip).mean().abs() < 2 / 255  # neither range nor matrix was mistaken
    write_video(tmp_path / "b.mkv", clip, 25, crf=0)
    assert psnr(clip, read_video(tmp_path / "b.mkv", frames=9)) > 35


def test_plain_colours_come_back(tmp_path):
    """Red, green, blue and mid grey: a wrong matrix or range moves them by 10 and more."""
    colours = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [0, 0, 0.0]])
    clip = colours[None, :, :, None, None].expand(1, 4, 3, 64, 64)
    for name in ("a.mp4", "a.gif"):
        write_video(tmp_path / name, clip, 8)
        back = read_video(tmp_path / name, frames=4)
        assert (back - clip).abs().max() < 8 / 127.5


def test_colours_are_tagged(tmp_path):
    write_video(tmp_path / "a.mp4", torch.zeros(1, 1, 3, 32, 32), 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
    tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
    assert tags == (1, 1, 1, 1) and context.pix_fmt == "yuv420p"


def test_a_gif_keeps_every_frame(tmp_path):
    levels = torch.tensor([1, -1, -1, 1, 0, 1.0])
    write_video(tmp_path / "a.gif", levels.view(1, -1, 1, 1, 1).expand(1, 6, 3, 32, 32), 8)
    assert levels_of(read_video(tmp_path / "a.gif", frames=6)) == [255, 0, 0, 255, 128, 255]


def test_odd_sizes_keep_their_size(tmp_path):
    clip = read_video(BIKES, frames=2)[..., :63, :95]
    for name in ("a.mp4", "a.gif"):
        write_video(tmp_path / name, clip, 8)
        info = probe(tmp_path / name)
        assert (info.height, info.width) == (63, 95)
    assert psnr(clip, read_video(tmp_path / "a.mp4", frames=2, height=63, width=95)) > 38


def test_chunks_are_written_as_they_come(tmp_path):
    clip = read_video(CARPHONE, frames=20)
    write_video(tmp_path / "whole.mp4", clip, 8)
    write_video(tmp_path / "chunks.mp4", iter(clip.split([3, 8, 9], 1)), 8)
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "chunks.mp4").read_bytes()


def test_the_same_clip_is_the_same_file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    corners = 2 * torch.rand(30, 3, 4, 4, generator=generator) - 1
    clip = torch.nn.functional.interpolate(corners, (64, 64), mode="bilinear")[None]
    for number in range(8):
        write_video(tmp_path / f"{number}.mp4", clip, 8)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_values_are_rounded_and_clamped(tmp_path):
    """1.01 is white and not black, as it is where a cast wraps around."""
    clip = torch.tensor([1.01, -1.01, 3.0, -3.0]).view(1, 4, 1, 1, 1).expand(1, 4, 3, 32, 32)
    write_video(tmp_path / "a.gif", clip, 8)
    assert levels_of(read_video(tmp_path / "a.gif", frames=4)) == [255, 0, 255, 0]
    sheet = torch.full((1, 1, 3, 8, 8), 100.6 / 127.5 - 1)
    write_contact_sheet(tmp_path / "a.png", sheet)
    assert levels_of(read_image(tmp_path / "a.png")[:, None]) == [101]


def test_what_is_not_finite_is_named_and_not_written(tmp_path):
    clip = torch.zeros(1, 8, 3, 32, 32)
    for value in (math.nan, math.inf):
        clip[0, 5, 1, 2, 3] = value
        with pytest.raises(VideoError, match="frame 5: must be finite"):
            write_video(tmp_path / "a.mp4", iter(clip.split(3, 1)), 8)
    assert not list(tmp_path.iterdir())


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def chunks():
        yield torch.zeros(1, 8, 3, 32, 32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(path, chunks(), 8)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 2, 3, 32), "video must be"),
        ((2, 2, 3, 32, 32), "video must be"),
        ((1, 2, 4, 32, 32), "video must be"),
        ((1, 0, 3, 32, 32), "at least 1 frame"),
    ],
)
def test_what_is_no_clip_is_not_written(tmp_path, shape, message):
    with pytest.raises(VideoError, match=message):
        write_video(tmp_path / "a.mp4", torch.zeros(shape), 8)
    assert not list(tmp_path.iterdir())


def test_frames_are_of_one_size(tmp_path):
    chunks = [torch.zeros(1, 1, 3, 32, 32), torch.zeros(1, 1, 3, 16, 32)]
    with pytest.raises(VideoError, match="frame 1 must be 32x32"):
        write_video(tmp_path / "a.mp4", chunks, 8)


@pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf, 1e9, 1e-9, "8"])
def test_a_rate_must_be_one(tmp_path, fps):
    with pytest.raises(VideoError, match="fps must be"):
        write_video(tmp_path / "a.mp4", torch.zeros(1, 1, 3, 32, 32), fps)
    with pytest.raises(VideoError, match=r"a\.mp4: fps must be"):
        check_video_output(tmp_path / "a.mp4", fps)
    with pytest.raises(VideoError, match="fps must be"):
        open_video(BIKES, fps=fps)


def test_outputs_are_checked_before_work(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    check_video_output(path, 8, 480, 720)
    check_video_output(tmp_path / "b.GIF", 50)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    for values, message in (
        (("a.avi", 8), r"must end in one of \.mp4, .*; got \.avi"),
        (("a", 8), "got no suffix"),
        (("nowhere/a.mp4", 8), "folder that exists"),
        (("a.gif", 60), "at most 50; got 60"),
        (("a.mp4", 8, 0, 64), "got 0x64"),
        (("a.mp4", 8, 16, 16392), "1 to 16384.* got 16x16392"),
        (("a.mp4", 8, 16384, 16384), "67,108,864 pixels; got 16384x16384"),
    ):
        with pytest.raises(VideoError, match=message):
            check_video_output(tmp_path / values[0], *values[1:])
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(VideoError, match="must name a file; got the folder"):
        check_video_output(tmp_path / "folder.mp4")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to():
    """Permission bits do not say so, to root least of all."""
    with pytest.raises(VideoError, match=r"^/proc/a\.mp4: cannot be written: its folder cannot be"):
        check_video_output("/proc/a.mp4", 8)


def test_an_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(VideoError, match=r"must end in one of \.mp4"):
        write_video(tmp_path / "a.txt", torch.zeros(1, 1, 3, 32, 32), 8)
    with pytest.raises(VideoError, match="cannot be written|folder"):
        write_video(tmp_path / "nowhere" / "a.mp4", torch.zeros(1, 1, 3, 32, 32), 8)


def test_a_picture_is_read(tmp_path):
    clip = read_video(BIKES, frames=8)
    write_contact_sheet(tmp_path / "a.png", clip[:, :1])
    picture = read_image(tmp_path / "a.png", 272, 640)
    assert picture.shape == (1, 3, 272, 640) and (picture - clip[:, 0]).abs().max() < 1e-6
    assert read_image(tmp_path / "a.png", 96, 96).shape == (1, 3, 96, 96)
    write_contact_sheet(tmp_path / "b.png", clip, most=6)
    with av.open(tmp_path / "b.png") as file:
        pixels = next(file.decode()).to_ndarray(format="rgb24")
    gap = writing.GAP
    assert pixels.shape == (3 * 272 + 2 * gap, 2 * 640 + gap, 3)
    second = torch.from_numpy(pixels[:272, 640 + gap :]).movedim(2, 0) / 127.5 - 1
    assert (second - clip[0, 1]).abs().max() < 1e-6  # of six of eight
    assert (pixels[:, 640 : 640 + gap] == 128).all()  # gray, whatever the pictures are


def pixels_of(path):
    """The first channel of a picture, as it was before it was rounded to 8 bits."""
    with av.open(path) as file:
        pixels = next(file.decode()).to_ndarray(format="rgb24")
    return torch.from_numpy(pixels[..., 0]) / 127.5 - 1


@pytest.mark.parametrize(
    "count, most, chosen",
    [
        (1, 12, [0]),
        (5, 12, [0, 1, 2, 3, 4]),
        (17, 12, [0, 2, 4, 6, 8, 10, 12, 14, 16]),
        (49, 12, [0, 6, 12, 18, 24, 30, 36, 42, 48]),
        (8, 6, [0, 1, 3, 4, 6, 7]),  # 7 is a prime
    ],
)
def test_a_sheet_has_evenly_spaced_frames_with_the_last(tmp_path, count, most, chosen):
    clip = torch.linspace(-1, 1, count).view(1, -1, 1, 1, 1).expand(1, count, 3, 8, 8)
    write_contact_sheet(tmp_path / "a.png", clip, most)
    sheet = pixels_of(tmp_path / "a.png")
    pitch = 8 + writing.GAP
    rows, columns = (round((side + writing.GAP) / pitch) for side in sheet.shape)
    levels = [sheet[pitch * r + 4, pitch * c + 4] for r in range(rows) for c in range(columns)]
    wanted = torch.tensor([*(clip[0, n, 0, 0, 0] for n in chosen), *[1.0] * 9])
    assert (torch.stack(levels) - wanted[: len(levels)]).abs().max() < 0.01


def test_a_sheet_carries_its_sentence_and_the_numbers_of_its_frames(tmp_path):
    clip = torch.full((1, 17, 3, 200, 200), -0.5)
    write_contact_sheet(tmp_path / "a.png", clip, caption="A clip, of nothing")
    write_contact_sheet(tmp_path / "b.png", clip, caption="A clip, of something")
    write_contact_sheet(tmp_path / "c.png", clip, caption=" ".join(["long"] * 60))
    one, other, long = (pixels_of(tmp_path / f"{name}.png") for name in "abc")
    head, number = (writing._label(t, 600)[0] for t in ("A clip, of nothing", "frame 16"))
    high = head.shape[0]
    assert one.shape == (high + 3 * (200 + high) + 2 * writing.GAP, 3 * 200 + 2 * writing.GAP)
    assert head.min() == -1 and head.max() == 1
    assert (one[:high, :600] - head).abs().max() < 0.01
    assert (one[-high:, -200:] - number[:, :200]).abs().max() < 0.01
    assert not torch.equal(one[:high], other[:high]) and torch.equal(one[high:], other[high:])
    assert torch.equal(long[-one.shape[0] + high :], one[high:])  # its caption has more lines
    assert (long.shape[0] - one.shape[0]) % high == 0 and long.shape[0] > one.shape[0] + high


def test_jpeg_is_read(tmp_path):
    clip = read_video(CARPHONE, frames=1)
    with av.open(str(tmp_path / "a.jpg"), "w", format="image2") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.height, stream.width, stream.pix_fmt = 144, 176, "yuvj444p"
        stream.options = {"qscale": "1"}
        picture = writing._to_picture("frame", clip[0, 0])
        container.mux([*stream.encode(picture.reformat(format="yuvj444p")), *stream.encode(None)])
    assert psnr(read_image(tmp_path / "a.jpg"), clip[:, 0]) > 28


def test_too_few_frames_say_so():
    with pytest.raises(VideoError, match="at least 257 frames; got 250; the VAE takes 1, 8k or 8k"):
        open_video(BIKES, frames=257)
    with pytest.raises(VideoError, match="at least 81 frames at 8 a second; got 80"):
        open_video(BIKES, frames=81, fps=8)
    with pytest.raises(VideoError, match="at least 1 frames"):
        open_video(BIKES, frames=-1)


def test_without_pyav_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(VideoError, match=r"pip install cogvx\[video\]"):
        probe(BIKES)


def test_psnr():
    a = torch.zeros(1, 2, 3, 4, 4)
    assert psnr(a, a) == math.inf
    assert psnr(a, a + 0.2) == pytest.approx(20)
    measure = PSNR()
    measure.add(a, a)
    measure.add(a, a + 0.2)
    assert measure.decibels == pytest.approx(20 + 10 * math.log10(2))
    with pytest.raises(ValueError, match="shapes must be equal"):
        psnr(a, a[:, :1])
