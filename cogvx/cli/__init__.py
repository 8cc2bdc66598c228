"""`cogvx`: the model on the command line.

Each subcommand maps its arguments to a call of the library and a file; nothing is computed here.
What went wrong is one line on stderr. The exit status is 0; 1 for what went wrong; 2 for a command
line that makes no sense; 130 after Ctrl-C, 143 after SIGTERM. Outputs appear whole or not at all.
"""

import argparse
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from . import clips, demo, generate, models, score, train
from .console import Console

DESCRIPTION = "Generate, encode, decode and reconstruct video with CogVideoX, and train it."
# What a user can cause. Anything else is a fault of the program, and keeps its traceback.
ERRORS = (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError, ImportError)


class Terminated(BaseException):
    """SIGTERM came; raised where it came, so that everything is tidied up on the way out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as end:  # argparse has said what there was to say
        return end.code if isinstance(end.code, int) else 2
    with _signals(), _warnings(), Console(options.quiet, options.json) as console:
        try:
            with torch.no_grad():
                options.run(options, console)
        except KeyboardInterrupt:
            return _end(130, "interrupted")
        except Terminated:
            return _end(143, "terminated")
        except BrokenPipeError:  # whoever read stdout has gone; nothing more can be said there
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except ERRORS as error:
            if options.traceback:
                traceback.print_exception(error)
            return _end(1, f"error: {_message(error)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cogvx", description=DESCRIPTION)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    says = shared.add_argument_group("what is said")
    says.add_argument("--quiet", action="store_true", help="no progress bars, no summary")
    says.add_argument("--json", action="store_true", help="print the facts as one JSON object")
    says.add_argument("--traceback", action="store_true", help="with an error, say where it arose")
    for module in (demo, generate, clips, models, train, score):
        module.add(commands, shared)
    return parser


@contextmanager
def _signals() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _warnings() -> Iterator[None]:
    """Warnings in the voice of the errors, each once."""

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        print(f"cogvx: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _message(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "out of memory on the GPU. cogvx plan says what a clip needs; --tiling, --cfg two_pass "
            "and a smaller clip need less"
        )
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _end(status: int, message: str) -> int:
    print(f"cogvx: {message}", file=sys.stderr)
    return status
