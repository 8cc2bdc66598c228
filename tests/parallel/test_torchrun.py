"""`torchrun -m cogvx generate` in processes of their own: the result, and ranks that fail."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cogvx.cli import main
from cogvx.pipeline import resume
from tests.harness.selection import rest

PAGE = Path(__file__).resolve().parents[2] / "docs/distributed.md"
GENERATE = ["generate", "--model", "tiny", "--prompt", "a red circle moves right", "--steps", "3",
            "--frames", "5", "--seed", "1", "--device", "cpu", "--guidance", "2",
            "--backend", "reference"]  # fmt: skip

# Runs `python -m cogvx` in a rank, where rank 1 does something else after a step.
FAILING = """
import os, signal, sys, torch
from datetime import timedelta
from cogvx.cli import main
from cogvx.parallel import launch
from cogvx.pipeline import denoise

def solver_step(*arguments):
    if os.environ["RANK"] == "1":
        if sys.argv[1] == "raise":
            raise ValueError("no luck")
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    return before(*arguments)

before, denoise.predict = denoise.predict, solver_step
launch.start.__defaults__ = (*launch.start.__defaults__[:-1], timedelta(seconds=float(sys.argv[2])))
sys.exit(main(sys.argv[3:]))
"""


def torchrun(size, *arguments, timeout=300):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [*command, "--nproc-per-node", str(size), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_command_of_the_page_writes_what_one_process_writes(tmp_path):
    [line] = re.findall(
        r"^ {4}torchrun .*? -m cogvx (generate .*--prompt .*)$", PAGE.read_text(), re.MULTILINE
    )
    one, two = tmp_path / "one.gif", tmp_path / "two.gif"
    other = {"CogVideoX-5b": "tiny", "A red kite": GENERATE[4], "kite.mp4": str(two)}
    command = [other.get(word, word) for word in shlex.split(line)]
    assert set(other.values()) <= set(command)
    assert main([*GENERATE, "--cfg", "two_pass", "--quiet", "--out", str(one)]) == 0
    done = torchrun(2, "-m", "cogvx", *command, *GENERATE[5:])
    assert done.returncode == 0, done.stderr
    assert "2 processes: guidance 2 x context 1" in done.stderr
    assert done.stdout.count("seed") == 1, done.stdout
    first, second = (resume.read(p.with_suffix(".latents.safetensors")) for p in (one, two))
    assert torch.equal(first.state.latents, second.state.latents)
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    "how, cause",
    [
        ("raise", "ValueError: no luck"),
        rest("SIGKILL", "Signal 9 (SIGKILL) received by PID"),
        rest("SIGSTOP", "rank 1 does not answer, it is frozen or lost"),
    ],
)
def test_a_rank_that_fails_ends_the_job_with_the_cause(how, cause, tmp_path):
    script, out = tmp_path / "failing.py", tmp_path / "out.gif"
    script.write_text(FAILING)
    done = torchrun(2, str(script), how, "20", *GENERATE, "--out", str(out))
    assert done.returncode != 0
    report = done.stderr[done.stderr.index("Root Cause") :]
    assert cause in done.stderr
    assert f"(local_rank: {0 if how == 'SIGSTOP' else 1})" in report, done.stderr
    assert list(tmp_path.iterdir()) == [script]


def test_without_torchrun_the_command_is_named(capsys, tmp_path):
    out = tmp_path / "out.gif"
    for flags, size in [
        (["--context-parallel", "4", "--cfg-parallel"], 8),
        (["--cfg-parallel"], 2),
    ]:
        assert main([*GENERATE, "--out", str(out), *flags]) == 1
        message = capsys.readouterr().err
        assert f"Type torchrun --nproc-per-node {size} -m cogvx generate --model tiny" in message
