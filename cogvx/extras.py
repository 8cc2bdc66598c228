"""Packages that not everybody has, reached for when they are needed."""

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# What pip calls a module that is not there, where the names differ.
PACKAGES = {"google": "protobuf", "google.protobuf": "protobuf"}
# Loggers of what transformers, peft and accelerate import where it is installed. They tell of files
# built for other machines and of each other's deprecated calls, which nobody who loads a model can
# change.
NOISY = ("torchao", "torch.utils._pytree")


def extra(module: str, who: str, how: str) -> Any:
    """A module of an optional package.

    who  needs it, how  it is installed: both for the message of the ModuleNotFoundError
    """
    try:
        with quiet_imports():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = PACKAGES.get(error.name or "", error.name)
        raise ModuleNotFoundError(
            f"{who}: {package} is not installed; pip install {how}", name=error.name
        ) from error


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Hold back what other packages say of each other while they are imported; errors are not.

    Also for the first use of a package, such as transformers, that imports its modules then.
    """
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
