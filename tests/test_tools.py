"""`cogvx-kernels verify`, `doctor`, `aot` and `bench`, as a user types them."""

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
    broken = OPS[op]
    evaluate = verify.compare.__globals__["evaluate"]

    def wrong(function, *args, **options):
        results = evaluate(function, *args, **options)
        if options.get("backend") == "kernel":
            name = list(results)[-1 if bug == "gradient" else 0]
            x = results[name] = results[name].clone()
            if x.numel():
                if bug == "one element":
                    x.view(-1)[-1] += 0.1
                elif bug == "not a number":
                    x.view(-1)[0] = float("nan")
                else:
                    x *= 1.02
        return results

    with mock.patch.dict(verify.compare.__globals__, {"evaluate": wrong}):
        assert verify.main(["--op", broken.name, "--quick", "--device", device]) == 1
    assert "MISS" in capsys.readouterr().out


def test_verify_says_why_it_cannot(capsys):
    with mock.patch.object(_backend, "HAS_TRITON", False):
        assert verify.main([]) == 2
    assert "Triton is not installed" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert verify.main(["--device", "cuda"]) == 2
        assert "finds no GPU" in capsys.readouterr().err


# --- doctor ----------------------------------------------------------------------------------


def test_doctor_says_what_is_there_and_what_is_lost(capsys):
    assert doctor.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert set(facts["ops"]) == set(OPS)
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    assert all(line in said for line in facts["lost"])
    if not torch.cuda.is_available():
        assert any("no GPU is visible" in line for line in facts["lost"])


@pytest.mark.parametrize(
    ("version", "cudnn", "warned"), [("2.9.1", 91002, True), ("2.9.1", 91501, False)]
)
def test_doctor_warns_of_versions_that_do_harm(version, cudnn, warned):
    lost, warnings = [], []
    with (
        mock.patch.object(torch, "__version__", version),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "device_count", return_value=1),
        mock.patch.object(torch.cuda, "get_device_name", return_value="a GPU"),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(7, 5)),
        mock.patch.object(torch.backends.cudnn, "version", return_value=cudnn),
    ):
        assert doctor._gpus(lost, warnings) == ["a GPU, sm_75"]
    assert any("conv3d" in line for line in warnings) == warned
    assert any("no bfloat16" in line for line in lost)


# --- bench -----------------------------------------------------------------------------------


def test_bench_without_the_repository_says_where_to_get_it(capsys, tmp_path):
    from cogvx_kernels.tools import bench

    with mock.patch.object(bench, "REPOSITORY", tmp_path):
        assert bench.main([]) == 2
    assert "clone the repository" in capsys.readouterr().err
