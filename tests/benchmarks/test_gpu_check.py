"""`benchmarks/gpu_check.sh`: it goes on after a failure, and the names in it exist."""

import os
import re
import shlex
import subprocess
from pathlib import Path

from benchmarks import registry
from benchmarks.__main__ import make_parser
from cogvx_kernels.testing import OPS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks/gpu_check.sh"


def test_gpu_check_is_a_script():
    done = subprocess.run(("bash", "-n", str(SCRIPT)), capture_output=True)
    assert done.returncode == 0, done.stderr


TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Succeeds at everything, but for one part of the model.
STUB = """#!/usr/bin/env bash
case "$*" in *vae-decode*) echo "no such thing" && exit 3 ;; esac
exit 0
"""


def test_gpu_check_goes_on_after_a_failure(tmp_path):
    for name in ("python3", "nvidia-smi", "ptxas", "nvcc", "compute-sanitizer"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ("bash", str(SCRIPT)),
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
        | {"PYTHON": str(tmp_path / "python3"), "BUDGET": "530"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    status = {line.split()[1]: line.split()[0] for line in lines}
    assert [name for name, word in status.items() if word != "ok"] == ["bench-vae-decode"]
    assert "status 3" in next(line for line in lines if "vae-decode" in line)
    tools = {f"sanitize-{tool}{of}" for tool in TOOLS for of in ("", "-videos", "-cache")}
    assert tools - {"sanitize-synccheck-cache"} <= status.keys()
    assert {"facts", "build", "contract", "tests-gpu", "verify", "tune"} <= status.keys()
    about = ("qk_norm_rope3d", "expert_ffn", "spatial_norm_silu", "temporal_conv", "conv", "block")
    assert {f"bench-{name}" for name in about} <= status.keys()
    assert done.returncode == 1, done.stderr


def test_gpu_check_sanitizes_every_op():
    lists = re.findall(r"^(?:TOKENS|VIDEOS)=\((.*)\)$", SCRIPT.read_text(), re.MULTILINE)
    assert sorted(" ".join(lists).split()) == sorted(OPS)


def test_gpu_check_uses_known_names():
    """Its flags, benchmarks, providers and calls: it must not fail on a GPU for want of a name."""
    script = SCRIPT.read_text().replace("\\\n", " ")
    commands = re.findall(r"^bench (.*)$", script, re.MULTILINE)
    size = re.search(r"^SIZE=(.*)$", script, re.MULTILINE)[1]
    assert len(commands) == 11
    for command in commands:
        name, limit, *words = shlex.split(command)
        arguments = make_parser("op").parse_args(["--op", name, "--size", size, *words])
        benchmark = registry.BENCHMARKS[name]
        assert limit.isdecimal() and size in benchmark.sizes
        assert {*(arguments.providers or ())} <= {*benchmark.entries()}
        names = benchmark.conventions()
        assert {*(arguments.conventions or ())} <= {*names, *map(str, range(len(names)))}


def test_gpu_check_names_tests_that_exist():
    script = SCRIPT.read_text()
    files = re.findall(r"tests/\S+\.py", script)
    assert len(files) == 4 and all((ROOT / file).is_file() for file in files)
    (words,) = re.findall(r'-k "(.*)"', script)
    functions = re.findall(r"^def (test_\w+)", (ROOT / files[0]).read_text(), re.MULTILINE)
    for word in words.split(" or "):
        assert any(word in function for function in functions), word
