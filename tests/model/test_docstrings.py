"""Every module of the model says what shapes go in and come out."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHAPE = re.compile(r"\((batch|\.\.\.),")
STREAMS = ("encode", "decode", "stream_encode", "stream_decode")


def methods():
    for path in sorted((ROOT / "cogvx").glob("*/*.py")):
        for item in ast.walk(ast.parse(path.read_text())):
            if isinstance(item, ast.ClassDef):
                wanted = ("forward", *(STREAMS if item.name == "CausalVAE" else ()))
                for function in item.body:
                    if isinstance(function, ast.FunctionDef) and function.name in wanted:
                        yield f"{path.parent.name}.{item.name}.{function.name}", function


@pytest.mark.parametrize(("name", "function"), [pytest.param(n, f, id=n) for n, f in methods()])
def test_shapes_are_documented(name, function):
    text = ast.get_docstring(function) or ""
    first = text.split("\n")[0]
    assert SHAPE.search(text), f"{name}: {text}"
    assert first.endswith("."), f"{name}: {first}"
    for argument in function.args.args[1:]:
        if "Args:" in text:
            assert re.search(rf"\b{argument.arg}\b", text), f"{name}: {argument.arg}"
