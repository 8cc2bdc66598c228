"""Run cases in a forked process, where a crash or a hang fails one case and the others go on.

A fork has everything loaded, so a case needs no pickling and starts at once. After a case kills its
worker, the next case starts in a new fork of the parent; random numbers of a case should therefore
depend on the case alone. Linux.
"""

import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Generic, Literal, NoReturn, TypeVar

import torch

Case = TypeVar("Case")

GRACE = 2.0  # seconds for a worker to print where it hangs
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Outcome(Generic[Case]):
    """Result of a case.

    detail  traceback, name of the signal, or time limit
    output  stdout and stderr of the case, with the Python stack of a crash
    """

    case: Case
    status: Literal["passed", "failed", "crashed", "timed out"]
    detail: str = ""
    output: str = ""

    @property
    def ok(self) -> bool:
        return self.status == "passed"

    def __str__(self) -> str:
        return "\n".join(filter(None, (f"{self.case}: {self.status}", self.detail, self.output)))


def run_cases(
    function: Callable[[Case], Any], cases: Iterable[Case], timeout: float = 60.0
) -> list[Outcome[Case]]:
    """Run `function(case)` for each case, `timeout` seconds each; return the outcomes in order."""
    import torch._dynamo  # noqa: F401  (by the first custom op: 1 to 3 s, again in each fork)

    cases = list(cases)
    outcomes: list[Outcome[Case]] = []
    while len(outcomes) < len(cases):
        with _Worker(function, cases[len(outcomes) :]) as worker:
            outcomes += worker.outcomes(timeout)
    return outcomes


class _Worker:
    """A forked process that runs cases until one ends it."""

    def __init__(self, function: Callable[[Any], Any], cases: Sequence[Any]) -> None:
        self.cases = cases
        self.status: int | None = None  # of the process, once it has ended
        self.output: BinaryIO = tempfile.TemporaryFile()
        self.shown = 0  # bytes of the output already returned
        self.reader, writer = os.pipe()
        self.pid = fork()
        if self.pid == 0:
            os.close(self.reader)
            _work(function, cases, writer, self.output.fileno())
        os.close(writer)

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.reader)
        self.end(signal.SIGKILL)
        self.output.close()

    def outcomes(self, timeout: float) -> Iterator[Outcome[Any]]:
        """Yield outcomes up to the case that ended the worker."""
        received = bytearray()
        for case in self.cases:
            deadline = time.monotonic() + timeout
            while b"\n" not in received:
                if not self.readable(deadline - time.monotonic()):
                    self.end(signal.SIGABRT)  # the worker prints its stack
                    yield Outcome(case, "timed out", f"after {timeout:g} s", self.output_to())
                    return
                chunk = os.read(self.reader, 1 << 16)
                if not chunk:
                    yield Outcome(case, "crashed", self.cause_of_death(), self.output_to())
                    return
                received += chunk
            line, _, rest = received.partition(b"\n")
            received = bytearray(rest)
            status, detail, end = json.loads(line)
            yield Outcome(case, status, detail, self.output_to(end))

    def readable(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self.reader, select.POLLIN | select.POLLHUP)
        return bool(poll.poll(max(0.0, seconds) * 1000))

    def output_to(self, end: int | None = None) -> str:
        """The output since the last call, up to a position."""
        written = os.fstat(self.output.fileno()).st_size if end is None else end
        start, self.shown = self.shown, written
        # pread, because parent and child share the file position.
        return os.pread(self.output.fileno(), self.shown - start, start).decode(errors="replace")

    def cause_of_death(self) -> str:
        self.wait(None)
        code = os.waitstatus_to_exitcode(self.status)
        return signal.Signals(-code).name if code < 0 else f"the process exited with status {code}"

    def end(self, how: signal.Signals) -> None:
        """Send the signal, SIGKILL if that does not help, and leave no zombie."""
        if self.status is None:
            os.kill(self.pid, how)
            if not self.wait(GRACE):
                os.kill(self.pid, signal.SIGKILL)
                self.wait(None)

    def wait(self, seconds: float | None) -> bool:
        """Return True if the process ends within that time; None waits without limit."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while self.status is None:
            pid, status = os.waitpid(self.pid, 0 if deadline is None else os.WNOHANG)
            if pid:
                self.status = status
            elif time.monotonic() > deadline:
                return False
            else:
                time.sleep(0.005)
        return True


def fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork with threads. The worker uses none of them, and one OpenMP
        # thread, so that it does not wait for threads that were not forked.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _work(
    function: Callable[[Any], Any], cases: Sequence[Any], writer: int, output: int
) -> NoReturn:
    """Run the cases and exit, without a return to the parent's code or its exit handlers."""
    exit_status = 1
    with contextlib.suppress(BaseException):
        settle(output)
        for case in cases:
            status, detail = "passed", ""
            try:
                function(case)
            except BaseException:
                status, detail = "failed", traceback.format_exc()
            gc.collect()  # the interpreter's launches hold their arguments in cycles
            sys.stdout.flush()
            sys.stderr.flush()
            report = status, detail, os.lseek(output, 0, os.SEEK_CUR)
            write(writer, (json.dumps(report) + "\n").encode())
        exit_status = 0
    os._exit(exit_status)


def settle(output: int) -> None:
    """Set up a forked process: its output, limits, and death with its parent."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # dies with its parent
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for stream in (1, 2):
        os.dup2(output, stream)
    # Line-buffered, so that output before a crash is kept.
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    faulthandler.enable(sys.stderr, all_threads=False)
    torch.set_num_threads(1)
    gc.freeze()  # objects from before the fork need no collection


def write(writer: int, message: bytes) -> None:
    while message:
        message = message[os.write(writer, message) :]
