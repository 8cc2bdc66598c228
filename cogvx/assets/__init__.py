"""The models inside the package, by their bare names; each is a folder with its card, README.md."""

import os
from pathlib import Path

PathLike = str | os.PathLike[str]

SHIPPED = ("tiny",)


def located(path: PathLike) -> Path:
    """The folder of a model: the package's own if `path` is one of the names, else `path` itself.

    A folder of yours that has such a name is "./tiny".
    """
    return Path(__file__).parent / path if path in SHIPPED else Path(path)
