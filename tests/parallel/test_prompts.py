"""`cogvx generate --prompts`: many videos, by one process, by ranks, and by actors of Ray."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import cogvx
from cogvx import cli
from cogvx.cli import prompts
from cogvx.cli.console import Console
from cogvx.cli.outputs import claimed
from cogvx.parallel import Ranks, start
from cogvx.pipeline import denoise, resume
from tests.harness.selection import rest

from . import ranks

LINES = (  # guidance 2 is in one of them alone
    {"prompt": "a large red circle moves right on black"},
    {"prompt": "two small blue squares on white", "seed": 7, "steps": 2, "out": "blue.gif"},
    {"prompt": "a green triangle moves up", "guidance": 2},
)
PLAIN = ("--steps", "1", "--frames", "5", "--height", "32", "--width", "32",
         "--backend", "reference")  # kernels are slow in the interpreter  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.jsonl").write_text("\n\n".join(map(json.dumps, LINES)))
    return tmp_path


def words(*more):
    start = ["generate", "--model", "tiny", "--prompts", "list.jsonl", "--out", "videos"]
    return [*start, *PLAIN, "--seed", "3", *map(str, more)]


def run(capsys, *more):
    """(exit status, summary, errors)."""
    status = cli.main(words("--json", *more))
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else {}, err


def test_a_video_for_each_line(here, capsys):
    """Each as by a command of its own; the same command again makes only what is not there."""
    status, facts, _ = run(capsys)
    assert (status, facts["made"], facts["were_there"]) == (0, 3, 0)
    assert [fact["seed"] for fact in facts["videos"]] == [3, 7, 5]
    names = {"00001.mp4", "blue.gif", "00003.mp4"}
    latents = {"00001", "blue", "00003"}
    there = {path.name for path in (here / "videos").iterdir()}
    assert there == names | {f"{name}.latents.safetensors" for name in latents}
    alone = ["generate", "--model", "tiny", "--out", "alone.mp4", "--quiet", *PLAIN]
    assert cli.main([*alone, "--prompt", LINES[2]["prompt"], "--seed", "5", "--guidance", "2"]) == 0
    ours = resume.read("videos/00003.latents.safetensors")
    assert ours.state.latents.equal(resume.read("alone.latents.safetensors").state.latents)
    assert ours.record == resume.read("alone.latents.safetensors").record

    (here / "videos" / "00003.mp4").unlink()
    status, facts, _ = run(capsys)
    assert (status, facts["made"], facts["were_there"]) == (0, 1, 2)
    status, _, error = run(capsys, "--guidance", "4")
    assert status == 1 and "list.jsonl, line 1: " in error
    assert "guidance 6.0 there, 4.0 here" in error


def test_a_failed_line_does_not_stop_the_others(here, capsys, monkeypatch):
    """It is named at the end, and the same command makes it."""

    def full(vae, job, *more):
        if job.out.name == "blue.gif":
            raise OSError(28, "No space left on device", str(job.out))
        return decode(vae, job, *more)

    decode = prompts.decode
    monkeypatch.setattr(prompts, "decode", full)
    status, facts, error = run(capsys)
    assert (status, facts["made"], facts["failed"]) == (1, 2, 1)
    assert "1 of 3 videos failed:\n  videos/blue.gif: videos/blue.gif: No space left" in error
    monkeypatch.undo()
    monkeypatch.chdir(here)
    status, facts, _ = run(capsys)
    assert (status, facts["made"], facts["were_there"]) == (0, 1, 2)


def test_torchrun_does_not_try_a_failed_line_again(here, capsys, monkeypatch):
    """It starts all again after the first attempt: no weights are read, and one summary printed."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    (here / "videos").mkdir()
    with claimed(here / "videos" / "blue.gif"):
        status, facts, first = run(capsys)
    assert (status, facts) == (1, {})
    with monkeypatch.context() as patch:
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        patch.setattr(prompts.Model, "load", None)
        status, facts, error = run(capsys)
    assert (status, facts["were_there"], facts["failed"]) == (1, 2, 1)
    message = "videos/blue.gif: another command is writing it at this moment"
    assert message in first and message in error
    status, facts, _ = run(capsys)  # another job
    assert (status, facts["made"], facts["were_there"]) == (0, 1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have a line for each video; it has none"),
        ("a red circle", "line 1: must be a JSON object; Expecting value at column 1$"),
        ("[1]", r"line 1: must be a JSON object; got \[1\]"),
        ('{"seed": 1}', "line 1: the following arguments are required: --prompt"),
        ('{"prompt": "x"}\n{"promt": "x"}', "line 2: unknown option --promt; did you mean"),
        ('{"prompt": "x", "steps": "many"}', "line 1: --steps must be a whole number"),
        ('{"prompt": "x", "steps": null}', "line 1: steps must be a text, a number or true"),
        ('{"prompt": "x", "frames": 18}', r"line 1: --frames must have 1 \+ 4k frames"),
        ('{"prompt": "x", "image": "no.png"}', "line 1: .*no.png"),
        ('{"prompt": "x", "out": "../x.mp4"}', "line 1: out must be the name of a file"),
        ('{"prompt": "x", "out": "x.txt"}', "line 1: .*x.txt"),
        ('{"prompt": "x"}\n{"prompt": "y", "out": "00001.mp4"}', "line 2: out must be another"),
    ],
)
def test_bad_lines(here, capsys, monkeypatch, text, message):
    """Refused with file and line, before weights are read; no folder is left."""
    monkeypatch.setattr(prompts.Model, "load", None)
    (here / "list.jsonl").write_text(text)
    status, _, error = run(capsys)
    assert status == 1
    assert re.search(f"list.jsonl(:|, ) ?{message}", error), error
    assert not (here / "videos").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--force"], "--force must come with --prompt; with --prompts the same command goes on"),
        (["--resume"], "--resume must come with --prompt"),
        (["--out", "list.jsonl"], "--out must be a folder, with --prompts; got the file list.json"),
        (["--out", "no/videos"], "--out must be a folder in a folder that exists; got no/videos"),
        (["--prompts", "no.jsonl"], "no.jsonl: No such file"),
    ],
)
def test_bad_options(here, capsys, monkeypatch, more, message):
    monkeypatch.setattr(prompts.Model, "load", None)
    status, _, error = run(capsys, *more)
    assert status == 1 and message in error
    assert not (here / "videos").exists()


