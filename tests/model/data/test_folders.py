"""Folders of videos with captions, and their latents."""

import json
import unicodedata

import pytest
import torch

from cogvx.checkpoint import CheckpointError
from cogvx.data import FolderClips, LatentClips, encode_clips, read_captions
from cogvx.data import latents as latents_module
from cogvx.factorized import build_vae
from cogvx.shapes import ProceduralClips
from cogvx.vae import CausalVAE
from cogvx.video import (
    PICTURE_SUFFIXES,
    SUFFIXES,
    VideoError,
    psnr,
    write_contact_sheet,
    write_video,
)

SIZE = (5, 16, 16)
CAPTIONS = {"a.mp4": "a red circle moves right", "b.mp4": "two of them", "c.mp4": ""}


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    clips = ProceduralClips(frames=9, height=32, width=32)
    for number, (name, caption) in enumerate(CAPTIONS.items()):
        write_video(folder / name, clips[number].video[None], 8)
        (folder / name).with_suffix(".txt").write_text(f"{caption}\n")
    return folder


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return CausalVAE.of(*build_vae(latent_channels=4, base_channels=4)).eval()


class Letters:
    """A text encoder: every token is the number of letters."""

    dim = 3

    def encode(self, prompts, max_length):
        return (
            torch.tensor([len(p) for p in prompts]).view(-1, 1, 1).expand(-1, max_length, 3) * 1.0
        )


def test_clips_have_their_captions(videos):
    clips = FolderClips(videos, 9, 32, 32)
    assert [clips[i].caption for i in range(len(clips))] == list(CAPTIONS.values())
    drawn = ProceduralClips(frames=9, height=32, width=32)
    assert clips[1].video.shape == (9, 3, 32, 32)
    assert psnr(clips[1].video[None], drawn[1].video[None]) > 25  # 4:2:0 halves the colours
    assert FolderClips(videos, *SIZE)[0].video.shape == (5, 3, 16, 16)


def test_captions_in_metadata(videos):
    for text in videos.glob("*.txt"):
        text.unlink()
    lines = [json.dumps({"file_name": n, "text": t}) for n, t in CAPTIONS.items()]
    (videos / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    assert read_captions(videos) == CAPTIONS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "b.txt").unlink(), r"b\.mp4: no caption"),
        (lambda folder: [p.unlink() for p in folder.glob("*")], "got 0 videos"),
        (lambda folder: (folder / "metadata.jsonl").write_text('{"text": "x"}\n'), "line 1: must"),
        (lambda folder: (folder / "metadata.jsonl").write_text("{\n"), "line 1"),
        (
            lambda folder: (folder / "metadata.jsonl").write_text(
                '{"file_name": "../a.mp4", "text": "x"}\n'
            ),
            "plain name",
        ),
        (
            lambda folder: (folder / "metadata.jsonl").write_text(
                '{"file_name": "/a.mp4", "text": "x"}\n'
            ),
            "inside the folder",
        ),
        (
            lambda folder: (folder / "metadata.jsonl").write_text(
                '{"file_name": "a.mp4", "text": "x"}\n{"file_name": "./a.mp4", "text": "y"}\n'
            ),
            "line 2: must name each clip once",
        ),
        (lambda folder: (folder / "a.txt").write_bytes(b"caf\xe9"), r"a\.txt: must be .* UTF-8"),
        (lambda folder: (folder / "a.txt").write_text("x" * 70_000), r"a\.txt: must have at most"),
        (
            lambda folder: [(folder / "b.txt").unlink(), (folder / "c.h264").touch()],
            r"b\.mp4: no caption\n *c\.h264: neither video nor caption",
        ),
        (
            lambda folder: (folder / "metadata.jsonl").write_text(
                '{"file_name": "a.txt", "text": "x"}\n'
            ),
            r"a\.txt: no video",
        ),
    ],
    ids=[
        "silent", "empty", "nameless", "torn", "outside", "root", "twice", "latin", "long",
        "other files", "no video",
    ],
)  # fmt: skip
def test_bad_folders_are_refused(videos, change, message):
    change(videos)
    with pytest.raises(ValueError, match=message):
        read_captions(videos)


NAMES = [
    "my clip (1).mp4",
    "IMG_0001.MP4",
    "a#b+c&d;e'f%20.mp4",
    "caf\u00e9 \u732b \U0001f600.mp4",
    "one.two.three.mp4",
    "-dash.mp4",
    "x" * 240 + ".mp4",
]


