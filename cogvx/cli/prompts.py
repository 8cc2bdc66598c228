"""`cogvx generate --prompts`: a video for each line of a file; also on ranks, and on Ray."""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout, suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..checkpoint import atomic_path
from ..checkpoint.record import check_record
from ..extras import extra
from ..parallel import Ranks, context_parallel
from ..parallel.launch import TIMEOUT, attempt
from ..pipeline import CogVideoX, resume
from . import ERRORS, loading, message_of, ranks
from .console import Console
from .jobs import Job, Model, decode, denoise, latents_of, seed_of
from .outputs import claimed
from .prompt_lines import read_lines

RETRIES = 3  # of a line whose Ray actor died
GRACE = timedelta(seconds=10)  # ranks that have the same error have it within this of each other
# Errors that leave ranks at the same place, if they all have it; not those of messages and memory.
OF_ALL = (ValueError, OSError, ArithmeticError)
DONE = b"done"  # progress of a rank that has no more lines
FAILED = ".failed.json"  # in --out, for torchrun's next attempt
T = TypeVar("T")


def generate_all(options: argparse.Namespace, console: Console) -> None:
    """Make the videos that are not there yet; a line that fails does not stop the others."""
    processes = ranks.start(options, console, guided=False, many=True)
    lines = read_lines(options)
    check_lines(options, lines, processes)
    # after a failed line torchrun starts all again: it is not tried again
    is_first = processes is None or not dist.get_rank()
    facts = _gathered(processes, _failed_before(options) if is_first else [])[0]
    known = {fact["out"] for fact in facts}
    todo = [line for line in lines if str(line.out) not in known]
    console.progress("videos", len(facts), len(lines))
    made = _on_ray if options.ray is not None else _here if processes is None else _on_ranks
    for fact in made(options, todo, console, processes):
        facts.append(fact)
        console.progress("videos", len(facts), len(lines))
    ranks.end(processes)  # together: the first may hold the store that the others still read
    if is_first:  # it has all facts
        _report(options, facts, console)


def _report(options: argparse.Namespace, facts: list[dict[str, Any]], console: Console) -> None:
    """Print the summary, in torchrun's last attempt; raises RuntimeError if lines failed."""
    failed = [fact for fact in facts if "error" in fact]
    there = [fact for fact in facts if "frames" not in fact and "error" not in fact]
    total = {"made": len(facts) - len(failed) - len(there), "were_there": len(there)}
    total["failed"] = len(failed)
    now, last = attempt()
    if failed and now < last:
        with atomic_path(options.out / FAILED) as part:
            part.write_text(json.dumps(failed))
    else:
        (options.out / FAILED).unlink(missing_ok=True)
        text = "\n".join(f"{name.replace('_', ' '):10}  {count}" for name, count in total.items())
        console.print_summary({**total, "out": str(options.out), "videos": facts}, text)
    if failed:
        listed = "\n".join(f"  {fact['out']}: {fact['error']}" for fact in failed[:10])
        raise RuntimeError(f"{len(failed)} of {len(facts)} videos failed:\n{listed}")