def test_ray_goes_on_after_an_actor_was_killed(here, monkeypatch):
    """In a cluster of this machine: the line is taken up where its latents were saved."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(cogvx.__file__).parents[1]))
    command = words("--json", "--ray", "--checkpoint-every", "1", "--steps", "60")
    with subprocess.Popen(
        [sys.executable, "-m", "cogvx", *command], stdout=subprocess.PIPE, text=True
    ) as job:
        saved = here / "videos" / "00001.latents.safetensors"
        wait_for(lambda: saved.exists() and resume.read(saved).state.done >= 8, job)
        lock = str(saved.with_name(".00001.mp4.lock"))
        [actor] = [pid for pid in descendants(job.pid) if lock in opened(pid)]
        os.kill(actor, signal.SIGKILL)
        wait_for(lambda: lock not in opened(actor), job)
        done = [resume.read(saved).state.done]

        def finished():
            done.append(resume.read(saved).state.done)
            return done[-1] == 60

        wait_for(finished, job)
        facts = json.loads(job.communicate(timeout=300)[0])
    assert job.returncode == 0
    assert 8 <= done[0] < 60 and done == sorted(done)
    assert (facts["made"], facts["failed"]) == (3, 0)
    assert {fact["seed"] for fact in facts["videos"]} == {3, 7, 5}


def test_ray_goes_on_without_a_line_whose_actors_die(here, capsys, monkeypatch):
    """More often than `RETRIES`; with calls in place of a cluster, and the errors of Ray."""
    died = pytest.importorskip("ray.exceptions").ActorDiedError()

    def result(call):
        if call.out.name == "blue.gif":
            raise died
        return {"out": str(call.out), "frames": 5, "seed": 1}

    actor = SimpleNamespace(run=SimpleNamespace(remote=lambda line: line))
    made = SimpleNamespace(remote=lambda options: actor)
    found = SimpleNamespace(
        exceptions=sys.modules["ray.exceptions"],
        init=lambda *words, **more: nullcontext(),
        cluster_resources=lambda: {"CPU": 2.0},
        remote=lambda kind: SimpleNamespace(options=lambda **more: made),
        wait=lambda calls: (calls[:1], calls[1:]),
        get=result,
    )
    monkeypatch.setattr(prompts, "extra", lambda *names: found)
    monkeypatch.setattr(argparse.Namespace, "__hash__", lambda self: id(self), raising=False)
    status, facts, error = run(capsys, "--ray")
    assert (status, facts["made"], facts["failed"]) == (1, 2, 1)
    assert f"1 of 3 videos failed:\n  {here}/videos/blue.gif: The actor died" in error


def wait_for(condition, job, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, "the command has ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def descendants(pid):
    """Processes that a process has begun, and those have."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # it has ended
            continue
        if parent == pid:
            child = int(stat.parent.name)
            found += [child, *descendants(child)]
    return found


