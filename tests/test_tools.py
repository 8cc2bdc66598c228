"""`cogvx-kernels verify`, `doctor`, `aot` and `bench` as commands."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from cogvx_kernels import _backend
from cogvx_kernels.__main__ import TOOLS, main
from cogvx_kernels.testing import OPS, Comparison, check_close
from cogvx_kernels.tools import doctor, options, passed, verify

needs_triton = pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")
ROOT = Path(__file__).resolve().parents[1]


def run_tool(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "cogvx_kernels", *words],
        cwd=ROOT, capture_output=True, text=True, env={**kept, **environment},
    )  # fmt: skip


def test_help_names_every_tool(capsys):
    assert main([]) == 0 and main(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in TOOLS)
    assert main(["nonsense"]) == 2
    assert "no tool is called 'nonsense'" in capsys.readouterr().err
    assert main(["verfy"]) == 2 and "did you mean verify?" in capsys.readouterr().err
    assert main(["--version"]) == 0


def test_ops_can_be_named_without_torch():
    assert options.OPS == tuple(OPS)


# --- comparison ------------------------------------------------------------------------------


def test_comparison_prints_the_worst_elements():
    exact = torch.arange(24, dtype=torch.float64).reshape(2, 3, 4) / 8
    baseline = exact.float()
    result = baseline.clone()
    good = check_close("out0", result, baseline, exact)
    assert good.ok and not good.worst and "worst" not in str(good)
    result[1, 0, 2] += 2
    result[0, 2, 3] -= 0.5
    bad = check_close("out0", result, baseline, exact)
    places = [((1, 0, 2), 3.75, 1.75), ((0, 2, 3), 0.875, 1.375)]
    assert not bad.ok and [tuple(element) for element in bad.worst] == places
    assert str(bad).endswith(
        "worst: [1, 0, 2] is 3.75, wanted 1.75, [0, 2, 3] is 0.875, wanted 1.375"
    )


def test_comparison_puts_misplaced_nan_and_infinities_first():
    exact = torch.tensor([0.5, torch.inf, torch.nan, 2.0, -torch.inf], dtype=torch.float64)
    baseline = exact.float()
    assert check_close("dx", baseline.clone(), baseline, exact).ok
    for index, value in ((1, -torch.inf), (0, torch.nan), (2, 1.0), (4, 3.0)):
        result = baseline.clone()
        result[3], result[index] = 9.0, value
        comparison = check_close("dx", result, baseline, exact)
        assert [element.place for element in comparison.worst] == [(index,), (3,)]


def test_comparison_of_sums_that_cancel():
    """Both results are rounding noise there, of a few sums; else 16-bit errors hardly vary."""
    noise = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64) / 64
    for exact, passes in ((0.0, True), (1.0, False)):
        wanted = exact + 0 * noise
        baseline, ours, worse = ((wanted + factor * noise).bfloat16() for factor in (1, 4, 8))
        assert check_close("dbias", ours, baseline, wanted, summed=True).ok == passes
        assert not check_close("dbias", worse, baseline, wanted, summed=True).ok


# --- verify ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A new cache folder for each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "cogvx"


@needs_triton
def test_verify_starts_the_interpreter_in_each_process(tmp_path, capsys):
    """The output and the rows are the same for any number of processes."""

    def words(jobs):
        ops = ("--op", "gated_residual", "--op", "residual_moments")
        report = ("--jobs", str(jobs), "--json", str(tmp_path / f"{jobs}.json"))
        return [*ops, "--device", "cpu", "--quick", "--all-rows", *report]

    done = run_tool("verify", *words(2))
    assert done.returncode == 0, done.stderr
    assert verify.main(words(1)) == 0
    one, two = (json.loads((tmp_path / f"{jobs}.json").read_text()) for jobs in (1, 2))
    assert (capsys.readouterr().out, one) == (done.stdout, two)
    assert "0 rows missed the rule" in done.stdout
    rows = [row for row in two["rows"] if row["op"] == "gated_residual"]
    assert {row["dtype"] for row in rows} == {"float32", "float16", "bfloat16"}
    assert {row["tensor"] for row in rows} == {"out0", "dx", "dy", "dgate", "dtext_gate"}
    assert all(row["ok"] for row in two["rows"]) and len(two["rows"]) > 50


@needs_triton
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bug", ["value", "one element", "gradient", "not a number"])
def test_verify_catches_a_broken_kernel(op, bug, capsys, device):
    """A slightly wrong output or gradient is reported, with exit status 1."""
    broken = dataclasses.replace(OPS[op], samples=OPS[op].samples[:1])
    evaluate = verify.compare.__globals__["evaluate"]

    def wrong(function, *args, **options):
        results = evaluate(function, *args, **options)
        if options.get("backend") == "kernel":
            name = list(results)[-1 if bug == "gradient" else 0]
            x = results[name] = results[name].clone()
            if x.numel():
                if bug == "one element":
                    x[(-1,) * x.dim()] += 0.1
                elif bug == "not a number":
                    x[(0,) * x.dim()] = float("nan")
                else:
                    x *= 1.02
        return results

    words = ["--op", op, "--quick", "--device", device, "--jobs", "1", "--again"]
    with mock.patch.dict(OPS, {op: broken}):
        assert verify.main(words) == 0
        with mock.patch.dict(verify.compare.__globals__, {"evaluate": wrong}):
            assert verify.main(words) == 1
    output = capsys.readouterr().out
    # the op's line has the number of failed cases, and each has a row
    missed = int(re.search(rf"^{op} .* (\d+) MISSED", output, re.MULTILINE)[1])
    assert output.count("MISS: ") == missed > 0


@pytest.fixture
def a_small_op(monkeypatch, device):
    """Arguments of verify for one op with one sample."""
    small = dataclasses.replace(OPS["rope3d"], samples=OPS["rope3d"].samples[:1])
    monkeypatch.setattr(verify, "OPS", {"rope3d": small})
    monkeypatch.setattr(verify, "_samples", lambda info, device, quick: info.samples)
    return ["--device", device, "--jobs", "1"]


@needs_triton
def test_verify_prints_a_line_for_each_op(capsys, a_small_op):
    assert verify.main(a_small_op) == 0
    output = capsys.readouterr().out.splitlines()
    lines = [line for line in output if line.startswith("rope3d ")]
    assert len(lines) == 1 and re.search(r"rope3d +3 +\d\.\d\dx +\d+\.\d  ok$", lines[0])
    assert verify.main([*a_small_op, "--all-rows"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("rope3d ") for line in output) == 3


@needs_triton
def test_verify_skips_passed_ops(capsys, a_small_op, cache, monkeypatch):
    calls = []
    compare = verify.compare
    monkeypatch.setattr(verify, "compare", lambda *a, **b: calls.append(1) or compare(*a, **b))

    def compared(*words):
        calls.clear()
        assert verify.main([*a_small_op, *words]) == 0
        return len(calls)

    assert (compared("--quick"), compared("--quick")) == (3, 0)
    assert "nothing has changed since; --again repeats" in capsys.readouterr().out
    assert (compared(), compared(), compared("--quick")) == (3, 0, 0)  # all is some, too
    assert compared("--again") == compared("--seed", "1") == compared("--all-rows") == 3
    assert compared("--json", str(cache / "rows")) == 3
    assert compared() == 0
    with monkeypatch.context() as other:
        other.setenv("TRITON_F32_DEFAULT", "ieee")
        assert compared() == 3
    with monkeypatch.context() as other:  # a folder of the package with one more file in it
        other.setattr(passed, "PACKAGE", cache)
        (cache / "kernel.py").write_text("x = 1")
        assert compared() == 3
        (cache / "kernel.py").write_text("x = 2")
        assert (compared(), compared()) == (3, 0)
    for file in cache.glob("verify-*"):
        file.write_text("{")
    assert (compared(), compared()) == (3, 0)


@needs_triton
def test_verify_does_not_cache_failures(a_small_op, monkeypatch):
    calls = []

    def compare(*arguments, **options):
        calls.append(1)
        return [Comparison("out0", 1.0, 0.1, 0.0, 1.0, 0.1, ok=False)]

    assert verify.main(a_small_op) == 0
    monkeypatch.setattr(verify, "compare", compare)
    assert [verify.main([*a_small_op, "--again"]), verify.main(a_small_op)] == [1, 1]
    assert len(calls) == 6


@needs_triton
def test_verify_runs_without_a_writable_cache(a_small_op, cache):
    cache.write_text("a file where the folder should be")
    assert verify.main(a_small_op) == verify.main(a_small_op) == 0


@needs_triton
def test_verify_prints_progress(capsys, a_small_op, monkeypatch):
    monkeypatch.setattr(verify, "EVERY", 0.0)
    assert verify.main(a_small_op) == 0
    assert "verify: 2 of 3 cases, rope3d" in capsys.readouterr().err


@pytest.mark.parametrize(
    "platform, variable, value, folder",
    [
        ("linux", "XDG_CACHE_HOME", "/somewhere", "/somewhere/cogvx"),
        ("linux", "XDG_CACHE_HOME", "", "/home/me/.cache/cogvx"),
        ("linux", "XDG_CACHE_HOME", "not/absolute", "/home/me/.cache/cogvx"),
        ("darwin", "XDG_CACHE_HOME", "", "/home/me/Library/Caches/cogvx"),
        ("win32", "LOCALAPPDATA", "/local", "/local/cogvx"),
    ],
)
def test_cache_folder_of_each_platform(platform, variable, value, folder, monkeypatch):
    monkeypatch.setattr(passed.sys, "platform", platform)
    monkeypatch.setattr(passed.Path, "home", lambda: Path("/home/me"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv(variable, value)
    assert passed.cache_folder() == Path(folder)


def test_verify_refuses_zero_processes(capsys):
    with pytest.raises(SystemExit, match="2"):
        verify.main(["--jobs", "0"])
    assert "--jobs: must be 1 or more; got 0" in capsys.readouterr().err


def test_verify_prints_why_it_cannot_run(capsys):
    with mock.patch.object(_backend, "HAS_TRITON", False):
        assert verify.main([]) == 2
    assert "Triton is not installed" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert verify.main(["--device", "cuda"]) == 2
        assert "finds no GPU" in capsys.readouterr().err


# --- doctor ----------------------------------------------------------------------------------


@pytest.fixture
def a_gpu(monkeypatch):
    """An old GPU, simulated."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))


