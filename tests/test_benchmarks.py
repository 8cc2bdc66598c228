"""The benchmarks as programs: what they write, what they refuse. No time is asserted."""

import csv
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import conv, experts, host, model, ops, registry, report, tune
from benchmarks.__main__ import main
from cogvx.training import loop, train
from cogvx_kernels import _backend
from cogvx_kernels.testing import OPS, SIZES
from tests.harness.selection import rest

from .model.training.recipes import small

ROOT = Path(__file__).resolve().parent.parent

ABSOLUTE = ("median_ms", "p25_ms", "p75_ms", "gb_per_s", "tflop_per_s", "copy_gb_per_s")
COLUMNS = (
    "benchmark size convention pass provider dtype device median_ms p25_ms p75_ms gb_per_s "
    "percent_of_copy tflop_per_s percent_of_matmul ratio noise_percent relative_error peak_mib "
    "saved_mib gpu_mib note commit date torch triton cuda driver device_name sm_clock_mhz "
    "copy_gb_per_s command"
).split()
ON_CPU = ("--device", "cpu", "--size", "tiny", "--repeats", "2", "--budget", "0.01")


@pytest.fixture
def diffusers():
    """diffusers imported, whose first import warns of libraries of its own."""
    pytest.importorskip("diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline  # noqa: F401


@pytest.fixture
def plain(monkeypatch):
    """Kernels are not interpreted, as where TRITON_INTERPRET is not set."""
    for module in (_backend, ops, model, tune):
        monkeypatch.setattr(module, "INTERPRETED", False)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """`finished`, which is a process of its own, has one."""
    monkeypatch.setattr(report, "plot", lambda *_: None)
    monkeypatch.setattr(loop, "plot_losses", lambda *_: None)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """python with these words, in the root, in one thread; kernels are not interpreted."""
    return subprocess.run(
        (sys.executable, *words),
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- ops ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run in a process of its own, and its folder."""
    out = tmp_path_factory.mktemp("bench")
    words = ("--op", "rope3d", *ON_CPU, "--providers", "cogvx-auto", "--out", str(out))
    done = run("-m", "benchmarks", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, out


def test_rows_have_their_conditions(finished):
    _, out = finished
    rows = rows_of(out)
    assert list(rows[0]) == COLUMNS
    assert [(row["pass"], row["provider"]) for row in rows] == [
        (which, name) for which in ("forward", "backward") for name in ("eager", "cogvx-auto")
    ]
    for row in rows:
        assert row["benchmark"] == "rope3d" and row["size"] == "tiny" and row["note"]
        assert all(row[name] for name in ("commit", "date", "torch", "device_name", "command"))
        assert float(row["ratio"]) > 0 and float(row["relative_error"]) < 1e-5


def test_no_absolute_time_of_a_cpu(finished):
    done, out = finished
    assert all(row[name] == "" for row in rows_of(out) for name in ABSOLUTE)
    assert "no kernel is timed" in done.stdout and " GB/s ·" not in done.stdout


def test_command_in_the_row_names_no_folder(finished):
    _, out = finished
    command = rows_of(out)[0]["command"]
    assert command.startswith("python -m benchmarks --op rope3d") and str(out) not in command


def test_plot_or_the_reason_for_none(finished):
    done, out = finished
    picture = out / "rope3d-tiny-float32-cpu.png"
    if picture.exists():
        assert picture.read_bytes().startswith(b"\x89PNG")
    else:
        assert "matplotlib is not installed" in done.stdout


@pytest.mark.parametrize("program", ["conv", rest("model")])
def test_modules_are_programs(program):
    done = run("-m", f"benchmarks.{program}", "--op", "nothing")
    assert done.returncode == 2 and "vae-decode" in done.stderr


def test_host_costs_have_a_row():
    """Where kernels are not interpreted: Triton's binder, a launch that does nothing."""
    pytest.importorskip("triton")
    done = run("-m", "benchmarks.host", "--op", "rope3d", "--seconds", "0.1", "--no-compile")
    assert done.returncode == 0, done.stderr
    heading, row = done.stdout.splitlines()[-2:]
    assert heading.split()[:4] == ["op", "launch", "launcher", "op"]
    name, *cells = row.split()
    assert name == "rope3d" and len(cells) == len(host.COLUMNS)
    assert [c for c in cells if c == "-"] == ["-"] * 2  # compiled
    assert all(float(c) > 0 for c in cells[:2])


@pytest.fixture
def wrong(monkeypatch):
    """A rotation whose result is that of the next token, and a function that puts it somewhere."""
    info = OPS["rope3d"]

    def rolled(x, cos, sin, *, backend="", **options):
        return info.reference(x, cos, sin, **options).roll(1, 1)

    def put(peers=(), **changes):
        benchmark = registry.BENCHMARKS["rope3d"]
        cases = ops.partial(ops.cases, replace(info, **changes))
        names = ["eager", "cogvx-auto", *peers]
        others = [registry.Provider(name, "", lambda *_: rolled) for name in peers]
        monkeypatch.setattr(registry, "PROVIDERS", [*registry.PROVIDERS, *others])
        planted = replace(benchmark, cases=cases, entries=lambda: names)
        monkeypatch.setitem(registry.BENCHMARKS, "rope3d", planted)

    return rolled, put


def test_wrong_kernel_is_not_timed(plain, wrong, tmp_path, capsys):
    rolled, put = wrong
    put(op=rolled)
    words = ("--op", "rope3d", *ON_CPU, "--providers", "cogvx-auto", "--out", str(tmp_path))
    assert main(words) == 1
    printed = capsys.readouterr().out
    assert "outside the rule" in printed and "cogvx-auto, model: out0: error" in printed
    assert "x base" not in printed and not list(tmp_path.iterdir())


def test_wrong_peer_has_no_row(wrong, tmp_path, capsys):
    rolled, put = wrong
    put(peers=["them"])
    words = ("--op", "rope3d", *ON_CPU, "--providers", "them", "--out", str(tmp_path))
    assert main(words) == 1
    assert "refused, its results are wrong: them" in capsys.readouterr().out
    assert {row["provider"] for row in rows_of(tmp_path)} == {"eager"}


@pytest.mark.slow
def test_interpreted_kernels_are_compared_and_never_timed(tmp_path):
    pytest.importorskip("triton")
    if not _backend.INTERPRETED:
        pytest.skip("kernels are not interpreted")
    words = ("--op", "rope3d", *ON_CPU, "--providers", "cogvx", "--out", str(tmp_path))
    assert main(words) == 0
    interpreted = [row for row in rows_of(tmp_path) if row["provider"] == "cogvx"]
    assert interpreted and all("never timed" in row["note"] for row in interpreted)
    assert all(row["ratio"] == "" for row in interpreted)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--op", "rope4d"), ("rope4d", *OPS)),
        (("--size", "6b"), ("6b", *SIZES)),
        (("--providers", "nobody"), ("nobody", "eager", "compile")),
        (("--op", "expert_ffn", "--conventions", "nobody"), ("nobody", "model", "top-2")),
        (("--op", "rope3d", "--size", "small"), ("small", *SIZES)),
    ],
)
def test_unknown_name_is_refused_with_the_known(words, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert all(name in printed for name in named)


def test_list_names_everything(capsys):
    assert main(("--list",)) == 0
    printed = capsys.readouterr().out
    for name in (*OPS, *SIZES, "diffusers-eager", "liger", *model.PARTS, *model.ENTRIES, "conv"):
        assert name in printed


def test_conventions_select_calls(tmp_path):
    calls = ("text and video experts", "4 experts, top-1")
    words = ("--op", "expert_ffn", *ON_CPU, "--pass", "forward", "--providers", "split-cat")
    assert main((*words, "--conventions", *calls, "--out", str(tmp_path))) == 0
    assert [(row["convention"], row["provider"]) for row in rows_of(tmp_path)] == [
        (call, name) for call in calls for name in ("eager", "split-cat")
    ]


def test_extension_is_timed_on_a_cpu(tmp_path):
    pytest.importorskip("cogvx_kernels._C")
    words = ("--op", "frame_cache_join", *ON_CPU, "--pass", "forward", "--conventions", "model")
    assert main((*words, "--providers", "cogvx", "cogvx-append", "--out", str(tmp_path))) == 0
    rows = rows_of(tmp_path)
    assert [row["provider"] for row in rows] == ["eager", "cogvx", "cogvx-append"]
    assert all(float(row["ratio"]) > 0 for row in rows)


# --- parts of the model ------------------------------------------------------------------------


def test_wrong_part_is_not_timed(diffusers, plain, tmp_path, monkeypatch, capsys):
    """A decoder that is right but for one pixel."""
    right = model.CausalVAE.decode

    def decode(self, latents):
        video = right(self, latents)
        video[0, -1, 0, 3, 5] += 0.01
        return video

    monkeypatch.setattr(model.CausalVAE, "decode", decode)
    words = ("--part", "vae-decode", *ON_CPU, "--providers", "cogvx", "--out", str(tmp_path))
    assert main(words, "model") == 1
    printed = capsys.readouterr().out
    assert "nothing was timed" in printed and "cogvx, model: video differs" in printed
    assert "x base" not in printed and not list(tmp_path.iterdir())


def test_both_halves_of_the_vae_have_rows(diffusers, plain, tmp_path, capsys):
    """In both layouts of diffusers, patched too, and both backends of ours; of compiled ones a
    reason."""
    parts = ("vae-decode", "vae-encode")
    words = ("--part", parts[0], "--part", parts[1], *ON_CPU, "--out", str(tmp_path))
    assert main(words, "model") == 0
    rows = rows_of(tmp_path)
    names = ("diffusers", "diffusers-channels-last", "diffusers-patched", "diffusers-patched-fast")
    assert [(row["benchmark"], row["provider"]) for row in rows] == [
        (part, name) for part in parts for name in (*names, "cogvx", "cogvx-reference")
    ]
    assert all(float(row["ratio"]) > 0 and float(row["peak_mib"]) > 0 for row in rows)
    assert all(row["median_ms"] == "" == row["gpu_mib"] for row in rows)
    assert capsys.readouterr().out.count("left out: diffusers-compile") == 2


def test_transformer_has_rows(diffusers, plain, tmp_path):
    names = ("diffusers-patched", "cogvx", "cogvx-ahead")
    words = ("--part", "transformer", *ON_CPU, "--layers", "1", "--providers", *names)
    assert main((*words, "--out", str(tmp_path)), "model") == 0
    rows = rows_of(tmp_path)
    assert [row["provider"] for row in rows] == ["diffusers", *names]
    assert {row["convention"] for row in rows} == {"1 blocks"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", rest("bfloat16")])
def test_block_on_kernels_saves_little(diffusers, tmp_path, dtype):
    """At most 0.6 of what diffusers keeps for the backward, with equal gradients."""
    pytest.importorskip("triton")
    words = ("--part", "block", *ON_CPU, "--providers", "cogvx", "--dtype", dtype)
    assert main((*words, "--out", str(tmp_path)), "model") == 0
    rows = {(row["pass"], row["provider"]): row for row in rows_of(tmp_path)}
    assert {which for which, _ in rows} == {"forward", "forward and backward"}
    theirs, ours = (rows["forward and backward", name] for name in ("diffusers", "cogvx"))
    assert 0 < float(ours["saved_mib"]) <= 0.6 * float(theirs["saved_mib"])
    assert ours["ratio"] == ""  # interpreted kernels are never timed


# --- convolutions ------------------------------------------------------------------------------


def test_convolutions_have_a_row_for_each_algorithm(tmp_path):
    words = (*ON_CPU, "--conventions", "0", "6", "--out", str(tmp_path))
    assert main(words, "conv") == 0
    rows = rows_of(tmp_path)
    assert [row["provider"] for row in rows] == [
        f"{algorithm}, {layout}{bias}"
        for algorithms in (("conv3d", "conv2d"), ("nearest", "folded", "phases"))
        for bias in ("", ", no bias")
        for algorithm in algorithms
        for layout in ("NCDHW", "NDHWC")
    ]
    assert all(float(row["ratio"]) > 0 and row["commit"] and row["device_name"] for row in rows)
    assert all(row["median_ms"] == row["tflop_per_s"] == row["gpu_mib"] == "" for row in rows)
    assert str(tmp_path) not in (tmp_path / "results.csv").read_text()


def test_wrong_convolution_has_no_row(tmp_path, monkeypatch, capsys):
    """Planes without the last one."""
    right = conv.conv3d

    def wrong(x, weight, bias=None, padding=(0, 1, 1), *, algo="auto"):
        out = right(x, weight, bias, padding, algo=algo)
        if algo == "conv2d":
            out -= right(x[:, :, 2:], weight[:, :, 2:], None, padding, algo="conv3d")
        return out

    monkeypatch.setattr(conv, "conv3d", wrong)
    assert main((*ON_CPU, "--conventions", "0", "--out", str(tmp_path)), "conv") == 1
    assert capsys.readouterr().out.count("refused, its results are wrong: conv2d") == 4
    rows = rows_of(tmp_path)
    assert len(rows) == 4 and all(row["provider"].startswith("conv3d") for row in rows)


# --- sweeps ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sweep_compares_every_choice(capsys):
    pytest.importorskip("triton")
    words = ("--op", "gated_residual", "--size", "tiny", "--dtype", "float32")
    assert tune.main((*words, "--pass", "backward", "--quick")) == 0
    printed = capsys.readouterr().out
    assert "as it is now" in printed
    assert not _backend.INTERPRETED or printed.count("right in Triton's interpreter") == 20


def test_wrong_choice_is_refused(monkeypatch, capsys):
    """One constant breaks the kernel, another does not compile."""
    pytest.importorskip("triton")
    info = OPS["gated_residual"]
    module = tune.importlib.import_module("cogvx_kernels.expert_adaln.kernel")

    def kernel(*arguments, backend, **options):
        if module.TOKENS == 2:
            raise ValueError("too small")
        return info.reference(*arguments, **options) + (module.TOKENS == 4)

    monkeypatch.setitem(tune.OPS, "gated_residual", replace(info, op=kernel))
    monkeypatch.setattr(tune, "INTERPRETED", True)
    monkeypatch.setattr(ops, "triton_reason", lambda name, x: None)
    monkeypatch.setattr(ops, "INTERPRETED", True)
    words = ("--op", "gated_residual", "--size", "tiny", "--dtype", "float32")
    assert tune.main((*words, "--pass", "forward", "--quick")) == 1
    refused = re.findall("refused.*wrong: (.*)", capsys.readouterr().out)
    assert len(refused) == 8 and sum("too small" in line for line in refused) == 4


def test_tune_needs_a_gpu(plain, monkeypatch, capsys):
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        tune.main(())
    assert stopped.value.code == 2 and "needs a CUDA device" in capsys.readouterr().err


# --- experts -----------------------------------------------------------------------------------


def test_experts_are_trained_side_by_side(plain, tmp_path, capsys):
    """Every kind with every seed, from one VAE and latents; again, nothing is trained again."""
    train(small(vae_training={"steps": 2}, transformer_training={"steps": 2}), tmp_path / "run")
    words = ("--run", str(tmp_path / "run"), "--steps", "2", "--seeds", "2", "--prompts", "2")
    words = (*words, "--kinds", "shared", "routed", "--device", "cpu", "--clips", "8")
    words = (*words, "--precision", "float32", "--held-out", "4", "--out", str(tmp_path))
    found = []
    for _ in range(2):
        assert experts.main(words) == 0
        with (tmp_path / "experts.csv").open(newline="") as file:
            found.append(list(csv.DictReader(file)))
    rows = found[0]
    numbers = ("kind", "seed", *experts.NUMBERS)
    first, again = ([[row[name] for name in numbers] for row in some] for some in found)
    assert first == again
    assert [(row["kind"], row["seed"]) for row in rows] == [
        ("shared", "0"), ("shared", "1"), ("routed", "0"), ("routed", "1")
    ]  # fmt: skip
    requested = {"steps": "2", "clips": "8", "precision": "float32", "prompts": "2"}
    assert all(requested.items() <= row.items() and row["commit"] for row in rows)
    kept = [
        (tmp_path / f"experts-{row['kind']}-{row['seed']}" / "latents").resolve() for row in rows
    ]
    assert set(kept) == {tmp_path / "latents"}
    assert all(len({row[number] for row in rows}) == 4 for number in ("loss", "held_out"))
    assert int(rows[2]["parameters"]) > int(rows[0]["parameters"])
    assert len(re.findall("2 seeds .* ± ", capsys.readouterr().out)) == 4
