"""The commands for several machines, by two agents of torchrun on loopback."""

import json
import os
import random
import re
import shlex
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from torch.distributed import run
from torch.distributed.launcher import elastic_launch

from cogvx.cli import main
from cogvx.pipeline import denoise, resume
from tests.harness.selection import rest
from tests.harness.workers import fork, run_cases, settle

from .test_prompts import LINES, printed, words
from .test_torchrun import GENERATE, PAGE


def documented(page=PAGE):
    """Words of the page's command for two machines, up to that of cogvx; with one rank on each."""
    [line] = re.findall(r"^ {4}(torchrun --nnodes 2 .* -m cogvx) generate ", page.read_text(), re.M)
    other = {"HOST:29500": f"127.0.0.1:{free_port()}", "8": "1"}
    found = shlex.split(line)
    assert set(other) <= set(found)
    return [other.get(word, word) for word in found[1:]]


def free_port():
    """A port that no connection takes by itself: ports of those begin at 32768."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with socket.socket() as tried:
            try:
                tried.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


def on_two_machines(command, work=None):
    """Type a command of torchrun in two processes at once; its ranks are forks that call
    work(arguments of cogvx), or python -m cogvx."""

    def agent():
        if work is None:
            run.main(command)
            return
        config, _, arguments = run.config_from_args(run.parse_args(command))
        config.start_method = "fork"
        arguments = arguments[arguments.index("cogvx") + 1 :]
        elastic_launch(config, lambda: sys.exit(work(arguments)))()

    def both(_):
        os.environ.update(OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        if work is None:  # forks have read it
            os.environ["TRITON_INTERPRET"] = "0"
        other = fork()
        if other == 0:
            settle(1)
            try:
                agent()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        try:
            agent()
        except BaseException:
            os.kill(other, signal.SIGKILL)
            raise
        assert os.waitpid(other, 0)[1] == 0

    [done] = run_cases(both, [command], timeout=120)
    return done


def one_video(folder, work=main):
    """The latents of one process; the first machine alone writes and prints."""
    one, two = folder / "one.gif", folder / "two.gif"
    assert main([*GENERATE, "--cfg", "two_pass", "--quiet", "--out", str(one)]) == 0
    done = on_two_machines([*documented(), *GENERATE, "--out", str(two)], work)
    assert done.ok, done
    assert done.output.count("2 processes: guidance 2 x context 1") == 1, done
    first, second = (resume.read(p.with_suffix(".latents.safetensors")) for p in (one, two))
    assert torch.equal(first.state.latents, second.state.latents)
    assert one.read_bytes() == two.read_bytes()


def one_video_by_new_processes(folder):
    one_video(folder, None)


def killed(command):
    """Run a command in a rank; before the restart that of the second machine is killed in its
    second step, while the other waits."""

    def predict(*arguments):
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == "1" and not Path("killed").exists():
            while not Path("waits").exists():
                time.sleep(0.05)
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if len(calls) == 2 and not Path("killed").exists():
            Path("waits").touch()
            time.sleep(1000)
        return before(*arguments)

    calls, before, denoise.predict = [], denoise.predict, predict
    return main(command)


def many_videos_after_a_kill(folder):
    """By a restart on both machines."""
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    more = ("--device", "cpu", "--steps", "3", "--checkpoint-every", "1", "--json")
    command = ["--max-restarts", "1", *documented(), *words(*more)]
    done = on_two_machines(command, killed)
    assert done.ok and (folder / "killed").exists(), done
    facts = printed(done.output)
    assert facts["failed"] == 0 and facts["made"] + facts["were_there"] == 3
    for name, seed in (("00001", 3), ("blue", 7), ("00003", 5)):
        saved = resume.read(folder / "videos" / f"{name}.latents.safetensors")
        assert saved.record["seed"] == seed and saved.state.done == saved.steps
    assert done.output.count("2 processes: data 2 x guidance 1 x context 1") == 2  # attempts


@pytest.mark.parametrize(
    "check",
    [
        one_video,
        rest(one_video_by_new_processes),
        rest(many_videos_after_a_kill),
    ],
)
def test_documented_command_on_two_machines(check, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(tmp_path)
