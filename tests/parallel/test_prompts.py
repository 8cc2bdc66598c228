"""`cogvx generate --prompts`: many videos, by one process, by ranks, and by actors of Ray."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cogvx
from cogvx import cli
from cogvx.cli import prompts
from cogvx.pipeline import resume

LINES = (  # guidance 2 is in one of them alone
    {"prompt": "a large red circle moves right on black"},
    {"prompt": "two small blue squares on white", "seed": 7, "steps": 2, "out": "blue.gif"},
    {"prompt": "a green triangle moves up", "guidance": 2},
)
PLAIN = ("--steps", "1", "--backend", "reference")  # kernels are slow in the interpreter


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have a line for each video; it has none"),
        ("a red circle", "line 1: must be a JSON object; Expecting value"),
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
    command = words("--json", "--ray", "--checkpoint-every", "1", "--steps", "100")
    with subprocess.Popen(
        [sys.executable, "-m", "cogvx", *command], stdout=subprocess.PIPE, text=True
    ) as job:
        saved = here / "videos" / "00001.latents.safetensors"
        wait_for(lambda: saved.exists() and resume.read(saved).state.done >= 2, job)
        actors = [pid for pid in descendants(job.pid) if "ray::Worker.run" in title(pid)]
        assert actors
        os.kill(actors[0], signal.SIGKILL)
        facts = json.loads(job.communicate(timeout=300)[0])
    assert job.returncode == 0
    assert (facts["made"], facts["failed"]) == (3, 0)
    assert {fact["seed"] for fact in facts["videos"]} == {3, 7, 5}
    assert resume.read(saved).state.done == 100


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


def title(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


# Runs `python -m cogvx` in a rank. Before the restart rank 1 is killed in its second step, and
# rank 0 waits for that in its own.
KILLED = """
import os, signal, sys, time
from cogvx.cli import main
from cogvx.pipeline import denoise

def predict(*arguments):
    calls.append(1)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and len(calls) == 2:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(120)
    return before(*arguments)

calls, before, denoise.predict = [], denoise.predict, predict
sys.exit(main(sys.argv[1:]))
"""


def test_ranks_share_the_lines_and_go_on_after_one_was_killed(here):
    """By torchrun's restart; each line is made once, and none of its steps before a save again."""
    Path("killed.py").write_text(KILLED)
    more = ("--device", "cpu", "--steps", "4", "--checkpoint-every", "1", "--json")
    command = ["--nproc-per-node", "2", "--max-restarts", "1", "killed.py", *words(*more)]
    done = torchrun(*command)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["failed"] == 0 and facts["made"] + facts["were_there"] == 3
    assert {Path(fact["out"]).name for fact in facts["videos"]} == {
        "00001.mp4", "blue.gif", "00003.mp4"
    }  # fmt: skip
    for name, seed in (("00001", 3), ("blue", 7), ("00003", 5)):
        saved = resume.read(here / "videos" / f"{name}.latents.safetensors")
        assert saved.record["seed"] == seed and saved.state.done == saved.steps
    assert "2 processes: data 2 x guidance 1 x context 1" in done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr or "exitcode: -9" in done.stderr


def test_groups_of_ranks_share_the_lines(here):
    """Two groups of two ranks; a video is that of one process with the same seed."""
    more = ("--device", "cpu", "--guidance", "3", "--cfg", "two_pass", "--frames", "5")
    done = torchrun("--nproc-per-node", "4", "-m", "cogvx", *words("--cfg-parallel", *more))
    assert done.returncode == 0, done.stderr
    assert "4 processes: data 2 x guidance 2 x context 1" in done.stderr
    assert done.stdout.split() == ["made", "3", "were", "there", "0", "failed", "0"]
    alone = ["generate", "--model", "tiny", "--out", "alone.mp4", "--quiet", *PLAIN, *more]
    assert cli.main([*alone, "--prompt", LINES[0]["prompt"], "--seed", "3"]) == 0
    one, four = (
        resume.read(f"{name}.latents.safetensors").state.latents
        for name in ("alone", "videos/00001")
    )
    assert torch.equal(one, four)


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = str(Path(cogvx.__file__).parents[1])
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
