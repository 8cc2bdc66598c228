"""Refusals of a command before weights are read; its locks, messages and files meanwhile."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cogvx import cli
from cogvx.cli import console as consoles
from cogvx.cli import jobs, loading, outputs
from cogvx.cli.console import Console
from cogvx.cli.parser import make
from cogvx.config import PRESETS
from cogvx.pipeline import CogVideoX, default_dtype
from cogvx.video import write_video

from . import tiny_pipeline

ROOT = Path(__file__).resolve().parents[2]
PROMPT = ["--prompt", "a panda"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a text-to-video and an image-to-video model, without a text encoder; a clip."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("5b", "5b-i2v"):
        pipe = tiny_pipeline.tiny(kind)
        pipe.text_encoder = None
        pipe.save_pretrained(folder / kind)
    write_video(folder / "clip.mp4", torch.zeros(1, 9, 3, 32, 32), 8)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def clip(here, models):
    (here / "clip.mp4").write_bytes((models / "clip.mp4").read_bytes())


@pytest.fixture
def no_weights(monkeypatch):
    """No weights are read."""

    def fail(*rest, **more):
        raise AssertionError("weights were read")

    monkeypatch.setattr(CogVideoX, "from_pretrained", fail)
    monkeypatch.setattr(loading, "load_vae", fail)


@pytest.fixture
def pipe(monkeypatch):
    """The model that a command loads, whichever it is."""
    pipe = tiny_pipeline.tiny()
    monkeypatch.setattr(CogVideoX, "from_pretrained", lambda *rest, **more: pipe)
    return pipe


def run(capsys, *words):
    status = cli.main([str(word) for word in words])
    seen = capsys.readouterr()
    return status, seen.out, seen.err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--steps", "2000"], "--steps must be"),
        (["--tiling", "10x10"], "--tiling must have a height that is a multiple of 8"),
        (["--frames", "12"], "--frames must have"),
        (["--width", "100"], "multiple of 16"),
        (["--height", "7"], "multiple of 16"),
        (
            ["--image", "clip.mp4"],
            "--image must be left out; got one: this is a text-",
        ),
        (["--video", "no.mp4"], "no.mp4"),
        (["--video", "clip.mp4", "--steps", "1", "--strength", "0.5"], "--strength must"),
        (["--lora", "no.safetensors"], "no.safetensors"),
        (["--lora", "clip.mp4"], "clip.mp4"),
        (["--lora-scale", "2"], "--lora-scale must come with --lora"),
        (["--lora", "a", *("--lora-scale", "2") * 2], "--lora-scale must be given once"),
        (["--model", "CogVideoX"], "THUDM/CogVideoX-5b; got no folder of that name"),
        (["--model", "."], "THUDM/CogVideoX-5b; got one without them"),
        (["--device", "moon"], "--device must be one of those that are here, cpu"),
        (["--device", "meta"], "--device must be one of those that are here, cpu"),
        (["--device", "cpu:1"], "--device must be one of those that are here, cpu"),
        (["--vram-budget", "1K"], "must fit"),
        (["--resume"], "--resume"),
        (["--fps", "60", "--out", "a.gif"], "50"),
        (["--out", "a.avi"], "--out must end in .mp4"),
        (["--out", "no/a.mp4"], "--out must be a file in a folder that exists"),
        (["--profile", "a.txt"], "--profile must end in .json; got a.txt"),
        (["--profile", "no/a.json"], "--profile must be a file in a folder that exists"),
        (["--profile", "/proc/a.json"], "--profile must be where a file can be written"),
        (["--out", "/proc/a.mp4"], "--out must be where a file can be written; got /proc/a.mp4"),
    ],
)
def test_generate_refuses_at_once(capsys, here, models, clip, no_weights, words, message):
    command = ["generate", "--model", models / "5b", *PROMPT, "--out", "a.mp4", *words]
    status, out, err = run(capsys, *command)
    assert (status, out) == (1, "") and message in err and err.count("\n") == 1
    assert [path.name for path in here.iterdir()] == ["clip.mp4"]


def test_a_profile_is_refused_at_once(capsys, here, models, no_weights, monkeypatch):
    """NVTX ranges without CUDA; one file for many videos."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["generate", "--model", models / "5b", "--out", "a.mp4", "--profile", "nvtx"]
    status, _, err = run(capsys, *command, *PROMPT)
    assert status == 1 and "--profile must be a .json file where there is no CUDA device" in err
    status, _, err = run(capsys, *command, "--prompts", "list.jsonl")
    assert status == 1 and "--profile must come with --prompt; got --prompts" in err


