"""What a command says while it runs, and at the end."""

import json
import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm


class Console:
    """Progress bars on stderr, where that is a terminal; facts on stdout, at the end.

    With `as_json` stdout holds one JSON object and nothing else.
    """

    def __init__(self, quiet: bool, as_json: bool) -> None:
        self.quiet = quiet
        self.as_json = as_json
        self.started = time.monotonic()
        self._bars: dict[str, tqdm[Any]] = {}

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def progress(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` parts of a stage: chunks of the VAE, steps, prompts."""
        if self.quiet or not sys.stderr.isatty():
            return
        if stage not in self._bars:
            self.close()
            self._bars[stage] = tqdm(total=total, desc=stage, file=sys.stderr, dynamic_ncols=True)
        self._bars[stage].update(done - self._bars[stage].n)

    def close(self) -> None:
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()

    @property
    def seconds(self) -> float:
        """Since the command began."""
        return round(time.monotonic() - self.started, 3)

    def say(self, facts: dict[str, Any], text: str | None = None) -> None:
        """The facts as JSON, or for people: `text`, or else a line for each fact."""
        self.close()
        if self.as_json:
            print(json.dumps(facts, indent=1, allow_nan=False), flush=True)
        elif not self.quiet:
            width = max(map(len, facts))
            lines = [f"{name.replace('_', ' '):{width}}  {_plain(v)}" for name, v in facts.items()]
            print("\n".join(lines) if text is None else text, flush=True)


def _plain(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)
