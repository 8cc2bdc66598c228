"""`cogvx-kernels`: command line of the modules in `cogvx_kernels.tools`."""

import difflib
import importlib
import sys

from . import __version__
from .tools import options

TOOLS = {
    "verify": "compare every op with its reference, on this GPU or in Triton's interpreter",
    "doctor": "print what is installed, which backend runs each op, and what is missing",
    "aot": "compile every kernel ahead of time for several GPUs and check its budget",
    "ptx": "execute the compiled kernels on a CPU; check every access, barrier and wait",
    "counters": "count what compiled kernels ask of a GPU at a model's size and check budgets",
    "bench": "time ops beside other libraries (forwards to python -m benchmarks)",
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in TOOLS:
        if parse := getattr(options, argv[0], None):
            parse(argv[1:])  # --help or a typo ends here, before torch is imported
        # Imported on use: torch takes seconds, and some tools need Triton.
        return importlib.import_module(f"cogvx_kernels.tools.{argv[0]}").main(argv[1:])
    if argv == ["--version"]:
        print(f"cogvx-kernels {__version__}")
        return 0
    lines = "\n".join(f"  {name:8} {what}" for name, what in TOOLS.items())
    usage = f"usage: cogvx-kernels TOOL [options]\n\n{lines}\n\ncogvx-kernels TOOL --help: more."
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0
    near = difflib.get_close_matches(argv[0], TOOLS, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    print(f"{usage}\n\ncogvx-kernels: no tool is called {argv[0]!r}{hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
