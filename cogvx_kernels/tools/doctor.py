"""`cogvx-kernels doctor`: installed versions, the backend of each op and why, missing features."""

import importlib
import importlib.metadata
import importlib.util
import json
import platform
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from .. import __version__, _backend, _checks
from ..conv3d import known_issue
from ..testing import OPS
from . import options as command_line

OLDEST_TORCH = (2, 10)
OLDEST_TRITON = (3, 6)
CONVOLVED = (torch.bfloat16, torch.float16, torch.float32)

OPTIONAL = {
    "flash_attn": "no attention by flash-attn; torch's own is used",
    "diffusers": "no patching of diffusers pipelines, and no benchmark against them",
    "transformers": "no T5 text encoder",
    "av": "no reading and writing of video files",
    "matplotlib": "no plots of the benchmarks",
    "liger_kernel": "one peer less in the benchmarks",
}


def examine() -> dict[str, Any]:
    """The report as data; `lost` lists missing features, `warnings` known problems."""
    lost: list[str] = []
    warnings: list[str] = []
    extension = _extension(lost)
    facts: dict[str, Any] = {
        "cogvx": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": version("triton") if _backend.HAS_TRITON else None,
        "cudnn": torch.backends.cudnn.version(),
        "numpy": version("numpy"),
        "extension": _words(extension),
        "gpus": _gpus(lost),
        "conv3d": _conv3d(warnings),
    }
    if _release(torch.__version__) < OLDEST_TORCH:
        warnings.append(f"torch {torch.__version__} is older than 2.10, the oldest supported")
    if facts["triton"] is None:
        lost.append("Triton is not installed: every op runs its plain-torch reference")
    elif _release(facts["triton"]) < OLDEST_TRITON:
        warnings.append(f"triton {facts['triton']} is older than 3.6, the oldest supported")
    for module, what in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            lost.append(f"without {module}: {what}")
    facts["ops"] = _ops(extension)
    return {**facts, "lost": lost, "warnings": warnings}


def main(argv: list[str]) -> int:
    options = command_line.doctor(argv)
    facts = examine()
    if options.json:
        print(json.dumps(facts, indent=1))
        return 0
    if options.short:
        print(_short(facts))
        return 0
    for key in ("cogvx", "python", "platform", "torch", "triton", "cudnn", "numpy"):
        print(f"{key:10} {facts[key] or 'not installed'}")
    print(f"{'extension':10} {facts['extension']}")
    for gpu in facts["gpus"] or ["none"]:
        print(f"{'gpu':10} {gpu}")
    for dtype, algorithm in facts["conv3d"].items():
        print(f"{'conv3d':10} {dtype}: {algorithm}")
    print('\nwith backend="auto"')
    for op, where in facts["ops"].items():
        print(f"  {op:22}{where}")
    for title, lines in (("missing", facts["lost"]), ("warnings", facts["warnings"])):
        if lines:
            print(f"\n{title}")
            print("\n".join(f"  - {line}" for line in lines))
    return 0


def _short(facts: Mapping[str, Any]) -> str:
    versions = (f"{key} {facts[key]}" for key in ("python", "torch", "triton") if facts[key])
    lines = [
        f"{'cogvx':10} {facts['cogvx']}, {', '.join(versions)}",
        f"{'extension':10} {facts['extension']}",
        f"{'gpu':10} {', '.join(facts['gpus']) or 'none'}",
    ]
    for where, count in Counter(facts["ops"].values()).items():
        lines.append(f"{'ops':10} {count} {where}")
    missing = [module for module in OPTIONAL if importlib.util.find_spec(module) is None]
    if missing:
        lines.append(f"{'without':10} {', '.join(missing)} (optional)")
    lines += [f"{'warning':10} {warning}" for warning in facts["warnings"]]
    return "\n".join([*lines, "cogvx-kernels doctor tells more"])


def _ops(extension: Mapping[str, Any] | None) -> dict[str, str]:
    """The device and backend of each op, from Triton and the extension's build."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = _backend.triton_reason("a tensor", torch.empty(0, device=device))
    interpreted = ", interpreted" if reason is None and _backend.INTERPRETED else ""
    triton = _where(f"the Triton kernel{interpreted}", reason)
    without = None if extension else "the extension is not built"
    if extension and device == "cuda" and not extension["cuda"]:
        without = "the extension was built without CUDA"
    native = _where("the extension", without)
    return {
        name: f"on {device}, {native if info.launch is None else triton}"
        for name, info in OPS.items()
    }


def _where(kernel: str, reason: str | None) -> str:
    return kernel if reason is None else f"the plain-torch reference: {reason}"


def _extension(lost: list[str]) -> Mapping[str, Any] | None:
    """Build information of the extension; None if it is missing."""
    try:
        extension = importlib.import_module("cogvx_kernels._C")
    except ImportError as error:
        lost.append(
            f"the C++/CUDA extension is not there ({error}): build it with "
            "pip install --no-build-isolation -e . in the repository"
        )
        return None
    build: dict[str, Any] = extension.build_info()
    if not build.get("cuda"):
        lost.append("the extension was built without CUDA: CPU tensors only")
    return build


def _words(extension: Mapping[str, Any] | None) -> str:
    if extension is None:
        return "not built"
    return ", ".join(f"{key} {value}" for key, value in extension.items())


def _conv3d(warnings: list[str]) -> dict[str, str]:
    """The algorithm of `conv3d` by dtype; a workaround is added to the warnings."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    algorithms = {}
    for dtype in CONVOLVED:
        reason = known_issue(device, dtype)
        algorithms[_checks.dtype_name(dtype)] = (
            f"conv3d on {device}" if reason is None else "a sum of conv2d in fp32"
        )
        warning = f"{reason}: cogvx_kernels.conv3d adds up conv2d instead"
        if reason is not None and warning not in warnings:
            warnings.append(warning)
    return algorithms


def _gpus(lost: list[str]) -> list[str]:
    if not torch.cuda.is_available():
        lost.append("no GPU is visible to torch: kernels run only in Triton's interpreter, to test")
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        gpus.append(f"{torch.cuda.get_device_name(index)}, sm_{capability[0]}{capability[1]}")
        if capability < (8, 0) and torch.version.hip is None:
            lost.append(f"GPU {index} has no bfloat16: bfloat16 tensors run the reference there")
    return gpus


def version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])
