"""The benchmarks as a program: what they write, what they refuse. Nothing here is timed."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cogvx_kernels.testing import OPS, SIZES
from tests.harness.selection import rest

from .model.training.recipes import small

ROOT = Path(__file__).resolve().parent.parent

ABSOLUTE = ("median_ms", "p25_ms", "p75_ms", "gb_per_s", "tflop_per_s", "copy_gb_per_s")
COLUMNS = (
    "op size convention pass provider dtype device median_ms p25_ms p75_ms gb_per_s "
    "percent_of_copy tflop_per_s percent_of_matmul ratio_to_eager noise_percent note commit date "
    "torch triton cuda driver device_name sm_clock_mhz copy_gb_per_s command"
).split()
ON_CPU = ("--device", "cpu", "--size", "tiny", "--quick")

# A rotation that turns the text too: right wherever there is none.
PLANT = """
import dataclasses, sys
from cogvx_kernels import testing

info = testing.OPS["rope3d"]
def wrong(x, cos, sin, *, text_len, interleaved, backend):
    return info.reference(x, cos, sin, text_len=text_len, interleaved=interleaved).roll(1, 1)
testing.OPS["rope3d"] = dataclasses.replace(info, {field}=wrong)
from benchmarks.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """python with these words, in the root; by default kernels are not interpreted.

    In one thread: beside other tests two would wait for each other most of the time.
    """
    return subprocess.run(
        (sys.executable, *words),
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def bench(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "benchmarks", *words, **environment)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on a CPU, and its folder."""
    out = tmp_path_factory.mktemp("bench")
    words = ("--op", "rope3d", *ON_CPU, "--providers", "cogvx-auto", "--out", str(out))
    done = bench(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, out


def test_writes_rows_with_their_company(finished):
    _, out = finished
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert [(row["pass"], row["provider"]) for row in rows] == [
        (which, name) for which in ("forward", "backward") for name in ("eager", "cogvx-auto")
    ]
    for row in rows:
        assert row["op"] == "rope3d" and row["size"] == "tiny" and row["note"]
        assert all(row[name] for name in ("commit", "date", "torch", "device_name", "command"))
        assert float(row["ratio_to_eager"]) > 0


def test_shows_no_absolute_time_of_a_cpu(finished):
    done, out = finished
    with (out / "results.csv").open(newline="") as file:
        assert all(row[name] == "" for row in csv.DictReader(file) for name in ABSOLUTE)
    written = json.loads((out / "rope3d-tiny-float32-cpu.json").read_text())
    assert written["conditions"]["copy_gb_per_s"] is None
    assert all(row[name] is None for row in written["rows"] for name in ABSOLUTE[:-1])
    assert "no kernel is timed" in done.stdout and " GB/s ·" not in done.stdout


def test_command_in_the_row_names_no_folder(finished):
    _, out = finished
    command = json.loads((out / "rope3d-tiny-float32-cpu.json").read_text())["conditions"][
        "command"
    ]
    assert command.startswith("python -m benchmarks --op rope3d") and str(out) not in command


def test_draws_a_picture_or_says_why_not(finished):
    done, out = finished
    picture = out / "rope3d-tiny-float32-cpu.png"
    if picture.exists():
        assert picture.read_bytes().startswith(b"\x89PNG")
    else:
        assert "matplotlib is not installed" in done.stdout


def test_a_wrong_kernel_is_not_timed(tmp_path):
    words = ("--op", "rope3d", *ON_CPU, "--providers", "cogvx-auto", "--out", str(tmp_path))
    done = run("-c", PLANT.replace("{field}", "op"), *words)
    assert done.returncode == 1, done.stderr
    assert "outside the rule" in done.stdout and "cogvx-auto, model: out0: error" in done.stdout
    assert "x eager" not in done.stdout and not list(tmp_path.iterdir())


def test_a_wrong_peer_gets_no_row(tmp_path):
    plant = PLANT.replace("{field}=wrong", 'peers={"them": lambda **a: wrong(**a, backend="")}')
    words = ("--op", "rope3d", *ON_CPU, "--providers", "them", "--out", str(tmp_path))
    done = run("-c", plant, *words)
    assert done.returncode == 1, done.stderr
    assert "refused, its results are wrong: them" in done.stdout
    rows = json.loads((tmp_path / "rope3d-tiny-float32-cpu.json").read_text())["rows"]
    assert {row["provider"] for row in rows} == {"eager"}


@pytest.mark.slow
def test_the_interpreter_is_checked_and_never_timed(tmp_path):
    pytest.importorskip("triton")
    words = ("--op", "rope3d", *ON_CPU, "--providers", "cogvx", "--out", str(tmp_path))
    done = bench(*words, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rope3d-tiny-float32-cpu.json").read_text())["rows"]
    interpreted = [row for row in rows if row["provider"] == "cogvx"]
    assert interpreted and all("never timed" in row["note"] for row in interpreted)
    assert all(row["ratio_to_eager"] is None for row in interpreted)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--op", "rope4d"), ("rope4d", *OPS)),
        (("--size", "6b"), ("6b", *SIZES)),
        (("--providers", "nobody"), ("nobody", "eager", "compile")),
        (("--op", "expert_ffn", "--conventions", "nobody"), ("nobody", "model", "top-2")),
    ],
)
def test_an_unknown_name_is_answered_with_the_known(words, named):
    done = bench(*words)
    assert done.returncode == 2
    assert all(name in done.stderr for name in named)


def test_list_names_everything():
    done = bench("--list")
    assert done.returncode == 0
    assert all(name in done.stdout for name in (*OPS, *SIZES, "diffusers-eager", "liger"))


def test_times_the_calls_that_are_asked_for(tmp_path):
    calls = ("text and video experts", "4 experts, top-1")
    words = ("--op", "expert_ffn", *ON_CPU, "--pass", "forward", "--providers", "split-cat")
    done = bench(*words, "--conventions", *calls, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "expert_ffn-tiny-float32-cpu.json").read_text())["rows"]
    assert [(row["convention"], row["provider"]) for row in rows] == [
        (call, name) for call in calls for name in ("eager", "split-cat")
    ]


# --- parts of the model ------------------------------------------------------------------------

# A decoder that is right but for one pixel.
PLANT_IN_MODEL = """
import sys
from cogvx import vae

right = vae.CausalVAE.decode
def wrong(self, latents):
    video = right(self, latents)
    video[0, -1, 0, 3, 5] += 0.01
    return video
vae.CausalVAE.decode = wrong
from benchmarks.model import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_wrong_part_is_not_timed(tmp_path):
    pytest.importorskip("diffusers")
    words = ("--part", "vae-decode", "--size", "tiny", "--providers", "cogvx", "--device", "cpu")
    done = run("-c", PLANT_IN_MODEL, *words, "--out", str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "outputs of cogvx differ" in done.stdout
    assert "speed" not in done.stdout and not list(tmp_path.iterdir())


def test_both_halves_of_the_vae_have_rows(tmp_path):
    """Of both layouts of diffusers', patched too, both backends of ours; of what is compiled a
    reason."""
    pytest.importorskip("diffusers")
    parts = ("--part", "vae-decode", "--part", "vae-encode")
    words = (*parts, "--size", "tiny", "--laps", "2", "--budget", "0.01", "--device", "cpu")
    done = run("-m", "benchmarks.model", *words, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "model.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    sides = ("diffusers", "diffusers-channels-last", "diffusers-patched", "diffusers-patched-fast")
    sides = (*sides, "cogvx", "cogvx-reference")
    assert [(row["part"], row["provider"]) for row in rows] == [
        (part, side) for part in ("vae-decode", "vae-encode") for side in sides
    ]
    assert all(float(row["speed"]) > 0 and float(row["peak_mib"]) > 0 for row in rows)
    assert all(row["median_ms"] == "" == row["gpu_mib"] for row in rows)
    assert done.stdout.count("left out: diffusers-compile") == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", rest("bfloat16")])
def test_a_block_on_kernels_saves_little(tmp_path, dtype):
    """Of what diffusers keeps for the backward at most 0.6, with equal gradients."""
    pytest.importorskip("diffusers")
    pytest.importorskip("triton")
    words = ("--part", "block", "--size", "tiny", "--providers", "cogvx", "--device", "cpu")
    options = ("--dtype", dtype, "--out", str(tmp_path))
    done = run("-m", "benchmarks.model", *words, *options, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "model.csv").open(newline="") as file:
        rows = {(row["part"], row["provider"]): row for row in csv.DictReader(file)}
    assert {part for part, _ in rows} == {"block, forward", "block, both ways"}
    assert float(rows["block, both ways", "cogvx"]["saved"]) <= 0.6
    assert all(row["speed"] == "" for row in rows.values())  # interpreted kernels are never timed


# --- convolutions ------------------------------------------------------------------------------

# Planes that forget the last one.
PLANT_IN_CONV = """
import sys
from benchmarks import conv

right = conv.conv3d
def wrong(x, weight, bias=None, padding=(0, 1, 1), *, algo="auto"):
    out = right(x, weight, bias, padding, algo=algo)
    if algo == "conv2d":
        out -= right(x[:, :, 2:], weight[:, :, 2:], None, padding, algo="conv3d")
    return out
conv.conv3d = wrong
sys.exit(conv.main(sys.argv[1:]))
"""
CONV_ON_CPU = ("--device", "cpu", "--budget", "0.01", "--case", "0")


def test_convolutions_have_a_row_for_each_way(tmp_path):
    done = run("-m", "benchmarks.conv", *CONV_ON_CPU, "--case", "6", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "conv.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    seen = [(row["way"], row["layout"], row["bias"]) for row in rows]
    layouts = ("NCDHW", "NDHWC")
    assert seen == [
        (way, layout, bias)
        for ways in (("conv3d", "conv2d"), ("nearest", "folded", "phases"))
        for bias in ("True", "False")
        for way in ways
        for layout in layouts
    ]
    assert all(float(row["ratio"]) > 0 and row["commit"] and row["device_name"] for row in rows)
    assert all(row["median_ms"] == row["tflop_per_s"] == row["extra_mib"] == "" for row in rows)
    written = json.loads((tmp_path / "conv.json").read_text())
    assert len(written["rows"]) == len(rows) and str(tmp_path) not in json.dumps(written)


def test_a_wrong_convolution_gets_no_row(tmp_path):
    done = run("-c", PLANT_IN_CONV, *CONV_ON_CPU, "--out", str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("wrong, and not timed: 3x3x3, 64 to 64") == 4
    rows = json.loads((tmp_path / "conv.json").read_text())["rows"]
    assert {row["way"] for row in rows} == {"conv3d"}


# --- videos ------------------------------------------------------------------------------------


def test_the_extension_is_timed_on_a_cpu(tmp_path):
    pytest.importorskip("cogvx_kernels._C")
    words = ("--op", "frame_cache_join", *ON_CPU, "--pass", "forward", "--conventions", "model")
    done = bench(*words, "--providers", "cogvx", "cogvx-append", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "frame_cache_join-tiny-float32-cpu.json").read_text())["rows"]
    assert [row["provider"] for row in rows] == ["eager", "cogvx", "cogvx-append"]
    assert all(row["ratio_to_eager"] > 0 for row in rows)


# --- sweeps ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_checks_every_choice():
    pytest.importorskip("triton")
    words = ("--op", "gated_residual", "--size", "tiny", "--dtype", "float32")
    done = run("-m", "benchmarks.tune", *words, "--pass", "backward", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("right, not timed") == 20 and "as it is now" in done.stdout


def test_two_ways_are_of_expert_ffn_alone():
    pytest.importorskip("triton")
    done = run("-m", "benchmarks.tune", "--op", "rope3d", "--dense", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "only expert_ffn has two ways" in done.stderr


@pytest.mark.slow
def test_two_ways_are_checked_where_nothing_is_timed():
    pytest.importorskip("triton")
    words = ("--op", "expert_ffn", "--dense", "--size", "tiny", "--dtype", "float32")
    done = run("-m", "benchmarks.tune", *words, "--pass", "forward", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("not timed, so there is no row") == 2
    assert "cogvx-grouped" in done.stdout and "cogvx-dense" in done.stdout


def test_tune_needs_a_gpu():
    pytest.importorskip("triton")
    done = run("-m", "benchmarks.tune", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "needs a CUDA device" in done.stderr


def test_laws_of_the_checks_hold():
    """They live beside what they are about: neither folder imports from the other."""
    files = [f"benchmarks/test_{name}.py" for name in ("check", "peers", "tune")]
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout


def test_gpu_check_is_a_script():
    done = subprocess.run(
        ("bash", "-n", str(ROOT / "benchmarks/gpu_check.sh")), capture_output=True
    )
    assert done.returncode == 0, done.stderr


TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Does what a program is asked, but for one part of the model.
STUB = """#!/usr/bin/env bash
case "$*" in *vae-decode*) echo "no such thing" && exit 3 ;; esac
exit 0
"""


def test_gpu_check_goes_on_after_a_failure(tmp_path):
    for name in ("python3", "nvidia-smi", "ptxas", "nvcc", "compute-sanitizer"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ("bash", str(ROOT / "benchmarks/gpu_check.sh")),
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
        | {"PYTHON": str(tmp_path / "python3"), "BUDGET": "530"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    status = {line.split()[1]: line.split()[0] for line in lines}
    assert [name for name, word in status.items() if word != "ok"] == ["model-vae-decode"]
    assert "status 3" in next(line for line in lines if "vae-decode" in line)
    tools = {f"sanitize-{tool}{of}" for tool in TOOLS for of in ("", "-videos", "-cache")}
    assert tools - {"sanitize-synccheck-cache"} <= status.keys()
    assert {"build", "contract", "verify", "conv", "model-block", "tune"} <= status.keys()
    about = ("qk_norm_rope3d", "expert_ffn", "spatial_norm_silu", "temporal_conv")
    assert {f"bench-{op}-5b-480x720-49f" for op in about} <= status.keys()
    assert done.returncode == 1, done.stderr


def test_gpu_check_sanitizes_every_op():
    script = (ROOT / "benchmarks/gpu_check.sh").read_text()
    lists = re.findall(r"^(?:TOKENS|VIDEOS)=\((.*)\)$", script, re.MULTILINE)
    assert sorted(" ".join(lists).split()) == sorted(OPS)


def test_gpu_check_names_what_there_is():
    """Its flags, parts, providers and calls: it must not fail on a GPU for want of a name."""
    script = (ROOT / "benchmarks/gpu_check.sh").read_text().replace("\\\n", " ")
    known = bench("--list").stdout + run("-m", "benchmarks.model", "--help").stdout
    named = re.findall(r"--providers ((?:[a-z][a-z-]* ?)+)", script)
    words = {word for line in named for word in line.split()}
    assert words and all(re.search(rf"(?<![\w-]){word}(?![\w-])", known) for word in words)
    parts = re.findall(r"^part ([a-z-]+)", script, re.MULTILINE)
    assert parts and all(part in known for part in parts)


# --- experts -----------------------------------------------------------------------------------


def test_experts_are_trained_side_by_side(tmp_path):
    """Every kind with every seed, from one VAE and latents; again, nothing is trained again."""
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(small().to_dict()))
    code = (
        "import json, sys; from pathlib import Path; from cogvx.training import Recipe, train;"
        "train(Recipe.from_dict(json.loads(Path(sys.argv[1]).read_text())), sys.argv[2])"
    )
    done = run("-c", code, str(recipe), str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    words = ("--run", str(tmp_path / "run"), "--steps", "4", "--seeds", "2", "--prompts", "2")
    words = (*words, "--kinds", "shared", "routed", "--device", "cpu", "--clips", "8")
    words = (*words, "--precision", "float32", "--held-out", "20", "--out", str(tmp_path))
    for _ in range(2):
        done = run("-m", "benchmarks.experts", *words)
        assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "experts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["kind"], row["seed"]) for row in rows] == [
        ("shared", "0"), ("shared", "1"), ("routed", "0"), ("routed", "1")
    ]  # fmt: skip
    asked = {"steps": "4", "clips": "8", "precision": "float32", "prompts": "2"}
    assert all(asked.items() <= row.items() and row["commit"] for row in rows)
    kept = [
        (tmp_path / f"experts-{row['kind']}-{row['seed']}" / "latents").resolve() for row in rows
    ]
    assert set(kept) == {tmp_path / "latents"}
    assert all(len({row[number] for row in rows}) == 4 for number in ("loss", "held_out"))
    assert int(rows[2]["parameters"]) > int(rows[0]["parameters"])
    assert len(re.findall("2 seeds .* ± ", done.stdout)) == 2
