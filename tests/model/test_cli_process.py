"""`python -m cogvx`, and the signals it is sent."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cogvx.video import write_video

ROOT = Path(__file__).resolve().parents[2]
RANDOM = ["--vae", "random", "--base-channels", "4"]


def start(here, *words, path=()):
    """A process that heeds Ctrl-C, as one at a terminal does."""
    return subprocess.Popen(
        [sys.executable, "-m", "cogvx", *map(str, words)],
        cwd=here, env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def test_a_process_that_is_interrupted(tmp_path):
    """A real Ctrl-C, in a clip that is far from its end."""
    long = torch.zeros(1, 9, 3, 64, 96)
    write_video(tmp_path / "long.mp4", (long for _ in range(200)), 25)
    process = start(tmp_path, "reconstruct", "long.mp4", *RANDOM, "--out", "a.mp4")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".a.*.part.mp4")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "cogvx: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["long.mp4"]


INTERRUPTED_IN_AN_EXEC = """
import cogvx.cli

def main():
    try:
        exec("import signal; signal.raise_signal(signal.SIGINT)")
    except KeyboardInterrupt:
        return 130

cogvx.cli.main = main
"""


def test_an_interrupt_that_was_dealt_with_is_over(tmp_path):
    """Python ends a module by the signal if Ctrl-C came within an exec of text, caught or not."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED_IN_AN_EXEC)
    process = start(tmp_path, path=[tmp_path])
    assert (process.communicate(timeout=60), process.returncode) == (("", ""), 130)


def test_a_process_of_its_own(tmp_path):
    process = start(tmp_path, "params", "--preset", "2b", "--json")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "") and json.loads(out)["transformer"] > 1e9


SHOW_THE_POLICY = """
import cogvx.cli

def main():
    import os
    with open("policy", "w") as file:
        file.write(os.environ["OMP_WAIT_POLICY"])
    return 0

cogvx.cli.main = main
"""


@pytest.mark.parametrize("users", [None, "ACTIVE"])
def test_threads_that_wait_leave_the_cores_to_others(tmp_path, users, monkeypatch):
    """Unless the user has it otherwise."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if users is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", users)
    (tmp_path / "sitecustomize.py").write_text(SHOW_THE_POLICY)
    process = start(tmp_path, path=[tmp_path])
    assert (process.communicate(timeout=60), process.returncode) == (("", ""), 0)
    assert (tmp_path / "policy").read_text() == (users or "PASSIVE")