def test_an_image_to_video_model_refuses_at_once(capsys, here, models, no_weights):
    command = ["generate", "--model", models / "5b-i2v", *PROMPT, "--out", "a.mp4"]
    assert "--image must be given" in run(capsys, *command)[2]
    (here / "no.png").write_bytes(b"no picture")
    assert "no.png" in run(capsys, *command, "--image", "no.png")[2]


@pytest.mark.parametrize(
    "words, message",
    [
        (["encode", "clip.mp4", "--out", "a.safetensors", "--tiling", "10x10"], "--tiling must"),
        (["encode", "no.mp4", "--out", "a.safetensors"], "no.mp4"),
        (["encode", "clip.mp4", "--out", "a.safetensors", "--frames", "12"], "--frames must"),
        (["reconstruct", "no.mp4", "--out", "a.mp4"], "no.mp4"),
        (["reconstruct", "clip.mp4", "--out", "a.gif", "--fps", "100"], "50"),
        (["decode", "clip.mp4", "--out", "a.mp4"], "clip.mp4"),
        (["decode", "no.safetensors", "--out", "a.mp4"], "no.safetensors"),
        (["convert", "no.pt"], "--out DIR"),
    ],
)
def test_others_refuse_at_once(capsys, here, models, clip, no_weights, words, message):
    vae = [] if words[0] == "convert" else ["--model", models / "5b"]
    status, out, err = run(capsys, *words, *vae)
    assert (status, out) == (1, "") and message in err
    assert [path.name for path in here.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("fps", ["0", "-1", "1000000", "nan"])
@pytest.mark.parametrize("command", ["generate", "encode", "decode", "reconstruct"])
def test_no_rate_is_changed(capsys, command, fps):
    status, _, err = run(capsys, command, "x", "--out", "a.mp4", f"--fps={fps}")
    assert status == 2 and "argument --fps: must be" in err


def test_dtypes_of_models():
    def dtype(preset, *words):
        options = make().parse_args(["score", *words])
        return loading.dtype_of(options, PRESETS[preset].transformer)

    assert dtype("2b", "--device", "cpu") == torch.float32
    assert dtype("2b", "--dtype", "bf16") == torch.bfloat16
    assert default_dtype(PRESETS["2b"].transformer, "cuda") == torch.float16
    assert default_dtype(PRESETS["5b"].transformer, "cuda") == torch.bfloat16


def test_gpu_means_cuda(monkeypatch):
    monkeypatch.setattr(loading, "devices", lambda: ["cpu", "cuda", "cuda:0"])
    for words in (["--device", "gpu"], ["--device", "cuda"], []):
        assert loading.device_of(make().parse_args(["score", *words])) == torch.device("cuda")
    with pytest.raises(ValueError, match="cpu, cuda, cuda:0; got cuda:1"):
        loading.device_of(make().parse_args(["score", "--device", "cuda:1"]))


HOLD = """
import sys
from contextlib import ExitStack
from pathlib import Path
from cogvx.cli.outputs import claimed
with ExitStack() as stack:
    for name in sys.argv[1:]:
        stack.enter_context(claimed(Path(name)))
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_two_commands_with_one_output(capsys, here, models, clip, no_weights):
    """The second fails, even with --force; files of a killed one do not matter."""
    names = ["a.mp4", "b.latents.safetensors", "latents", "run"]
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, *names],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout.readline() == "held\n"
    model = ["--model", models / "5b"]
    for words in (
        ["generate", *model, *PROMPT, "--out", "a.mp4", "--force"],
        ["generate", *model, *PROMPT, "--out", "b.mp4", "--force"],
        ["reconstruct", "clip.mp4", *model, "--out", "a.mp4", "--force"],
        ["decode", "x.safetensors", *model, "--out", "a.mp4", "--force"],
        ["encode", "clip.mp4", *model, "--out", "b.latents.safetensors", "--force"],
        ["encode", ".", *model, "--out", "latents"],
        ["train", "tiny", "--out", "run"],
        ["convert", "x.pt", "--out", "run", "--force"],
    ):
        status, _, err = run(capsys, *words)
        assert status == 1 and "another command is writing it" in err, words
    other.kill()
    other.communicate()
    assert len(list(here.glob(".*.lock"))) == len(names)
    for name in names:
        with outputs.claimed(Path(name)):
            pass
    assert [path.name for path in here.iterdir()] == ["clip.mp4"]


def test_a_second_signal_ends_at_once():
    """The first raises; then the system's own handlers are there, which wait for nothing."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for number, error in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, cli.Terminated)):
            with cli._signals():
                with pytest.raises(error):
                    signal.raise_signal(number)
                    time.sleep(1)
                assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
            assert signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with cli._signals():
            signal.raise_signal(signal.SIGINT)  # as in a background job
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_the_checkpoint(capsys, here, models, pipe, monkeypatch, number, status):
    """In the third step; and --resume goes on, with the seed of the record."""
    progress = Console.progress

    def interrupt(console, stage, done=0, total=None):
        progress(console, stage, done, total)
        if (stage, done) == ("denoise", 3):
            os.kill(os.getpid(), number)
            time.sleep(1)

    words = ["generate", "--model", models / "5b", *PROMPT, "--out", "a.mp4", "--steps", "4"]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Console, "progress", interrupt)
            code, _, err = run(capsys, *words, "--seed", "1234567", "--checkpoint-every", "2")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert code == status and err.startswith(("cogvx: interrupted", "cogvx: terminated"))
    assert [path.name for path in here.iterdir()] == ["a.latents.safetensors"]
    code, out, _ = run(capsys, *words, "--resume")
    assert code == 0 and "seed     1234567\n" in out


