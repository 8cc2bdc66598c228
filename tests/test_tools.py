"""`cogvx-kernels verify`, `doctor`, `aot` and `bench`, as a user types them."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from cogvx_kernels import _backend
from cogvx_kernels.__main__ import TOOLS, main
from cogvx_kernels.testing import OPS
from cogvx_kernels.tools import doctor, verify

needs_triton = pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")
ROOT = Path(__file__).resolve().parents[1]


def type_in(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "cogvx_kernels", *words],
        cwd=ROOT, capture_output=True, text=True, env={**kept, **environment},
    )  # fmt: skip


def test_help_names_every_tool(capsys):
    assert main([]) == 0 and main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in TOOLS)
    assert main(["nonsense"]) == 2
    assert "no tool is called 'nonsense'" in capsys.readouterr().err


# --- verify ----------------------------------------------------------------------------------


@needs_triton
def test_verify_starts_the_interpreter_by_itself(tmp_path):
    report = tmp_path / "report.json"
    done = type_in("verify", "--device", "cpu", "--op", "rope3d", "--quick", "--json", str(report))
    assert done.returncode == 0, done.stderr
    assert "0 rows missed the rule" in done.stdout
    rows = json.loads(report.read_text())["rows"]
    assert {row["dtype"] for row in rows} == {"float32", "float16", "bfloat16"}
    assert {row["tensor"] for row in rows} == {"out0", "dx"}
    assert all(row["ok"] for row in rows)


@needs_triton
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bug", ["value", "one element", "gradient", "not a number"])
def test_verify_catches_a_broken_kernel(op, bug, capsys, device):
    """An output or a gradient that is a little wrong is a miss, and an exit status of 1."""
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

    words = ["--op", op, "--quick", "--device", device, "--jobs", "1"]
    with mock.patch.dict(OPS, {op: broken}):
        assert verify.main(words) == 0
        with mock.patch.dict(verify.compare.__globals__, {"evaluate": wrong}):
            assert verify.main(words) == 1
    assert "MISS" in capsys.readouterr().out


@needs_triton
def test_verify_says_the_same_with_any_number_of_processes(tmp_path):
    said = []
    for jobs in ("1", "3"):
        report = tmp_path / jobs
        options = ("--device", "cpu", "--quick", "--jobs", jobs, "--json", str(report))
        done = type_in("verify", "--op", "rope3d", "--op", "residual_moments", *options)
        assert done.returncode == 0, done.stderr
        said += [(done.stdout, json.loads(report.read_text()))]
    assert said[0] == said[1] and len(said[0][1]["rows"]) > 50


def test_verify_wants_processes(capsys):
    with pytest.raises(SystemExit, match="2"):
        verify.main(["--jobs", "0"])
    assert "--jobs: must be 1 or more; got 0" in capsys.readouterr().err


def test_verify_says_why_it_cannot(capsys):
    with mock.patch.object(_backend, "HAS_TRITON", False):
        assert verify.main([]) == 2
    assert "Triton is not installed" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert verify.main(["--device", "cuda"]) == 2
        assert "finds no GPU" in capsys.readouterr().err


# --- doctor ----------------------------------------------------------------------------------


@pytest.fixture
def a_gpu(monkeypatch):
    """One that is not there, and old."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))


def test_doctor_says_what_is_there_and_what_is_lost(capsys):
    assert doctor.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert set(facts["ops"]) == set(OPS)
    assert facts["cudnn"] == torch.backends.cudnn.version()
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    assert all(line in said for line in (*facts["lost"], *facts["conv3d"].values()))
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
def test_doctor_knows_which_way_conv3d_goes(version, cudnn, planes, a_gpu):
    warnings = []
    with (
        mock.patch.object(torch, "__version__", version),
        mock.patch.object(torch.backends.cudnn, "version", return_value=cudnn),
    ):
        ways = doctor._conv3d(warnings)
    assert {dtype for dtype, way in ways.items() if "planes" in way} == planes
    assert set(ways) == {"bfloat16", "float16", "float32"}
    # both dtypes have one reason, which is said once
    assert len(warnings) == bool(planes)
    assert all(f"torch {version} with cuDNN {cudnn}" in line for line in warnings)


def test_doctor_knows_what_amd_does_to_conv3d(a_gpu):
    warnings = []
    with mock.patch.object(torch.version, "hip", "7.1"):
        ways = doctor._conv3d(warnings)
    assert all("planes" in way for way in ways.values())
    assert [line for line in warnings if "MIOpen" in line] == warnings != []


def test_doctor_names_the_gpus(a_gpu):
    lost = []
    assert doctor._gpus(lost) == ["a GPU, sm_75"]
    assert any("no bfloat16" in line for line in lost)


@pytest.mark.parametrize(
    ("build", "on_gpu", "said"),
    [
        (None, False, "on cpu, the plain-torch reference: the extension is not built"),
        ({"cuda": False}, False, "on cpu, the extension"),
        ({"cuda": False}, True, "on cuda, the plain-torch reference: the extension was built wi"),
        ({"cuda": True}, True, "on cuda, the extension"),
    ],
)
def test_doctor_says_where_the_extension_runs(build, on_gpu, said, monkeypatch):
    """Of an op that has no Triton kernel; it does not depend on Triton."""
    native = dataclasses.replace(next(iter(OPS.values())), name="native", launch=None)
    monkeypatch.setattr(doctor, "OPS", {"native": native})
    monkeypatch.setattr(doctor._backend, "triton_reason", lambda name, x: "Triton is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    assert doctor._ops(build)["native"].startswith(said)


# --- bench -----------------------------------------------------------------------------------


def test_bench_without_the_repository_says_where_to_get_it(capsys, tmp_path):
    from cogvx_kernels.tools import bench

    with mock.patch.object(bench, "REPOSITORY", tmp_path):
        assert bench.main([]) == 2
    assert "clone the repository" in capsys.readouterr().err
