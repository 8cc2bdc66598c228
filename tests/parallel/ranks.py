"""Run a function on several ranks of torch.distributed: forked processes, gloo, one machine.

A fork has torch and cogvx loaded, so that a rank starts in milliseconds. Linux.
"""

import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from select import POLLHUP, POLLIN, poll
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.launcher import LaunchConfig, elastic_launch

from tests.harness.workers import Outcome, fork, run_cases, settle, write

GRACE = 2.0  # seconds for the other ranks, after one has failed


class RankFailure(Exception):
    """A rank raised, died or did not finish; `rank` is that of the first."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


@dataclass
class _Rank:
    pid: int
    reader: int
    output: Any
    received: bytes = b""
    ended: bool = False


def run(
    function: Callable[..., Any],
    size: int,
    *args: Any,
    deadline: float = 120.0,
    timeout: float = 60.0,
) -> list[Any]:
    """Call function(*args) on each rank, in a process group; return the results in rank's order.

    Results are pickled. The default process group is there: `torch.distributed.get_rank()`.

    deadline  seconds until all ranks are killed
    timeout   of a collective, in seconds

    Raises RankFailure, with the traceback, signal or stack of the rank that failed first, if one
    raises, dies or is not done at the deadline.
    """
    import torch._dynamo  # noqa: F401  (by the first custom op: 1 to 3 s, again in each fork)

    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store")
        try:
            for rank in range(size):
                ranks.append(_start(function, args, rank, size, store, timeout, ranks))
            late = _wait(ranks, deadline)
            return _results(ranks, f"not done after {deadline:g} s" if late else "")
        finally:
            for one in ranks:
                _end(one)
                os.close(one.reader)
                one.output.close()


def torchrun(
    function: Callable[..., int], size: int, *args: Any, restarts: int = 0, deadline: float = 120.0
) -> Outcome[int]:
    """Exit by the status function(*args) in processes of torchrun's agent, which are forked and
    import nothing anew.

    The agent's report of a process that failed is in the outcome's detail.
    """

    def work() -> NoReturn:
        sys.exit(function(*args))

    def launch(size: int) -> None:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=size,
            run_id="test",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            max_restarts=restarts,
            start_method="fork",
        )
        elastic_launch(config, work)()

    [outcome] = run_cases(launch, [size], deadline)
    return outcome


def _start(
    function: Callable[..., Any],
    args: Any,
    rank: int,
    size: int,
    store: Path,
    timeout: float,
    others: list[_Rank],
) -> _Rank:
    reader, writer = os.pipe()
    output = tempfile.TemporaryFile()
    pid = fork()
    if pid == 0:
        for descriptor in (reader, *(other.reader for other in others)):
            os.close(descriptor)
        _work(function, args, rank, size, store, timeout, writer, output.fileno())
    os.close(writer)
    return _Rank(pid, reader, output)


def _work(
    function: Callable[..., Any],
    args: Any,
    rank: int,
    size: int,
    store: Path,
    timeout: float,
    writer: int,
    output: int,
) -> NoReturn:
    """Run one rank and exit, without a return to the parent's code or its exit handlers."""
    with suppress(BaseException):
        settle(output)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(str(store), size),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout),
            )
            report = pickle.dumps((True, function(*args), time.monotonic()))
            dist.barrier()  # or the last of the others lose their connection
        except BaseException:
            report = pickle.dumps((False, traceback.format_exc(), time.monotonic()))
        write(writer, report)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _wait(ranks: list[_Rank], deadline: float) -> bool:
    """Read the reports of all ranks; returns True if the deadline has passed.

    After a failure the others have `GRACE` seconds.
    """
    end, failed = time.monotonic() + deadline, False
    waiting = {rank.reader: rank for rank in ranks}
    while waiting:
        poller = poll()
        for reader in waiting:
            poller.register(reader, POLLIN | POLLHUP)
        ready = poller.poll(max(0.0, end - time.monotonic()) * 1000)
        if not ready:
            return not failed
        for reader, _ in ready:
            chunk = os.read(reader, 1 << 20)
            rank = waiting[reader]
            rank.received += chunk
            if not chunk:
                rank.ended = True
                del waiting[reader]
                if not failed and not (rank.received and pickle.loads(rank.received)[0]):
                    failed, end = True, min(end, time.monotonic() + GRACE)
    return False


def _results(ranks: list[_Rank], late: str) -> list[Any]:
    found: list[Any] = []
    failures: list[tuple[float, int, str]] = []
    for number, rank in enumerate(ranks):
        if rank.received and rank.ended:
            passed, value, when = pickle.loads(rank.received)
            found.append(value)
            if not passed:
                failures.append((when, number, value))
        elif rank.ended or late:
            # A rank that died, or that others wait for, comes before those that noticed.
            failures.append((0.0, number, late or _end(rank)))
    if not failures:
        return found
    if late:
        for rank in ranks:
            _end(rank, signal.SIGABRT)  # prints the Python stack
    _, first, detail = min(failures)
    text = [f"rank {first} of {len(ranks)}: {detail}"]
    for number, rank in enumerate(ranks):
        rank.output.seek(0)
        if printed := rank.output.read().decode(errors="replace"):
            text.append(f"rank {number} printed: {printed}")
    raise RankFailure(first, "\n".join(text))


def _end(rank: _Rank, how: signal.Signals = signal.SIGKILL) -> str:
    """End a process that still runs; returns how it ended, "" if that is known already."""
    if not rank.pid:
        return ""
    if not rank.ended:
        os.kill(rank.pid, how)
        limit = time.monotonic() + GRACE
        while how != signal.SIGKILL and time.monotonic() < limit:
            if os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.005)
        os.kill(rank.pid, signal.SIGKILL)
    _, status = os.waitpid(rank.pid, 0)
    rank.pid = 0
    code = os.waitstatus_to_exitcode(status)
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
