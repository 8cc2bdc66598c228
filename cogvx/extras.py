"""Packages that not everybody has, reached for when they are needed."""

import importlib
from typing import Any


def extra(module: str, who: str, how: str) -> Any:
    """A module of an optional package.

    who  needs it, how  it is installed: both for the message of the ModuleNotFoundError
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{who}: {error.name} is not installed; pip install {how}", name=error.name
        ) from error
