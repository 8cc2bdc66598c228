"""Optional packages, imported when they are needed."""

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# pip's names of modules, if they differ.
PACKAGES = {"google": "protobuf", "google.protobuf": "protobuf"}
# Loggers of packages that transformers, peft and accelerate import. They warn of binaries built for
# other machines and of each other's deprecated calls, which a user cannot change.
NOISY = ("torchao", "torch.utils._pytree")


def extra(module: str, who: str, how: str) -> Any:
    """Import a module of an optional package.

    who, how  for the ModuleNotFoundError: what needs it, and what to install
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
    """Silence warnings of other packages while they are imported.

    Also for the first use of a package, such as transformers, that imports its modules lazily.
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
