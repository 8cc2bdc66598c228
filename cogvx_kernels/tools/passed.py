"""Cache of the passes of `cogvx-kernels verify`, in the user's cache folder.

A pass is valid for the files of this package, the versions of Python, torch, Triton and NumPy, the
settings of Triton, the device and the seed. Each environment, device and seed has a file; any other
change invalidates it, and the next pass replaces it.
"""

import contextlib
import hashlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from .doctor import version

PACKAGE = Path(__file__).resolve().parents[1]
VERSIONS = ("torch", "triton", "numpy")
SOURCES = (".py", ".so", ".pyd")


class Passes:
    """Passes of each op on a device with a seed.

    A pass is a JSON dict with "date", "quick" (only some samples were compared), and further values
    of the caller.
    """

    def __init__(self, device: str, seed: int) -> None:
        name = _digest(sys.prefix, device, seed)[:16]
        self.path = cache_folder() / f"verify-{name}.json"
        self._state = _state()
        self._passes: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            kept = json.loads(self.path.read_text())
            if kept["state"] == self._state:
                self._passes = dict(kept["passes"])

    def find(self, op: str, quick: bool) -> dict[str, Any] | None:
        """The pass of an op, or None; a pass of all samples also counts with `quick`."""
        found = self._passes.get(op)
        return None if found is None or (found["quick"] and not quick) else found

    def put(self, op: str, result: dict[str, Any] | None) -> None:
        """Store a pass, or with None delete it; an unwritable cache is ignored."""
        self._passes = {**self._passes, op: result}
        if result is None:
            del self._passes[op]
        kept = json.dumps({"state": self._state, "passes": self._passes})
        part = self.path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(kept)
            os.replace(part, self.path)


def cache_folder() -> Path:
    """The user's cache folder for this package."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(home):
        return Path(home) / "cogvx"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "cogvx"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "cogvx"


def _state() -> str:
    """Digest of everything that a result depends on besides device and seed."""
    files = sorted(path for path in PACKAGE.rglob("*") if path.suffix in SOURCES)
    sources = [(str(path.relative_to(PACKAGE)), _digest(path.read_bytes())) for path in files]
    # The device's name says whether kernels are interpreted.
    names = {name for name in os.environ if name.startswith("TRITON_")} - {"TRITON_INTERPRET"}
    settings = [(name, os.environ[name]) for name in sorted(names)]
    cpu = platform.machine(), torch.backends.cpu.get_cpu_capability()
    versions = platform.python_version(), *map(version, VERSIONS)
    return _digest(sources, versions, cpu, settings)


def _digest(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()
