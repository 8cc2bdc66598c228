"""Conditions of a measurement: commit, date, versions, device, command."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

# Columns of every row, after the row's own.
CONDITIONS = tuple(
    "commit date torch triton cuda driver device_name sm_clock_mhz copy_gb_per_s command".split()
)


def conditions(device: torch.device, command: str) -> dict[str, str | float | None]:
    """All that is known before timing; `clock` and the copy ceiling are known after it."""
    return dict.fromkeys(CONDITIONS) | {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "driver": _nvidia_smi(device, "driver_version") or "none",
        "device_name": device_name(device),
        "command": command,
    }


def commit() -> str:
    """The commit, with +dirty where files differ from it. COGVX_COMMIT stands in without git."""
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    if not head:
        return os.environ.get("COGVX_COMMIT", "unknown")
    return head + ("+dirty" if _output("git", "status", "--porcelain") else "")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def clock(device: torch.device) -> int | None:
    """MHz of the multiprocessors now; read while they are still warm. None if unreadable."""
    mhz = _nvidia_smi(device, "clocks.sm")
    return int(mhz) if mhz.isdigit() else None


def _nvidia_smi(device: torch.device, field: str) -> str:
    if device.type != "cuda" or torch.version.cuda is None:
        return ""
    which = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = (f"--query-gpu={field}", "--format=csv,noheader,nounits")
    return _output("nvidia-smi", "-i", which, *query)


def _output(*command: str) -> str:
    """Output of a command; empty if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
