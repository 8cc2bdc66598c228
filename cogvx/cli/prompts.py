"""`cogvx generate --prompts`: a video for each line of a file; also on ranks, and on Ray."""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..checkpoint.record import check_record
from ..extras import extra
from ..pipeline import resume
from . import ERRORS, message_of
from .arguments import Parser
from .console import Console
from .generate import Job, Model, decode, denoise, latents_of, seed_of
from .outputs import claimed
from .parser import add_video

RETRIES = 3  # of a line whose Ray actor died


class _LineParser(Parser):
    """Parser of the options of one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(re.sub(r"^argument (--\S+): ", r"\1 ", message))


def generate_all(options: argparse.Namespace, console: Console) -> None:
    """Make the videos that are not there yet; a line that fails does not stop the others."""
    lines = read_lines(options)
    check_lines(options, lines)
    todo = [line for line in lines if not line.out.exists()]
    console.progress("videos", len(lines) - len(todo), len(lines))
    facts: list[dict[str, Any]] = []
    for fact in (
        _on_ray(options, todo) if options.ray is not None else _here(options, todo, console)
    ):
        facts.append(fact)
        console.progress("videos", len(lines) - len(todo) + len(facts), len(lines))
    failed = [fact for fact in facts if "error" in fact]
    made = len(facts) - len(failed)
    total = {"made": made, "were_there": len(lines) - len(todo), "failed": len(failed)}
    text = "\n".join(f"{name.replace('_', ' '):10}  {count}" for name, count in total.items())
    console.print_summary({**total, "out": str(options.out), "videos": facts}, text)
    if failed:
        listed = "\n".join(f"  {fact['out']}: {fact['error']}" for fact in failed[:10])
        raise RuntimeError(f"{len(failed)} of {len(lines)} videos failed:\n{listed}")


def read_lines(options: argparse.Namespace) -> list[argparse.Namespace]:
    """Options of each line of `--prompts`: those of the command, replaced by those of the line.

    A line is a JSON object: "prompt", any option of a video by its name on the command line, and
    "out", the name of its file, by default its number, 00001.mp4. The seeds are `--seed`, which
    counts up by line, unless a line has its own.

    Raises ValueError naming file and line.
    """
    parser = _LineParser(prog="line", add_help=False)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--out")
    add_video(parser)
    lines: list[argparse.Namespace] = []
    for number, text in enumerate(_texts(options), 1):
        try:
            lines.append(_line(parser, options, number, text))
        except ValueError as error:
            raise ValueError(f"{options.prompts}, line {number}: {error}") from error
    first: dict[Path, int] = {}
    for number, line in enumerate(lines, 1):
        if (other := first.setdefault(line.out, number)) != number:
            raise ValueError(
                f"{options.prompts}, line {number}: out must be another file than that of line "
                f"{other}; got {line.out.name}"
            )
    return lines


def check_lines(options: argparse.Namespace, lines: list[argparse.Namespace]) -> None:
    """Make the folder, and check each line, its finished video too, before weights are read."""
    model = Model.of(options)
    is_new = not options.out.exists()
    options.out.mkdir(exist_ok=True)
    number = 0
    try:
        for line in lines:
            number += 1
            job = Job.of(line, model)
            if job.latents.exists():
                wanted = {k: v for k, v in job.record.items() if (k, v) != ("seed", None)}
                check_record(job.latents, resume.read(job.latents).record, wanted)
    except ERRORS as error:
        if is_new:
            options.out.rmdir()
        raise ValueError(
            f"{options.prompts}, line {number}: {message_of(error, options)}"
        ) from error


class Worker:
    """A loaded model, which makes videos one by one."""

    def __init__(self, options: argparse.Namespace, console: Console | None = None) -> None:
        self.model = Model.of(options)
        self.pipe = self.model.load(options, console or Console(quiet=True, as_json=True))

    @torch.no_grad()
    def run(self, line: argparse.Namespace, console: Console | None = None) -> dict[str, Any]:
        """Make the video of a line, or go on with it; returns a summary, or the error."""
        console = console or Console(quiet=True, as_json=True)
        latents = latents_of(line.out)
        try:
            with claimed(line.out):
                if line.seed is None:
                    line.seed = seed_of(latents) if latents.exists() else None
                if line.seed is None:
                    line.seed = int(torch.randint(1 << 31, ()))
                job = Job.of(line, self.model)
                denoise(self.pipe, job, line, console, resume_it=latents.exists())
                frames = decode(self.pipe.vae, job, line, console)
        except ERRORS as error:
            return {"out": str(line.out), "error": message_of(error, line)}
        return {"out": str(line.out), "frames": frames, "fps": job.fps, "seed": job.seed}


def _here(
    options: argparse.Namespace, lines: list[argparse.Namespace], console: Console
) -> Iterator[dict[str, Any]]:
    """The lines in this process, in order."""
    if lines:
        worker = Worker(options, console)
        for line in lines:
            yield worker.run(line, console)


def _on_ray(
    options: argparse.Namespace, lines: list[argparse.Namespace]
) -> Iterator[dict[str, Any]]:
    """The lines on actors of a Ray cluster, one for each GPU, or CPU; as they are done.

    An actor that dies is started again, and its line goes on where its latents were saved last.
    """
    ray = extra("ray", "--ray", "'cogvx[ray]'")
    if not lines:
        return
    with redirect_stdout(sys.stderr), ray.init(options.ray or None, log_to_driver=False):
        kind = "CPU" if options.device == "cpu" or not ray.cluster_resources().get("GPU") else "GPU"
        count = min(len(lines), int(ray.cluster_resources()[kind]))
        place = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
        actor = ray.remote(Worker).options(max_restarts=RETRIES, max_task_retries=RETRIES, **place)
        options, *lines = (_plain(one) for one in (options, *lines))
        pool = extra("ray.util", "--ray", "'cogvx[ray]'").ActorPool(
            [actor.remote(options) for _ in range(count)]
        )
        yield from pool.map_unordered(lambda worker, line: worker.run.remote(line), lines)


def _plain(options: argparse.Namespace) -> argparse.Namespace:
    """Options for a process in another folder, without what only this one can call."""
    found = {name: value for name, value in vars(options).items() if name != "run"}
    for name, value in found.items():
        if isinstance(value, Path) or (name == "model" and Path(value).exists()):
            found[name] = type(value)(Path(value).absolute())
    found["lora"] = [path.absolute() for path in options.lora]
    return argparse.Namespace(**found)


def _texts(options: argparse.Namespace) -> Iterable[str]:
    if options.force or options.resume:
        given = "--force" if options.force else "--resume"
        raise ValueError(
            f"{given} must come with --prompt; with --prompts the same command goes on, and makes "
            "anew what is removed"
        )
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out must be a folder, with --prompts; got the file {options.out}")
    if not options.out.absolute().parent.is_dir():
        raise ValueError(f"--out must be a folder in a folder that exists; got {options.out}")
    try:
        texts = options.prompts.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{options.prompts}: must be text in UTF-8; {error}") from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{options.prompts}: must have a line for each video; it has none")
    return texts


def _line(
    parser: Parser, options: argparse.Namespace, number: int, text: str
) -> argparse.Namespace:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"must be a JSON object; {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"must be a JSON object; got {text[:60]}")
    usual = {**vars(options), "out": f"{number:05}.mp4"}
    if options.seed is not None:
        usual["seed"] = options.seed + number - 1
    if "image" in found or "video" in found:
        usual |= {"image": None, "video": None}
    words: list[str] = []
    for name, value in found.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif isinstance(value, str | int | float) and value is not False:
            words.append(f"{option}={value}")
        else:
            raise ValueError(f"{name} must be a text, a number or true; got {json.dumps(value)}")
    line = parser.parse_args(words, argparse.Namespace(**usual))
    if Path(line.out).name != line.out:
        raise ValueError(f"out must be the name of a file in --out; got {line.out!r}")
    line.out = options.out / line.out
    return line
