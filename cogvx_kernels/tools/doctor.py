"""`cogvx-kernels doctor`: what is installed here, what will run where and why, and what is lost."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import platform
from typing import Any

import torch

from .. import __version__, _backend
from ..testing import OPS

# Versions that are known to do harm, and what they do. Source: fact sheet, hazards 0.3 and 2.8.
OLDEST_TORCH = (2, 10)
OLDEST_TRITON = (3, 6)
CUDNN_WITH_GOOD_CONV3D = 91500

OPTIONAL = {
    "flash_attn": "no attention by flash-attn; torch's own is used",
    "diffusers": "no patching of diffusers pipelines, and no benchmark against them",
    "transformers": "no T5 text encoder",
    "av": "no reading and writing of video files",
    "matplotlib": "no plots of the benchmarks",
    "liger_kernel": "one peer less in the benchmarks",
}


def examine() -> dict[str, Any]:
    """The facts, as data; what is lost is in `lost`, and what may do harm in `warnings`."""
    lost: list[str] = []
    warnings: list[str] = []
    facts: dict[str, Any] = {
        "cogvx": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": _version("triton") if _backend.HAS_TRITON else None,
        "numpy": _version("numpy"),
        "extension": _extension(lost),
        "gpus": _gpus(lost, warnings),
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
    facts["ops"] = _ops()
    return {**facts, "lost": lost, "warnings": warnings}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="cogvx-kernels doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    options = parser.parse_args(argv)
    facts = examine()
    if options.json:
        print(json.dumps(facts, indent=1))
        return 0
    for key in ("cogvx", "python", "platform", "torch", "triton", "numpy"):
        print(f"{key:10} {facts[key] or 'not installed'}")
    print(f"{'extension':10} {facts['extension']}")
    for gpu in facts["gpus"] or ["none"]:
        print(f"{'gpu':10} {gpu}")
    print('\nwith backend="auto"')
    for op, where in facts["ops"].items():
        print(f"  {op:16} {where}")
    for title, lines in (("what is lost", facts["lost"]), ("warnings", facts["warnings"])):
        if lines:
            print(f"\n{title}")
            print("\n".join(f"  - {line}" for line in lines))
    return 0


def _ops() -> dict[str, str]:
    """Where each op's kernel runs, asked of the op itself."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = _backend.triton_reason("a tensor", torch.empty(0, device=device))
    ran = "the Triton kernel" if reason is None else f"the plain-torch reference: {reason}"
    if reason is None and _backend.INTERPRETED:
        ran += ", interpreted"
    return {name: f"on {device}, {ran}" for name in OPS}


def _extension(lost: list[str]) -> str:
    try:
        extension = importlib.import_module("cogvx_kernels._C")
    except ImportError as error:
        lost.append(
            f"the C++/CUDA extension is not there ({error}): build it with "
            "pip install --no-build-isolation -e . in the repository"
        )
        return "not built"
    build = extension.build_info()
    if not build.get("cuda"):
        lost.append("the extension was built without CUDA: CPU tensors only")
    return ", ".join(f"{key} {value}" for key, value in build.items())


def _gpus(lost: list[str], warnings: list[str]) -> list[str]:
    if not torch.cuda.is_available():
        lost.append("no GPU is visible to torch: kernels run only in Triton's interpreter, to test")
        return []
    cudnn = torch.backends.cudnn.version()
    if _release(torch.__version__) >= (2, 9) and cudnn and cudnn < CUDNN_WITH_GOOD_CONV3D:
        warnings.append(
            f"torch {torch.__version__} with cuDNN {cudnn} is slow and memory-hungry in bfloat16 "
            "conv3d, and wrong in some: upgrade cuDNN to 9.15 or later"
        )
    gpus = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        gpus.append(f"{torch.cuda.get_device_name(index)}, sm_{capability[0]}{capability[1]}")
        if capability < (8, 0) and torch.version.hip is None:
            lost.append(f"GPU {index} has no bfloat16: bfloat16 tensors run the reference there")
    return gpus


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])
