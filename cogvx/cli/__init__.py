"""Command line `cogvx`.

Each command maps its arguments to a call of the library. An error is one line on stderr. The exit
status is 0; 1 for an error; 2 for an invalid command line; 130 after Ctrl-C, 143 after SIGTERM.
Outputs are written atomically.

Importing this package imports no torch: the module of a command is imported when it runs.
"""

import argparse
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .console import Console
from .parser import make

# Errors that a user can cause. Anything else is a bug, and keeps its traceback.
ERRORS = (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError, ImportError)
# Options that are named differently from the argument of the library.
OPTIONS = {
    "num_frames": "frames",
    "num_steps": "steps",
    "negative_prompt": "negative",
    "save_latents": "out",
}
# Classes and functions at the start of messages, which a user of the command line does not know.
CALLEES = re.compile(
    r"\A(?:cogvx|build_transformer|build_vae|timestep_schedule|forecast|plan|train|convert|load_lora|parallel\.start|"
    r"open_video|read_image|read_video|write_video|write_tensors|stream_encode|stream_decode|held_out_prompts|"
    r"(?:CogVideoX|CausalVAE|ExpertTransformer|T5TextEncoder|WordTextEncoder|TransformerConfig|"
    r"VAEConfig|Tiling)(?:\.\w+)?): "
)


class Terminated(BaseException):
    """Raised on SIGTERM, so that everything is cleaned up."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit status."""
    try:
        options = make().parse_args(argv)
    except SystemExit as end:  # argparse has printed help, version or error
        return end.code if isinstance(end.code, int) else 2
    options.typed = sys.argv[1:] if argv is None else list(argv)
    with _signals(), _warnings(), Console(options.quiet, options.json) as console:
        try:
            # Here torch is imported, by the module of the command.
            options.run(options, console)
        except KeyboardInterrupt:
            return _end(console, 130, "interrupted")
        except Terminated:
            return _end(console, 143, "terminated")
        except BrokenPipeError:  # the reader of stdout has exited
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except ERRORS as error:
            console.close()
            if options.traceback:
                traceback.print_exception(error)
            launch = sys.modules.get("cogvx.parallel.launch")
            if launch is not None and launch.is_other_rank():
                return 1  # often of the same error as the first
            return _end(console, 1, f"error: {message_of(error, options)}")
    return 0


@contextmanager
def _signals() -> Iterator[None]:
    """Raise an exception on SIGTERM, as on Ctrl-C; a second signal ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        for other in before:
            signal.signal(other, signal.SIG_DFL)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    # A signal that is ignored, as in a background job of a script, stays ignored.
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _warnings() -> Iterator[None]:
    """Print warnings like errors, each once."""

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        print(f"cogvx: warning: {CALLEES.sub('', str(message), 1)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def message_of(error: BaseException, options: argparse.Namespace) -> str:
    """The error in a line, with arguments of the library named as options."""
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "out of memory on the GPU. cogvx plan prints what a clip needs; --tiling, --cfg "
            "two_pass and a smaller clip need less"
        )
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return _as_typed(str(error), options) or type(error).__name__


def _as_typed(message: str, options: argparse.Namespace) -> str:
    """Replace the library's argument names in a message by options.

    "timestep_schedule: num_steps must be …" becomes "--steps must be …" if the command has --steps.
    """
    message = CALLEES.sub("", message, 1)
    found = re.match(r"(\w+)(?: and (\w+))? must ", message)
    names = [OPTIONS.get(name, name) for name in found.groups() if name] if found else []
    if found is None or not all(name in options for name in names):
        return message
    subject = " and ".join(f"--{name.replace('_', '-')}" for name in names)
    wanted = re.sub(r"^be None\b", "be left out", message[found.end() :])
    return f"{subject} must {wanted}"


def _end(console: Console, status: int, message: str) -> int:
    console.close()
    print(f"cogvx: {message}", file=sys.stderr)
    return status
