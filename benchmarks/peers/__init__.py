"""What others offer for our ops, spelled with our arguments; their code is called, never copied.

Each file is about a family of ops and maps an op's name to a maker: given the arguments it makes,
once and untimed, a function of them, or raises `Unavailable`.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

Function = Callable[..., Any]
Arguments = Mapping[str, Any]
Maker = Callable[[Arguments], Function]


class Unavailable(Exception):
    """A provider cannot run here; the message says why."""


def find(library: str, *places: tuple[str, str]) -> Any:
    """The first attribute found among (module, name); a library moves its own about.

    Raises Unavailable with what the last import said. Whatever an import raises counts: some look
    for a GPU, a driver or a compiler on their way.
    """
    said = "no place to look"
    for module, name in places:
        try:
            return getattr(importlib.import_module(module), name)
        except Exception as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
    raise Unavailable(f"{library} does not import ({said})")
