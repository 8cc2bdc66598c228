"""Cases in a forked process: one that crashes, or never ends, is one red case and not the last.

A fork has all that is loaded, so a case needs no pickling and starts at once. Where a case kills
its worker, the next worker begins with the case after it, in the state of the parent; what a case
draws at random should therefore hang on the case alone. Linux.
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

GRACE = 2.0  # seconds that a worker has to say where it hangs
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Outcome(Generic[Case]):
    """What became of a case.

    detail  the traceback; or the signal by name; or how long it was waited for
    output  what the case wrote to stdout and stderr, the Python stack of a crash included
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
    """An outcome for each case of `function(case)`, in order; `timeout` seconds for each."""
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
        self.shown = 0  # bytes of the output that are some case's
        self.reader, writer = os.pipe()
        self.pid = _fork()
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
        """As they come, up to and with the one that ended the worker."""
        received = bytearray()
        for case in self.cases:
            deadline = time.monotonic() + timeout
            while b"\n" not in received:
                if not self.readable(deadline - time.monotonic()):
                    self.end(signal.SIGABRT)  # at which the worker prints where it hangs
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
        """What the process wrote since the last call, up to this place in its output."""
        written = os.fstat(self.output.fileno()).st_size if end is None else end
        start, self.shown = self.shown, written
        # Not by read: parent and child share one position in the file, where the child writes.
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
        """Whether the process has ended, within that time; None waits for ever."""
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


def _fork() -> int:
    with warnings.catch_warnings():
        # From 3.12 on Python warns of a fork with threads about. The worker uses none of them, and
        # computes with one thread, so that it waits for no OpenMP thread that did not come along.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _work(
    function: Callable[[Any], Any], cases: Sequence[Any], writer: int, output: int
) -> NoReturn:
    """The worker's life. It never returns into the parent's code, nor runs its exit handlers."""
    exit_status = 1
    with contextlib.suppress(BaseException):
        _settle(output)
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
            _write(writer, (json.dumps(report) + "\n").encode())
        exit_status = 0
    os._exit(exit_status)


def _settle(output: int) -> None:
    """Make a forked copy of a test process a process of its own."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a hung worker outlives nobody
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for stream in (1, 2):
        os.dup2(output, stream)
    # By lines, so that what was said before a crash is there.
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    faulthandler.enable(sys.stderr, all_threads=False)
    torch.set_num_threads(1)
    gc.freeze()  # what was there before the fork is nobody's garbage, and not to be looked through


def _write(writer: int, message: bytes) -> None:
    while message:
        message = message[os.write(writer, message) :]