def test_doctor_reports_versions_and_missing_features(capsys):
    assert doctor.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert set(facts["ops"]) == set(OPS)
    assert facts["cudnn"] == torch.backends.cudnn.version()
    assert doctor.main(["--short"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output and len(output.splitlines()) <= 12
    assert doctor.main([]) == 0
    output = capsys.readouterr().out
    assert all(line in output for line in (*facts["lost"], *facts["conv3d"].values()))
    if not torch.cuda.is_available():
        assert any("no GPU is visible" in line for line in facts["lost"])


@pytest.mark.parametrize(
    ("version", "cudnn", "planes"),
    [
        ("2.10.0", 91002, {"float16", "bfloat16"}),
        ("2.10.0", 91501, set()),
        ("2.8.0", 91002, {"float16", "bfloat16"}),
        ("2.9.0", 91501, {"float16", "bfloat16"}),
    ],
)
def test_doctor_reports_the_conv3d_algorithm(version, cudnn, planes, a_gpu):
    warnings = []
    with (
        mock.patch.object(torch, "__version__", version),
        mock.patch.object(torch.backends.cudnn, "version", return_value=cudnn),
    ):
        algorithms = doctor._conv3d(warnings)
    assert {dtype for dtype, algorithm in algorithms.items() if "conv2d" in algorithm} == planes
    assert set(algorithms) == {"bfloat16", "float16", "float32"}
    # one warning for both dtypes
    assert len(warnings) == bool(planes)
    assert all(f"torch {version} with cuDNN {cudnn}" in line for line in warnings)


def test_doctor_warns_of_conv3d_on_amd(a_gpu):
    warnings = []
    with mock.patch.object(torch.version, "hip", "7.1"):
        algorithms = doctor._conv3d(warnings)
    assert all("conv2d" in algorithm for algorithm in algorithms.values())
    assert [line for line in warnings if "MIOpen" in line] == warnings != []


def test_doctor_lists_gpus(a_gpu):
    lost = []
    assert doctor._gpus(lost) == ["a GPU, sm_75"]
    assert any("no bfloat16" in line for line in lost)


@pytest.mark.parametrize(
    ("build", "on_gpu", "output"),
    [
        (None, False, "on cpu, the plain-torch reference: the extension is not built"),
        ({"cuda": False}, False, "on cpu, the extension"),
        ({"cuda": False}, True, "on cuda, the plain-torch reference: the extension was built wi"),
        ({"cuda": True}, True, "on cuda, the extension"),
    ],
)
def test_doctor_reports_where_the_extension_runs(build, on_gpu, output, monkeypatch):
    """For an op without a Triton kernel, whether Triton is installed or not."""
    native = dataclasses.replace(next(iter(OPS.values())), name="native", launch=None)
    monkeypatch.setattr(doctor, "OPS", {"native": native})
    monkeypatch.setattr(doctor._backend, "triton_reason", lambda name, x: "Triton is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    assert doctor._ops(build)["native"].startswith(output)


# --- bench -----------------------------------------------------------------------------------


def test_bench_without_the_repository(capsys, tmp_path):
    from cogvx_kernels.tools import bench

    with mock.patch.object(bench, "REPOSITORY", tmp_path):
        assert bench.main([]) == 2
    assert "clone the repository" in capsys.readouterr().err