@pytest.mark.parametrize("metadata", [False, True])
def test_names_may_have_any_characters(videos, tmp_path, metadata):
    folder = tmp_path / "named"
    (folder / "day 2").mkdir(parents=True)
    names = [*NAMES, "day 2/again.mp4"]
    for name in names:
        (folder / name).symlink_to(videos / "a.mp4")  # links may lead elsewhere
        if not metadata:
            (folder / name).with_suffix(".txt").write_text(f"\ufeff{name}", encoding="utf-8")
    if metadata:
        spelled = [unicodedata.normalize("NFD", name) for name in names]
        lines = [
            json.dumps({"file_name": n, "text": t}) for n, t in zip(spelled, names, strict=True)
        ]
        lines[0] = json.dumps(
            {"file_name": f"./{names[0]}", "text": "a\u2028b"}, ensure_ascii=False
        )
        (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    wanted = {name: name for name in names}
    if metadata:
        wanted[names[0]] = "a\u2028b"  # a separator of lines in Unicode, not in JSON
    assert read_captions(folder) == wanted
    clips = FolderClips(folder, *SIZE)
    assert clips[clips.names.index("my clip (1).mp4")].video.shape == (5, 3, 16, 16)


def test_all_suffixes_of_open_video_are_clips(tmp_path):
    for number, suffix in enumerate(SUFFIXES):
        (tmp_path / f"{number}{suffix}").touch()
        (tmp_path / f"{number}.txt").touch()
    assert len(read_captions(tmp_path, pictures=True)) == len(SUFFIXES)
    assert {".ts", ".m4v", ".flv", ".wmv", ".mpg", ".ogv", ".3gp", ".webp", ".png"} < {*SUFFIXES}
    with pytest.warns(match=r"(?s)left out, .*jpg"):
        clips = FolderClips(tmp_path, 9, 16, 16)
    assert len(clips) == len(SUFFIXES) - len(PICTURE_SUFFIXES)


def test_other_files_are_listed(videos, tmp_path):
    for name in ("notes.pdf", "d.txt", "raw.h264", ".hidden.mp4", "._a.mp4", ".DS_Store"):
        (videos / name).touch()
    (videos / "more").symlink_to(tmp_path)
    with pytest.warns(match=r"3 clips; left out") as caught:
        clips = FolderClips(videos, *SIZE)
    assert clips.left_out == [".hidden.mp4", "d.txt", "more/", "notes.pdf", "raw.h264"]
    assert all(name in str(caught[0].message) for name in clips.left_out)


def test_images_are_clips_of_one_frame(tmp_path):
    write_contact_sheet(tmp_path / "a.png", torch.zeros(1, 1, 3, 16, 16))
    (tmp_path / "a.txt").write_text("gray")
    assert FolderClips(tmp_path, 1, 16, 16)[0].video.shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"got 0 videos\n *a\.png: neither"):
        FolderClips(tmp_path, 5, 16, 16)


def test_short_videos_are_refused(videos):
    with pytest.raises(VideoError, match=r"a\.mp4"):
        FolderClips(videos, 49, 16, 16)[0]


@pytest.mark.parametrize("texts", [None, Letters()], ids=["no text", "text"])
def test_latents_are_those_of_the_vae(videos, vae, tmp_path, monkeypatch, texts):
    """Two files of them, so that the numbers go on from one to the next."""
    monkeypatch.setattr(latents_module, "CLIPS_PER_FILE", 2)
    clips, progress = FolderClips(videos, *SIZE), []
    made = encode_clips(
        clips, vae, tmp_path / "latents", text_encoder=texts, text_length=4,
        progress=lambda *now: progress.append(now),
    )  # fmt: skip
    assert progress == [(2, 3), (3, 3)] and len(made) == 3
    assert sorted(p.name for p in (tmp_path / "latents").iterdir()) == [
        "latents-00000.safetensors",
        "latents-00001.safetensors",
    ]
    for index in range(3):
        clip, latent = clips[index], made[index]
        with torch.no_grad():
            expected = vae.encode(clip.video[None]).moments[0].half()
        torch.testing.assert_close(latent.moments, expected, rtol=1e-2, atol=1e-3)
        assert latent.caption == clip.caption
        assert (latent.text is None) == (texts is None)
        if texts is not None:
            assert latent.text.unique().tolist() == [len(clip.caption)]
    assert (made.empty is None) == (texts is None)


def test_interrupted_encoding_is_resumed(videos, vae, tmp_path, monkeypatch):
    monkeypatch.setattr(latents_module, "CLIPS_PER_FILE", 1)
    clips = FolderClips(videos, *SIZE)

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_clips(clips, vae, tmp_path / "latents", progress=stop)
    with pytest.raises(CheckpointError, match="must hold 3 clips; got 1: go on"):
        LatentClips(tmp_path / "latents", vae)
    progress = []
    made = encode_clips(
        clips, vae, tmp_path / "latents", progress=lambda *now: progress.append(now)
    )
    assert progress == [(2, 3), (3, 3)] and [made[i].caption for i in range(3)] == made.captions
    (tmp_path / "latents" / "latents-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="a file before it is missing"):
        LatentClips(tmp_path / "latents", vae)


def test_processes_share_the_files(videos, vae, tmp_path, monkeypatch):
    """Each writes some, and all are there in the end, the same as one alone writes."""
    monkeypatch.setattr(latents_module, "CLIPS_PER_FILE", 1)
    clips, shared, written = FolderClips(videos, *SIZE), tmp_path / "shared", []

    def count():
        written.append(len(list(shared.iterdir())))

    def other():
        count()
        encode_clips(clips, vae, shared, process=1, processes=2, wait=count)

    made = encode_clips(clips, vae, shared, process=0, processes=2, wait=other)
    assert written == [2, 3]
    alone = encode_clips(clips, vae, tmp_path / "alone")
    assert made.captions == alone.captions == [clip.caption for clip in clips]
    assert all(torch.equal(made[i].moments, alone[i].moments) for i in range(len(alone)))


def test_latents_of_another_vae_are_refused(videos, vae, tmp_path):
    clips = FolderClips(videos, *SIZE)
    encode_clips(clips, vae, tmp_path / "latents")
    other = CausalVAE.of(*build_vae(latent_channels=4, base_channels=4))
    with pytest.raises(CheckpointError, match=r"vae\.weights"):
        LatentClips(tmp_path / "latents", other)
    with pytest.raises(CheckpointError, match=r"vae\.weights"):
        encode_clips(clips, other, tmp_path / "latents")
    with pytest.raises(CheckpointError, match="must hold latents-00000"):
        LatentClips(videos, vae)
