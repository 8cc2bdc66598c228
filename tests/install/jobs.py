"""The job of each extra, done once: `python -I jobs.py EXTRA`, in an empty folder.

Python is that of an environment that holds the package with this extra alone, which
`tests.install.check` makes.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
SCRIPTS = Path(sysconfig.get_path("scripts"))


def output(*command):
    """Run a command; its standard output."""
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert ran.returncode == 0, f"{' '.join(map(str, command))}: status {ran.returncode}"
    return ran.stdout


def none():
    """Import, the commands, one op."""
    import torch

    import cogvx
    import cogvx_kernels

    for package in (cogvx, cogvx_kernels):
        assert Path(package.__file__).is_relative_to(sys.prefix), package.__file__
    assert "torch" in output(SCRIPTS / "cogvx-kernels", "doctor")
    assert output(SCRIPTS / "cogvx", "--version").startswith("cogvx ")
    x, angles = torch.randn(1, 5, 2, 8), torch.randn(3, 4)
    out = cogvx_kernels.rope3d(x, angles.cos(), angles.sin(), text_len=2)
    assert torch.equal(out[:, :2], x[:, :2]) and not torch.equal(out, x)


def text():
    """Embeddings of a prompt, by a T5 whose tokenizer is a spiece.model alone."""
    from cogvx.text import T5TextEncoder

    runpy.run_path(str(TESTS / "model" / "released_text.py"))["write_text_encoder"]("t5", 32)
    assert not Path("t5/tokenizer/tokenizer.json").exists()
    states = T5TextEncoder.from_pretrained("t5").encode(["rain falls on quiet leaves"], 226)
    assert states.shape == (1, 226, 32) and states.isfinite().all()


def video():
    """A clip through the VAE of the packaged model."""
    from cogvx.shapes import ProceduralClips
    from cogvx.video import write_video

    clip = ProceduralClips(frames=9, height=64, width=64)[0].video
    write_video("clip.mp4", clip[None], 8)
    command = (sys.executable, "-I", "-m", "cogvx", "reconstruct", "clip.mp4")
    found = json.loads(output(*command, "--model", "tiny", "--out", "again.mp4", "--json"))
    assert Path("again.mp4").stat().st_size > 1000 and found["psnr_db"] > 10, found


def train():
    """Two steps of adapters of the packaged model, with their curves."""
    from cogvx.training import Recipe, train

    steps = {"steps": 2, "batch_size": 1, "warmup": 0, "log_every": 1, "save_every": 2}
    recipe = {
        "model": "tiny",
        "data": {
            "clips": 2,
            "frames": 5,
            "height": 32,
            "width": 32,
            "workers": 0,
            "places": 16,
            "window": 3,
        },  # fmt: skip
        "transformer_training": {**steps, "sample_every": 2, "lora_rank": 2},
    }
    train(Recipe.from_dict(recipe), Path("lora"))
    for name in ("*.safetensors", "*.png"):
        assert list(Path("lora").rglob(name)), name


def bench():
    """A row of the benchmark suite, with its picture."""
    shutil.copytree(TESTS.parent / "benchmarks", "benchmarks")  # it is not part of the wheel
    options = ("--op", "gated_residual", "--providers", "eager", "--pass", "forward", "--quick")
    output(sys.executable, "-m", "benchmarks", *options, "--out", "out")
    assert len(Path("out/results.csv").read_text().splitlines()) > 1
    assert list(Path("out").glob("*.png"))


def ray():
    """A list of prompts on a cluster of this machine."""
    Path("list.jsonl").write_text('{"prompt": "a red circle moves right"}\n' * 2)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    command = (sys.executable, "-I", "-m", "cogvx", "generate", "--model", "tiny", "--ray")
    lines = ("--prompts", "list.jsonl", "--out", "videos", "--steps", "1")
    made = json.loads(output(*command, *lines, "--json"))
    assert (made["made"], made["failed"]) == (2, 0)


def generate():
    """A model as it is released, by path and by hub name: `cogvx generate` with a LoRA, and patch.

    With the extras text and video, and diffusers, which whoever patches its models has.
    """
    sys.path.append(str(TESTS.parent))  # behind the environment, whose packages are to run
    import torch
    from safetensors.torch import load_file, save_file

    from tests.model import tiny_pipeline
    from tests.model.hub_server import Hub

    tiny_pipeline.save_released(Path("model"))
    assert not Path("model/tokenizer/tokenizer.json").exists()
    layer = "transformer.transformer_blocks.0.attn1.to_out.0"
    width = tiny_pipeline.transformer_config("5b").hidden_size
    pair = {f"{layer}.lora_A.weight": (2, width), f"{layer}.lora_B.weight": (width, 2)}
    save_file({key: torch.ones(shape) for key, shape in pair.items()}, "lora.safetensors")
    small = ("--frames", "9", "--height", "32", "--width", "32", "--steps", "2", "--seed", "0")
    prompt = ("--prompt", "a panda plays the guitar")
    with Hub(Path("model")) as hub:
        os.environ.update(HF_ENDPOINT=hub.url, HF_HOME=str(Path("hub").resolve()))

        def made(model, out, *options):
            command = (sys.executable, "-I", "-m", "cogvx", "generate", "--model", model)
            output(*command, *prompt, *small, *options, "--out", f"{out}.mp4")
            return load_file(f"{out}.latents.safetensors")["latents"]

        plain = made("model", "plain")
        adapted = made("model", "adapted", "--lora", "lora.safetensors")
        assert (plain - adapted).abs().max() > 0.01
        assert torch.equal(adapted, made(hub.name, "of-the-hub", "--lora", "lora.safetensors"))
        program = Path(__file__).with_name("patched.py")
        assert (
            output(sys.executable, "-I", program, "model", hub.name).count("kernel 0, reference")
            == 10
        )


JOBS = {job.__name__: job for job in (none, text, video, train, bench, ray, generate)}

if __name__ == "__main__":
    JOBS[sys.argv[1]]()
