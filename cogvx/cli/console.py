"""Output of a command: progress on stderr, summary on stdout."""

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any, TypeVar

EVERY = 10.0  # seconds between two lines of progress where stderr is no terminal
T = TypeVar("T")


class Console:
    """Progress on stderr (one line on a terminal, else one every 10 s), summary on stdout.

    With `as_json` stdout is one JSON object. `hold` keeps a context manager open until the command
    ends.
    """

    def __init__(self, quiet: bool, as_json: bool, every: float = EVERY) -> None:
        self.quiet = quiet
        self.as_json = as_json
        self.started = time.monotonic()
        self._held = ExitStack()
        self._stage: _Stage | None = None
        self._every = every
        self.on_progress: Callable[[], None] | None = None  # called even if quiet
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        self._held.close()

    def hold(self, manager: AbstractContextManager[T]) -> T:
        """Enter a context manager until the command ends."""
        return self._held.enter_context(manager)

    def progress(self, stage: str, done: int = 0, total: int | None = None) -> None:
        """Report `done` of `total` chunks, steps or prompts of a stage; no total: not counted."""
        if self.on_progress is not None:
            self.on_progress()
        if self.quiet:
            return
        now = self._stage
        if now is None or (now.name, now.total) != (stage, total) or done < now.done:
            if now is not None:
                now.close()
            self._stage = _Stage(stage, done, total)
        assert self._stage is not None
        self._stage.move(done)
        if self._thread is None:
            self._thread = threading.Thread(target=self._report, daemon=True)
            self._thread.start()

    def note(self, message: str) -> None:
        """Print a line on stderr unless quiet."""
        if not self.quiet:
            self.close()
            print(f"cogvx: {message}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the progress line."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._ended.clear()
        if self._stage is not None:
            self._stage.close()
            self._stage = None

    @property
    def seconds(self) -> float:
        """Seconds since the command began."""
        return round(time.monotonic() - self.started, 3)

    def print_summary(self, facts: dict[str, Any], text: str | None = None) -> None:
        """Print the facts as JSON or, without --json, as `text`, by default a line for each."""
        self.close()
        if self.as_json:
            print(json.dumps(facts, indent=1, allow_nan=False), flush=True)
        elif not self.quiet:
            width = max(map(len, facts))
            lines = [f"{name.replace('_', ' '):{width}}  {_plain(v)}" for name, v in facts.items()]
            print("\n".join(lines) if text is None else text, flush=True)

    def _report(self) -> None:
        """Refresh the progress periodically: a step may take minutes."""
        while not self._ended.wait(1.0 if sys.stderr.isatty() else self._every):
            if (stage := self._stage) is not None:
                stage.report()


class _Stage:
    """Progress of one stage, and its line on stderr."""

    def __init__(self, name: str, done: int, total: int | None) -> None:
        self.name = name
        self.total = total
        self.done = self.first = done
        self.began = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def move(self, done: int) -> None:
        self.done = done
        if self.terminal:
            self.report()

    def report(self) -> None:
        if self.terminal:  # overwrite the line
            print(f"\r{self}\x1b[K", end="", file=sys.stderr, flush=True)
        else:
            print(self, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.terminal:
            print(f"\r{self}\x1b[K", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        """Format as "denoise 12/50, 0:34 elapsed, about 1:47 left"."""
        elapsed = time.monotonic() - self.began
        count = "" if self.total is None else f" {self.done}/{self.total}"
        line = f"{self.name}{count}, {clock(elapsed)} elapsed"
        made = self.done - self.first
        if self.total is None or made < 1 or self.done >= self.total:
            return line
        return f"{line}, about {clock(elapsed / made * (self.total - self.done))} left"


def clock(seconds: float) -> str:
    """Format seconds as 1:05 or 2:03:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
