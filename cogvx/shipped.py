"""The models inside the package, by name."""

import os
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
NAMES = ("tiny",)


def located(path: str | os.PathLike[str]) -> Path:
    """The folder that is meant: that of a shipped model for its bare name, else `path` itself.

    A folder of your own called as a shipped model is `./tiny`.
    """
    return ASSETS / path if path in NAMES else Path(path)
