"""Modules loaded before a command runs: no torch."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("package", ["cogvx", "cogvx_kernels"])
def test_type_checkers_see_what_is_loaded_when_used(package):
    """The imports under TYPE_CHECKING, and the table that `__getattr__` loads from."""
    module = importlib.import_module(package)
    tree = ast.parse(Path(module.__file__).read_text())
    [block] = [
        n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)
    ]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert {name: home for name, home in seen.items() if home} == module._HOMES
    assert {*seen, "__version__"} == set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_functions_named_as_their_modules():
    """Loading a module of that name later does not replace the function."""
    code = """
import cogvx_kernels.rope3d.frequencies, cogvx_kernels
from cogvx_kernels import conv3d, rope3d
print(callable(rope3d), callable(conv3d), callable(cogvx_kernels.rope3d))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True True True\n"


TORCH_FREE = """
import contextlib, io, sys
from cogvx.cli import main
from cogvx_kernels.__main__ import main as kernels
lines = [
    ["--help"], ["--version"], [], ["genrate"], ["generate", "--help"], ["train", "--help"],
    ["encode", "x", "--tilling"], ["generate", "--promt", "x"], ["plan", "--preset", "6b"],
    ["completion", "bash"], ["completion", "fish"],
]
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    codes = [main(words) for words in lines]
    codes += [kernels(words) for words in (["--help"], ["--version"], ["verfy"])]
    for words in (["verify", "--help"], ["doctor", "--jsno"], ["aot", "--target", "sm_1"]):
        with contextlib.suppress(SystemExit):
            kernels(words)
print(codes, "torch" in sys.modules)
"""


def test_help_and_typos_need_no_torch():
    done = subprocess.run(
        [sys.executable, "-c", TORCH_FREE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[0, 0, 2, 2, 0, 0, 2, 2, 2, 0, 0, 0, 0, 2] False\n"