def test_a_lora_is_loaded(capsys, here, models, pipe, monkeypatch):
    """Each file with its scale, or one scale for all."""
    loaded = []
    monkeypatch.setattr(jobs, "read_lora", lambda path, model: {})
    monkeypatch.setattr(pipe, "load_lora", lambda path, scale: loaded.append((str(path), scale)))
    words = ["generate", "--model", models / "5b", *PROMPT, "--out", "a.mp4", "--steps", "1",
             "--force", "--lora", "a", "--lora", "b", "--lora-scale"]  # fmt: skip
    assert run(capsys, *words, "0.5")[0] == 0
    assert run(capsys, *words, "1", "--lora-scale=-2")[0] == 0
    assert loaded == [("a", 0.5), ("b", 0.5), ("a", 1.0), ("b", -2.0)]


def test_long_runs_say_so_first(capsys, here, models, no_weights, monkeypatch):
    """By a rate that is given; where no device takes long, none is measured."""
    options = make().parse_args(
        ["generate", "--model", str(models / "5b"), *PROMPT, "--out", "a.mp4"]
    )
    with Console(quiet=False, as_json=True) as console:

        def warn(flops):
            loading.warn_if_long(console, flops, torch.device("cpu"), torch.float32)
            return capsys.readouterr().err

        with monkeypatch.context() as patch:
            patch.setattr(loading, "matmul_rate", None)
            assert warn(jobs.Job.of(options, jobs.Model.of(options)).flops) == ""
        monkeypatch.setattr(loading, "matmul_rate", lambda device, dtype: 5e10)
        assert warn(2e13) == ""
        assert "about 3 h 20 min on cpu in float32 (estimated from 6.0e+14 operations" in warn(6e14)


def test_a_rate_is_measured():
    assert 1e7 < loading.matmul_rate(torch.device("cpu"), torch.float32, seconds=0.01) < 1e15


def test_progress_where_there_is_no_terminal(monkeypatch):
    """A line now and then, also while nothing is done; none if quiet."""

    def wait_for(words):
        deadline = time.monotonic() + 10
        while words not in sys.stderr.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        return words in sys.stderr.getvalue()

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Console(quiet=False, as_json=False, every=0.01) as console:
        console.progress("load weights")
        assert wait_for("load weights, 0:00 elapsed\n")
        console.progress("denoise", 2, 50)
        console.progress("denoise", 12, 50)
        assert wait_for("denoise 12/50, 0:00 elapsed, about 0:00 left\n")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Console(quiet=True, as_json=False, every=0.01) as console:
        console.progress("load weights")
        time.sleep(0.05)
    assert sys.stderr.getvalue() == ""


def test_clocks():
    assert [consoles.clock(n) for n in (0, 65, 7380)] == ["0:00", "1:05", "2:03:00"]
    assert [loading.duration(n) for n in (660, 12000)] == ["11 min", "3 h 20 min"]
    assert loading.duration(2.1e8) == "2,431 days"


@pytest.mark.parametrize("patch, fps", [(None, 8), (1, 8), (2, 16)])
def test_only_models_that_patch_frames_are_at_16_fps(patch, fps):
    config = tiny_pipeline.transformer_config("5b", patch_size_t=patch)
    assert loading.usual_fps(config) == fps and loading.usual_fps(None) == 8
