"""`cogvx-kernels bench`: run the benchmarks of the repository, which are not installed."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def main(argv: list[str]) -> int:
    if not (REPOSITORY / "benchmarks" / "__main__.py").is_file():
        print(
            "cogvx-kernels bench: the benchmarks are not part of the installed package; clone the "
            "repository, install it with pip install -e ., and run python -m benchmarks there",
            file=sys.stderr,
        )
        return 2
    return subprocess.run([sys.executable, "-m", "benchmarks", *argv], cwd=REPOSITORY).returncode