def opened(pid):
    """Files that a process has open."""
    with suppress(OSError):  # it has ended
        return {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
    return set()


def killed(command):
    """Run a command in a rank, which counts its steps in files.

    Before the restart rank 1 is killed in its second step, as soon as rank 0 is in its own, where
    it waits.
    """

    def predict(*arguments):
        calls.append(1)
        attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
        Path(f"step.{attempt}.{rank}.{len(calls)}").touch()
        if attempt == "0" and len(calls) == 2:
            while rank == "0" or not Path("step.0.0.2").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        return before(*arguments)

    calls, before, denoise.predict = [], denoise.predict, predict
    return cli.main(command)


def printed(output):
    """The only JSON in an output."""
    [found] = re.findall(r"^{$.*?^}$", output, re.DOTALL | re.MULTILINE)
    return json.loads(found)


def test_ranks_share_the_lines_and_go_on_after_one_was_killed(here):
    """By torchrun's restart; each line is made once, and none of its steps before a save again."""
    more = ("--device", "cpu", "--steps", "3", "--checkpoint-every", "1", "--json")
    done = ranks.torchrun(killed, 2, words(*more), restarts=1)
    assert done.ok, done
    facts = printed(done.output)
    assert facts["failed"] == 0 and facts["made"] + facts["were_there"] == 3
    assert {Path(fact["out"]).name for fact in facts["videos"]} == {
        "00001.mp4", "blue.gif", "00003.mp4"
    }  # fmt: skip
    for name, seed in (("00001", 3), ("blue", 7), ("00003", 5)):
        saved = resume.read(here / "videos" / f"{name}.latents.safetensors")
        assert saved.record["seed"] == seed and saved.state.done == saved.steps
    assert len(list(here.glob("step.0.*"))) == 4  # of each rank the second one was not done
    assert len(list(here.glob("step.1.*"))) == 3 + 2 + 3 - 2
    assert done.output.count("2 processes: data 2 x guidance 1 x context 1") == 2  # attempts
    assert "cogvx: terminated" in done.output and "error" not in done.output  # of rank 0; of rank 1


def lines_of_a_rank(slow, beats, timeout):
    """Two lines on two ranks. One rank makes some progress in its line, and then none if 0."""

    class Stub:
        def __init__(self, options, console, processes):
            self.console = console

        def run(self, line):
            prompts._store().set(f"begun {dist.get_rank()}", "")
            prompts._store().wait([f"begun {rank}" for rank in range(2)])
            if dist.get_rank() == slow:
                for _ in range(beats):
                    time.sleep(0.1)
                    self.console.progress("denoise")
                if not beats:
                    time.sleep(1000)
            return {"out": line}

    prompts.Worker, prompts.TIMEOUT = Stub, timedelta(seconds=timeout)
    processes = Ranks(start(data=2, device="cpu"))
    facts = prompts._on_ranks(None, ["a", "b"], Console(True, False), processes)
    return sorted(fact["out"] for fact in facts)


@pytest.mark.parametrize("frozen", [rest(0), 1])
def test_a_frozen_rank_ends_the_job(frozen):
    message = f"rank {frozen} has made no progress for 0:00:00.500000, it is frozen or lost"
    with pytest.raises(ranks.RankFailure, match=message):
        ranks.run(lines_of_a_rank, 2, frozen, 0, 0.5)


def test_a_rank_whose_line_takes_long_does_not():
    assert ranks.run(lines_of_a_rank, 2, 1, 25, 2) == [["a", "b"], []]


def failing_line(kind, messages):
    """A line on two ranks, each of which fails with its message, if it has one."""

    class Failing(prompts.Worker):
        def __init__(self, processes):
            self.processes = processes

        def _made(self, line, held):
            if message := messages[dist.get_rank()]:
                raise kind(message)
            return {"frames": 5}

    prompts.GRACE = timedelta(seconds=0.5)
    worker = Failing(Ranks(start(guidance=2, device="cpu")))
    try:
        return worker.run(argparse.Namespace(out=Path("x.mp4")))
    except kind:
        return "raised"


def test_an_error_of_all_ranks_fails_the_line_alone():
    failed = {"out": "x.mp4", "error": "step 1 has NaN"}
    assert ranks.run(failing_line, 2, FloatingPointError, ["step 1 has NaN"] * 2) == [failed] * 2


@pytest.mark.parametrize(
    ("kind", "messages", "results"),
    [
        (OSError, ["the disk is full", ""], ["raised", {"out": "x.mp4", "frames": 5}]),
        (ValueError, ["step 1 has NaN", "step 2 has NaN"], ["raised", "raised"]),
        (RuntimeError, ["a message was lost", "a message was lost"], ["raised", "raised"]),
    ],
)
def test_an_error_of_one_rank_is_raised(kind, messages, results):
    """Others that differ, too: the ranks may wait for each other's messages."""
    assert ranks.run(failing_line, 2, kind, messages) == results


def bad_lines(numbers):
    """Error on a rank if these lines are bad; its checks."""
    lines = [argparse.Namespace(number=number, guidance=6) for number in range(1, 6)]
    checked = []

    def check(line, model, pair):
        checked.append(line.number)
        if line.number in numbers:
            raise ValueError("no")

    prompts._check_line, prompts.Model = check, SimpleNamespace(of=lambda options: None)
    options = argparse.Namespace(out=Path("videos"), prompts="list.jsonl")
    try:
        prompts.check_lines(options, lines, Ranks(start(data=2, device="cpu")))
    except ValueError as error:
        return str(error), checked
    return "", checked


def test_ranks_share_the_checks(here):
    """The first bad line is named on each."""
    assert ranks.run(bad_lines, 2, []) == [("", [1, 3, 5]), ("", [2, 4])]
    assert (here / "videos").rmdir() is None
    message = "list.jsonl, line 2: no"
    assert ranks.run(bad_lines, 2, [2, 5]) == [(message, [1, 3, 5]), (message, [2])]
    assert not (here / "videos").exists()


def test_lines_without_guidance_are_refused_on_two_groups(here, capsys, monkeypatch):
    monkeypatch.setattr(prompts.Model, "load", None)
    (here / "list.jsonl").write_text('{"prompt": "x"}\n{"prompt": "x", "guidance": 1}')
    two = {"guidance": SimpleNamespace(size=lambda: 2)}
    monkeypatch.setattr(prompts.ranks, "start", lambda *options, **more: SimpleNamespace(mesh=two))
    monkeypatch.setattr(prompts.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(prompts.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(prompts, "_gathered", lambda processes, value: [value])
    status, _, error = run(capsys)
    message = "list.jsonl, line 2: --guidance must be above 1 with --cfg-parallel"
    assert status == 1 and message in error


def test_groups_of_ranks_share_the_lines(here):
    """Two groups of two ranks; a video is that of one process with the same seed.

    A line that fails on both ranks of a group does not stop the others.
    """
    more = ("--device", "cpu", "--guidance", "3", "--cfg", "two_pass")
    (here / "videos").mkdir()
    command = words("--cfg-parallel", "--json", *more)
    with claimed(here / "videos" / "blue.gif"):
        done = ranks.torchrun(cli.main, 4, command)
    assert "4 processes: data 2 x guidance 2 x context 1" in done.output
    facts = printed(done.output)
    assert (facts["made"], facts["were_there"], facts["failed"]) == (2, 0, 1)
    assert not done.ok and "videos/blue.gif: another command is writing" in done.detail
    alone = ["generate", "--model", "tiny", "--out", "alone.mp4", "--quiet", *PLAIN, *more]
    assert cli.main([*alone, "--prompt", LINES[0]["prompt"], "--seed", "3"]) == 0
    one, four = (
        resume.read(f"{name}.latents.safetensors").state.latents
        for name in ("alone", "videos/00001")
    )
    assert torch.equal(one, four)
