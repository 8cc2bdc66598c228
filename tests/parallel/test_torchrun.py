"""`torchrun -m cogvx generate` in processes of their own: the result, and ranks that fail."""

import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch.distributed import run

from cogvx.cli import main
from cogvx.parallel.launch import VARIABLES
from cogvx.pipeline import resume
from tests.harness.selection import rest
from tests.harness.workers import run_cases

from . import ranks

PAGE = Path(__file__).resolve().parents[2] / "docs/distributed.md"
GENERATE = ["generate", "--model", "tiny", "--prompt", "a red circle moves right", "--steps", "3",
            "--frames", "5", "--seed", "1", "--device", "cpu", "--guidance", "2",
            "--backend", "reference"]  # fmt: skip

# Runs `python -m cogvx` in a rank, where rank 1 does something else after a step.
FAILING = """
import os, signal, sys, torch
from datetime import timedelta
from cogvx.cli import main
from cogvx.parallel.launch import VARIABLES
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


def torchrun(size, *arguments):
    """The command `torchrun`, forked, with processes of their own."""

    def launch(size):
        os.environ.update(OMP_NUM_THREADS="1", TRITON_INTERPRET="0")
        run.main(["--standalone", "--nproc-per-node", str(size), *arguments])

    [outcome] = run_cases(launch, [size], timeout=300)
    return outcome


def test_command_of_the_page_writes_what_one_process_writes(tmp_path):
    [line] = re.findall(
        r"^ {4}torchrun --nproc-per-node 8 -m cogvx (generate .*--prompt .*)$",
        PAGE.read_text(),
        re.MULTILINE,
    )
    one, two = tmp_path / "one.gif", tmp_path / "two.gif"
    other = {"CogVideoX-5b": "tiny", "A red kite": GENERATE[4], "kite.mp4": str(two)}
    command = [other.get(word, word) for word in shlex.split(line)]
    assert set(other.values()) <= set(command)
    assert main([*GENERATE, "--cfg", "two_pass", "--quiet", "--out", str(one)]) == 0
    done = torchrun(2, "-m", "cogvx", *command, *GENERATE[5:])
    assert done.ok, done
    assert "2 processes: guidance 2 x context 1" in done.output
    assert done.output.count("seed") == 1, done.output
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
    assert done.status == "failed"
    report = done.detail[done.detail.index("Root Cause") :]
    assert cause in str(done)
    assert f"(local_rank: {0 if how == 'SIGSTOP' else 1})" in report, done
    assert list(tmp_path.iterdir()) == [script]


def test_a_typing_mistake_is_in_the_report_and_printed_once():
    done = ranks.torchrun(main, 2, ["generate", "--modle", "tiny"])
    message = "unknown option --modle; did you mean --model?"
    assert done.status == "failed"
    assert done.output.count("usage: ") == done.output.count(message) == 1, done.output
    assert f"ValueError: {message}" in done.detail[done.detail.index("Root Cause") :], done.detail


def test_without_torchrun_the_command_is_named(capsys, tmp_path):
    out = tmp_path / "out.gif"
    for flags, size in [
        (["--context-parallel", "4", "--cfg-parallel"], 8),
        (["--cfg-parallel"], 2),
    ]:
        assert main([*GENERATE, "--out", str(out), *flags]) == 1
        message = capsys.readouterr().err
        assert f"Type torchrun --nproc-per-node {size} -m cogvx generate --model tiny" in message
    assert main([*GENERATE, "--out", str(out), "--cfg-parallel", "--guidance", "1"]) == 1
    wanted = "--cfg-parallel must come with a --guidance above 1, whose two predictions it shares"
    assert f"{wanted}; got 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--cfg-parallel"], "--cfg-parallel must have a multiple of 2 processes; got 3: type "
         "torchrun --nproc-per-node 2"),
        (["--context-parallel", "2"], "--context-parallel 2 must have 2 processes; got 3"),
        (["--context-parallel", "2", "--cfg-parallel"], "--cfg-parallel and --context-parallel 2 "
         "must have 4 processes; got 3"),
    ],
)  # fmt: skip
def test_a_wrong_number_of_processes_is_named(options, message, capsys, tmp_path, monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main([*GENERATE, *options, "--out", str(tmp_path / "out.gif")]) == 1
    assert f"cogvx: error: {message}" in capsys.readouterr().err