def _failed_before(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Lines that failed in an earlier attempt of this job of torchrun, which made all others."""
    path = options.out / FAILED
    if not attempt()[0]:
        path.unlink(missing_ok=True)  # of another job
    return json.loads(path.read_text()) if path.exists() else []


def _gathered(processes: Ranks | None, value: T) -> list[T]:
    """The (picklable) values of all ranks of all groups."""
    if processes is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_lines(
    options: argparse.Namespace, lines: list[argparse.Namespace], processes: Ranks | None = None
) -> None:
    """Make the folder, and check each line, its finished video too, before weights are read.

    Each rank checks a share of the lines. Raises ValueError, on all of them, for the first bad one.
    """
    model = Model.of(options)
    rank, size = (0, 1) if processes is None else (dist.get_rank(), dist.get_world_size())
    pair = processes is not None and processes.mesh["guidance"].size() > 1
    is_new = not options.out.exists()
    options.out.mkdir(exist_ok=True)
    bad: tuple[int, str] | None = None
    causes: dict[int, BaseException] = {}
    for number, line in list(enumerate(lines, 1))[rank::size]:
        try:
            _check_line(line, model, pair)
        except ERRORS as error:
            bad, causes[number] = (number, message_of(error, options)), error
            break
    if found := [one for one in _gathered(processes, bad) if one is not None]:
        if is_new:
            with suppress(OSError):  # another rank has removed it
                options.out.rmdir()
        number, message = min(found)
        raise ValueError(f"{options.prompts}, line {number}: {message}") from causes.get(number)


def _check_line(line: argparse.Namespace, model: Model, pair: bool) -> None:
    job = Job.of(line, model)
    if pair and line.guidance <= 1:
        raise ValueError(
            "--guidance must be above 1 with --cfg-parallel, two groups of ranks for its two "
            f"predictions; got {line.guidance:g}"
        )
    if job.latents.exists():
        wanted = {k: v for k, v in job.record.items() if (k, v) != ("seed", None)}
        check_record(job.latents, resume.read_record(job.latents), wanted)


class Worker:
    """A model that makes videos one by one; loaded for the first one."""

    def __init__(
        self,
        options: argparse.Namespace,
        console: Console | None = None,
        processes: Ranks | None = None,
    ) -> None:
        self.options = options
        self.console = console or Console(quiet=True, as_json=True)
        self.processes = processes
        self.model = Model.of(options)

    @cached_property
    def pipe(self) -> CogVideoX:
        pipe = self.model.load(self.options, self.console, text_encoder=self._first)
        if self.processes is not None:
            context_parallel(pipe, self.processes.mesh)
            ranks.share(pipe.vae.decoder, self.processes, loading.tiling_of(self.options))
        return pipe

    @torch.no_grad()
    def run(self, line: argparse.Namespace) -> dict[str, Any]:
        """Make the video of a line, or go on with it; returns a summary, or the error.

        Among several ranks an error is raised unless all have it: the others wait for this one.
        """
        try:
            with ExitStack() as held:
                return {"out": str(line.out), **self._made(line, held)}
        except ERRORS as error:
            if not self._is_of_all(line, error):
                raise
            return {"out": str(line.out), "error": message_of(error, line)}

    def _made(self, line: argparse.Namespace, held: ExitStack) -> dict[str, Any]:
        def begin() -> int | None:
            held.enter_context(claimed(line.out))
            return None if line.out.exists() else _seed(line)

        seed = begin() if self.processes is None else self.processes.shared(begin)
        if seed is None:
            return {}
        job = Job.of(argparse.Namespace(**{**vars(line), "seed": seed}), self.model)
        denoise(self.pipe, job, line, self.console, resume_it=job.latents.exists())
        frames = decode(self.pipe.vae, job, line, self.console, self.processes)
        return {"frames": frames, "fps": job.fps, "seed": seed}

    def _is_of_all(self, line: argparse.Namespace, error: BaseException) -> bool:
        """True if all ranks of this video have the error, so that none waits for another."""
        if self.processes is None or not self.processes.several:
            return True
        if not isinstance(error, OF_ALL):
            return False
        store, key = _store(), f"failed {line.out.name}"
        keys = [f"{key} {rank}" for rank in self.processes.numbers]
        store.set(f"{key} {dist.get_rank()}", str(error))
        try:
            store.wait(keys, GRACE)
        except RuntimeError:  # a rank has none
            return False
        return len({store.get(key) for key in keys}) == 1

    @property
    def _first(self) -> bool:
        return self.processes is None or self.processes.first


def _seed(line: argparse.Namespace) -> int:
    """Seed of a line, or of its latents, or a new one."""
    latents = latents_of(line.out)
    seed = line.seed
    if seed is None and latents.exists():
        seed = seed_of(latents)
    return int(torch.randint(1 << 31, ())) if seed is None else int(seed)


def _here(
    options: argparse.Namespace,
    lines: list[argparse.Namespace],
    console: Console,
    processes: Ranks | None,
) -> Iterator[dict[str, Any]]:
    """The lines in this process, in order."""
    worker = Worker(options, console)
    for line in lines:
        yield worker.run(line)


def _on_ranks(
    options: argparse.Namespace,
    lines: list[argparse.Namespace],
    console: Console,
    processes: Ranks | None,
) -> Iterator[dict[str, Any]]:
    """The lines on groups of ranks, each of which takes the next one that none has taken.

    On the first rank of all, summaries of all lines; on others none.
    """
    assert processes is not None
    store, rank = _store(), dist.get_rank()
    missing = list(range(len(lines)))

    def others() -> Iterator[dict[str, Any]]:
        for number in missing.copy():
            if store.check([f"line {number}"]):
                missing.remove(number)
                yield json.loads(store.get(f"line {number}"))

    beats = itertools.count()
    console.on_progress = lambda: store.set(f"alive {rank}", str(next(beats)))
    worker = Worker(options, console, processes)
    while (number := processes.shared(lambda: store.add("taken", 1) - 1)) < len(lines):
        console.on_progress()
        fact = worker.run(lines[number])
        if processes.first:
            store.set(f"line {number}", json.dumps(fact))
        if not rank:
            yield from others()
    console.on_progress = None
    store.set(f"alive {rank}", DONE.decode())
    alive = _Alive(store)
    while not alive.all_done():
        time.sleep(0.1)  # a wait in the store would not be ended by a signal
        if not rank:
            yield from others()
    if not rank:
        yield from others()


class _Alive:
    """Progress of the ranks, each of which sets its own key in the store."""

    def __init__(self, store: Any) -> None:
        self.store = store
        now = time.monotonic()
        self.seen = {rank: (b"", now) for rank in range(dist.get_world_size())}

    def all_done(self) -> bool:
        """False while ranks have lines. Raises RuntimeError if one does nothing for `TIMEOUT`."""
        now = time.monotonic()
        for rank, (last, since) in self.seen.items():
            key = f"alive {rank}"
            beat = self.store.get(key) if self.store.check([key]) else b""
            if beat != last:
                self.seen[rank] = beat, now
            elif beat != DONE and now - since > TIMEOUT.total_seconds():
                raise RuntimeError(
                    f"rank {rank} has made no progress for {TIMEOUT}, it is frozen or lost"
                )
        return all(beat == DONE for beat, _ in self.seen.values())


def _store() -> Any:
    """The store of all ranks, new in each of torchrun's attempts."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD.get_group_store()


def _on_ray(
    options: argparse.Namespace,
    lines: list[argparse.Namespace],
    console: Console,
    processes: Ranks | None,
) -> Iterator[dict[str, Any]]:
    """The lines on actors of a Ray cluster, one for each GPU, or CPU; as they are done.

    An actor that dies is started again, and its line goes on where its latents were saved last; at
    most `RETRIES` times, then the line has failed.
    """
    if processes is not None:
        raise ValueError("--ray must come without torchrun; it starts its own processes")
    ray = extra("ray", "--ray", "'cogvx[ray]'")
    ready = [line for line in lines if line.out.exists()]
    yield from ({"out": str(line.out)} for line in ready)
    if len(ready) == len(lines):
        return
    with redirect_stdout(sys.stderr), ray.init(options.ray or None, log_to_driver=False):
        found = ray.cluster_resources()
        kind = "CPU" if options.device == "cpu" or not found.get("GPU") else "GPU"
        count = min(len(lines) - len(ready), int(found[kind]))
        place = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
        actor = ray.remote(Worker).options(max_restarts=-1, max_task_retries=RETRIES, **place)
        free = [actor.remote(_plain(options)) for _ in range(count)]
        todo = [_plain(line) for line in reversed(lines) if line not in ready]
        running: dict[Any, tuple[Any, argparse.Namespace]] = {}
        while todo or running:
            while todo and free:
                worker, line = free.pop(), todo.pop()
                running[worker.run.remote(line)] = worker, line
            [done], _ = ray.wait(list(running))
            worker, line = running.pop(done)
            free.append(worker)
            try:
                yield ray.get(done)
            except ray.exceptions.RayTaskError:
                raise  # a bug
            except ray.exceptions.RayError as error:  # its actor died, more than RETRIES times
                yield {"out": str(line.out), "error": str(error).splitlines()[0]}


def _plain(options: argparse.Namespace) -> argparse.Namespace:
    """Options for a process in another folder, without what only this one can call."""
    found = {name: value for name, value in vars(options).items() if name != "run"}
    for name, value in found.items():
        if isinstance(value, Path) or (name == "model" and Path(value).exists()):
            found[name] = type(value)(Path(value).absolute())
    found["lora"] = [path.absolute() for path in options.lora]
    return argparse.Namespace(**found)
