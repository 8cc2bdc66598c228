"""`cogvx demo`: refused arguments, files and output."""

import errno
import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from cogvx import cli
from cogvx.cli import clips
from cogvx.pipeline import CogVideoX
from cogvx.shapes import commands, parse, score
from cogvx.shapes.reading import read
from cogvx.video import probe, write_video

CIRCLE = "a red circle moves right"
FILES = [f"a-red-circle-moves-right-seed0{suffix}" for suffix in (".gif", ".mp4", ".png")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """Replace generation by zeros; returns the list of seeds."""
    seeds = []

    def generate(self, prompt, *, seed, **options):
        assert _get_current_dispatch_mode() is None, "nothing is counted while it is timed"
        seeds.append(seed)
        return torch.zeros(1, 5, 3, 16, 16)

    monkeypatch.setattr(CogVideoX, "generate", generate)
    return seeds


def run(capsys, *words):
    """(exit status, stdout, stderr)."""
    status = cli.main(["demo", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_output_lists_the_files(capsys, here, quick):
    status, out, err = run(capsys)
    assert (status, err) == (0, "") and quick == [0, 1, 2]
    assert len(names("out")) == 9 and len(out.splitlines()) < 15
    first = "a-large-blue-circle-moves-up-and-a-small-blue-circle-moves-down-on-white-seed0.png"
    assert out.endswith(f"look at {Path('out', first)} first\n")
    for text in (*commands.PROMPTS, *commands.SUFFIXES, *commands.SUFFIXES.values(), "made in out"):
        assert text in out
    info = probe(next(Path("out").glob("*.mp4")))
    assert (info.frames, info.height, info.width, info.fps) == (5, 64, 64, 8)


def test_files_are_named_by_seed_and_not_overwritten(capsys, here, quick):
    assert run(capsys, "--prompt", CIRCLE)[0] == 0
    assert run(capsys, "--prompt", CIRCLE, "--seed", 7)[0] == 0
    assert names("out") == sorted([*FILES, *(name.replace("seed0", "seed7") for name in FILES)])
    Path("out", FILES[0]).write_bytes(b"mine")
    status, _, err = run(capsys, "--prompt", CIRCLE)
    assert status == 1 and "exists already; --force replaces it" in err and quick == [0, 7]
    assert Path("out", FILES[0]).read_bytes() == b"mine"
    assert run(capsys, "--prompt", CIRCLE, "--force")[0] == 0
    assert Path("out", FILES[0]).read_bytes() != b"mine"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--clip", "no.mp4"], "no.mp4"),
        (["--clip", "short.mp4"], "short.mp4"),
        (["--prompt", "a red ball moves right"], "got 'ball'"),
        (["--out", "short.mp4"], "short.mp4"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_refused_before_weights_are_read(
    capsys, here, quick, words, message, monkeypatch
):
    def fail(*rest, **more):
        raise AssertionError("weights were read")

    write_video("short.mp4", torch.zeros(1, 2, 3, 64, 64), 8)
    monkeypatch.setattr(CogVideoX, "from_pretrained", fail)
    status, out, err = run(capsys, *words)
    assert (status, out) == (1, "") and message in err and err.count("\n") == 1
    assert names(".") == ["short.mp4"]


def test_full_disk_leaves_no_file(capsys, here, quick, monkeypatch):
    def full(*rest, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(commands, "write_contact_sheet", full)
    assert run(capsys, "--prompt", CIRCLE)[0] == 1
    assert names("out") == []


def test_clip_is_reconstructed(capsys, here, quick):
    write_video("Müll & mehr.mp4", torch.zeros(1, 17, 3, 64, 64), 8)
    words = ["--prompt", CIRCLE, "--clip", "Müll & mehr.mp4"]
    status, out, _ = run(capsys, *words)
    assert status == 0 and "a real clip comes back blurred" in out
    assert names("out") == sorted([*FILES, "m-ll-mehr-reconstructed.mp4"])
    status, out, _ = run(capsys, *words, "--force", "--json")
    last = json.loads(out)["runs"][-1]
    assert (
        status == 0
        and last["psnr_db"] > 20
        and last["files"] == [str(Path("out", "m-ll-mehr-reconstructed.mp4"))]
    )


def test_reconstruct_counts_no_bytes_while_timed(capsys, here, monkeypatch):
    def write(*rest):
        assert _get_current_dispatch_mode() is None
        return write_video(*rest)

    monkeypatch.setattr(clips, "write_video", write)
    write_video("a.mp4", torch.zeros(1, 5, 3, 32, 32), 8)
    words = ["reconstruct", "a.mp4", "--vae", "random", "--base-channels", "4", "--out", "b.mp4"]
    assert cli.main(words) == 0


def test_clips_of_tiny_show_their_prompts(auto_is_what_a_cpu_has):
    """Sizes too."""
    pipe = CogVideoX.from_pretrained("tiny")
    sizes = set()
    for seed, prompt in enumerate(commands.PROMPTS):
        video = pipe.generate(prompt, steps=30, guidance=1, seed=seed)[0]
        scene, seen = parse(prompt), read(video)
        assert score(video, scene).all, prompt
        assert sorted(t.size for t in seen.things) == sorted(t.size for t in scene.things)
        sizes.add(frozenset(thing.size for thing in seen.things))
    assert frozenset(("small", "large")) in sizes
