"""Import layers, the files of an op package, and lazy imports."""

import ast
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cogvx_kernels"
OP_PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/reference.py"))
FILES = sorted(path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py"))
MODEL_FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "cogvx").rglob("*.py"))

# The lowest layer, in order: each may import those before it.
FOUNDATIONS = (
    "_autocast",
    "_checks",
    "_custom_op",
    "chunks",
    "context_parallel",
    "_launch",
    "_norm",
    "_opinfo",
    "modality",
    "_backend",
    "conv3d",
    "resample",
    "streaming",
    "module_utils",
    "linear",
)
# What a file of an op package may import from its own package.
WITHIN_AN_OP_PACKAGE = {
    "reference": set(),
    "frequencies": set(),
    "routing": set(),
    "torch_gemm": {"reference", "routing"},
    "validation": set(),
    "cpu": {"reference", "validation"},
    "device_utils": {"validation"},
    "launch": {"validation"},
    "statistics": {"device_utils", "launch", "validation"},
    "gradients": {"device_utils"},
    "depthwise": {"device_utils"},
    "stationary": {"device_utils"},
    "kernel": {
        "depthwise",
        "device_utils",
        "gradients",
        "launch",
        "routing",
        "stationary",
        "statistics",
        "validation",
    },
    "op": {"cpu", "kernel", "reference", "routing", "torch_gemm", "validation"},
    "module": {"op", "reference"},
    "opinfo": {"op", "reference", "routing", "validation"},
    "__init__": {"frequencies", "module", "op", "reference"},
}
# The Triton files of an op package; frame_cache's kernel is in the C++ extension.
TRITON_FILES = (
    "depthwise", "device_utils", "gradients", "kernel", "launch", "stationary", "statistics",
)  # fmt: skip
NAMES_TRITON = {
    "cogvx_kernels/tools/aot.py",
    "cogvx_kernels/tools/interpreter.py",
    "cogvx_kernels/tools/interpreter_speed.py",
    *(f"cogvx_kernels/{op}/{file}.py" for op in OP_PACKAGES for file in TRITON_FILES),
    *(path for path in FILES if path.startswith("cogvx_kernels/ptx/")),
} - {"cogvx_kernels/frame_cache/kernel.py"}
# The model's layers, lowest first: a file or folder imports from lower layers only. A file that is
# named here is not on its folder's layer.
MODEL_LAYERS = (
    {"validation"},
    {"autocast", "config", "extras", "files", "memory", "threads"},
    {"frames", "hub", "profiling"},
    {"assets"},
    {"vae", "transformer", "schedulers", "video"},
    {"checkpoint", "generation", "plan"},
    {"parallel", "text"},
    {"sat", "data"},
    {"shapes"},
    {"pipeline", "words"},
    {"factorized", "shapes.scoring"},
    {"training"},
    {"__init__"},
    {"cli"},
    {"shapes.commands"},
    {"__main__"},
)
# Files of patching that know the adapters of all models, and those that the adapters share: an
# adapter imports no other.
PATCHING_API = {"__init__", "api", "cogvideox_stream"}
PATCHING_SHARED = {
    "attention", "common", "context", "forward_swap", "registry", "rotary", "state"
}  # fmt: skip
# Optional packages, each imported by one file, inside a function.
MODEL_OPTIONAL = {
    "cogvx/video/container.py": "av",
    "cogvx/transformer/attention.py": "flash_attn",
}
# Likewise, by `cogvx.extras.extra`.
MODEL_EXTRAS = {
    "cogvx/cli/prompts.py": {"ray"},
    "cogvx/hub.py": {
        "huggingface_hub",
        "huggingface_hub.constants",
        "huggingface_hub.errors",
        "huggingface_hub.utils",
    },
    "cogvx/text.py": {"google.protobuf", "sentencepiece", "transformers"},
    "cogvx/training/plotting.py": {"matplotlib", "matplotlib.pyplot", "torch.utils.tensorboard"},
    "cogvx/training/lora.py": {"peft"},
    "cogvx/video/writing.py": {"PIL.Image", "PIL.ImageDraw", "PIL.ImageFont"},
}
# Imports inside functions, of what may be missing.
IMPORTS_IN_FUNCTIONS = {f"cogvx_kernels/{op}/op.py": "from . import kernel" for op in OP_PACKAGES}
# Only code that patches a diffusers model imports diffusers.
IMPORTS_DIFFUSERS = {
    "cogvx_kernels/patching/attention.py": (
        "from diffusers.models.attention_dispatch import dispatch_attention_fn"
    ),
    "cogvx_kernels/patching/context.py": "from diffusers.hooks import context_parallel",
}
IMPORTS_IN_FUNCTIONS |= IMPORTS_DIFFUSERS
IMPORTS_IN_FUNCTIONS["cogvx_kernels/tools/counters.py"] = "from ..ptx import survey as machine"
IMPORTS_IN_FUNCTIONS["cogvx_kernels/tools/verify.py"] = "from . import interpreter"
IMPORTS_IN_FUNCTIONS["cogvx_kernels/tools/ptx.py"] = "from ..ptx import parse, samples"

# Files that may use environment variables: settings of Triton, OpenMP and the platform.
READS_THE_ENVIRONMENT = {
    "cogvx/parallel/launch.py",  # set by torchrun
    "cogvx/__main__.py",  # OMP_WAIT_POLICY
    "cogvx/cli/arguments.py",  # set by torchrun; reads them without torch
    "cogvx_kernels/_backend.py",  # TRITON_INTERPRET
    "cogvx_kernels/tools/passed.py",  # where the cache folder is; Triton's settings
    "cogvx_kernels/tools/verify.py",  # TRITON_INTERPRET, set for another process
}


@functools.cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


@functools.cache
def imports(path: str) -> set[str]:
    """Absolute names of the modules that a file imports, wherever in it."""
    package = path.removesuffix(".py").removesuffix("/__init__").split("/")
    if not path.endswith("__init__.py"):
        package = package[:-1]
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*base, alias.name]) for alias in node.names]
            modules = {name for name in names if is_module(name)}
            found |= modules or {".".join(base)}
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def own(path: str) -> set[str]:
    """The imports of its own package, without its name: `_checks`, `rope3d.op`, `` for itself."""
    package = path.split("/")[0]
    names = {name for name in imports(path) if name.split(".")[0] == package}
    return {name.removeprefix(package).removeprefix(".") for name in names}


def roots(path: str) -> set[str]:
    """Packages that are neither this project's nor Python's own."""
    names = {name.split(".")[0] for name in imports(path)}
    return names - set(sys.stdlib_module_names) - {"cogvx", "cogvx_kernels", "torch"}


def in_functions(path: str) -> set[str]:
    """The import statements inside functions of a file."""
    functions = [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef)]
    return {
        ast.unparse(node)
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }


def layered(name: str) -> str:
    """The entry of MODEL_LAYERS for a module: itself, or its folder."""
    file = ".".join(name.split(".")[:2])
    return file if file in set().union(*MODEL_LAYERS) else name.split(".")[0]


def extras(path: str) -> set[str]:
    """Modules that a file imports through `cogvx.extras.extra`."""
    calls = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Call)]
    named = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "extra"]
    return {ast.literal_eval(call.args[0]) for call in named}


@pytest.mark.parametrize("path", FILES)
def test_kernel_imports_point_down(path):
    _, *folders, file = path.removesuffix(".py").split("/")
    place = folders[0] if folders else ""
    allowed = set(FOUNDATIONS)
    if not place and file in FOUNDATIONS:
        allowed = set(FOUNDATIONS[: FOUNDATIONS.index(file)])
    elif place in OP_PACKAGES:
        allowed |= {f"{place}.{name}" for name in WITHIN_AN_OP_PACKAGE[file]}
        allowed |= {"_C"} if file == "kernel" else set()
    elif place == "tools":
        allowed |= {"", "testing", "tools.doctor", "tools.interpreter", "tools.interpreter_speed"}
        allowed |= {"tools.options", "tools.passed", "ptx.parse", "ptx.samples"}
        allowed |= {"ptx.budgets", "ptx.cards", "ptx.launch", "ptx.survey"}
    elif place == "ptx":
        allowed |= {"testing"} | {name for name in own(path) if name.startswith("ptx.")}
    elif place == "patching":
        inside = {name for name in own(path) if name.startswith("patching.")}
        shared = {f"patching.{name}" for name in PATCHING_SHARED}
        allowed |= {*OP_PACKAGES, *(inside if file in PATCHING_API else inside & shared)}
    elif file == "testing":
        allowed |= {f"{op}.opinfo" for op in OP_PACKAGES}
    elif file == "__init__":
        allowed |= {*OP_PACKAGES, "patching"}
    elif file == "__main__":
        allowed = {"", "tools.options"}
    assert own(path) <= allowed


@pytest.mark.parametrize("path", FILES)
def test_optional_imports_are_in_one_file(path):
    may = {"triton", "numpy"} if path in NAMES_TRITON else set()
    assert roots(path) <= may | ({"diffusers"} if path in IMPORTS_DIFFUSERS else set())
    assert not any(name.split(".")[0] == "cogvx" for name in imports(path))


@pytest.mark.parametrize("path", FILES)
def test_imports_are_at_the_top_of_files(path):
    assert in_functions(path) <= {IMPORTS_IN_FUNCTIONS.get(path)}


@pytest.mark.parametrize("path", MODEL_FILES)
def test_model_imports_point_down(path):
    place = layered(".".join(path.removesuffix(".py").split("/")[1:]))
    layer = next(n for n, names in enumerate(MODEL_LAYERS) if place in names)
    below = set().union(*MODEL_LAYERS[:layer])
    inside = {place, place.split(".")[0]} if path.count("/") > 1 else set()
    for name in own(path):
        assert layered(name or "__init__") in below | inside, f"{path} imports {name}"


@pytest.mark.parametrize("path", MODEL_FILES)
def test_the_model_uses_public_names_of_the_kernels(path):
    for name in imports(path):
        package, *modules = name.split(".")
        if package == "cogvx_kernels":
            public = {
                *importlib.import_module("cogvx_kernels").__all__,
                "chunks",
                "context_parallel",
                "modality",
                "resample",
                "streaming",
                "module_utils",
            }
            assert set(modules) <= public, f"{path} imports {name}"


@pytest.mark.parametrize("path", MODEL_FILES)
def test_the_model_runs_without_its_extras(path):
    always = {"safetensors", "tomli"}
    optional = MODEL_OPTIONAL.get(path)
    assert roots(path) <= always | {optional}
    for statement in in_functions(path):
        assert re.match(rf"(import|from) {optional}\b", statement), f"{path}: {statement}"
    eager = {
        ast.unparse(node)
        for node in tree(path).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert optional is None or not any(optional in statement for statement in eager)
    assert extras(path) == MODEL_EXTRAS.get(path, set())


def test_benchmarks_import_no_tests():
    for path in (ROOT / "benchmarks").rglob("*.py"):
        names = {n.split(".")[0] for n in imports(path.relative_to(ROOT).as_posix())}
        assert "tests" not in names, path


@pytest.mark.parametrize("op", OP_PACKAGES)
def test_op_package_has_the_standard_files(op):
    files = {path.stem for path in (PACKAGE / op).glob("*.py")}
    assert {"__init__", "reference", "op", "module", "opinfo"} <= files
    assert files <= set(WITHIN_AN_OP_PACKAGE)


@pytest.mark.parametrize("path", FILES + MODEL_FILES)
def test_forbidden_patterns(path):
    text = (ROOT / path).read_text()
    assert not re.search(r"\btl\.atomic", text), "atomics change bits from run to run"
    assert not re.search(r"""device=["']cuda""", text), "allocate on an input's device"
    if path != "cogvx_kernels/_launch.py":  # which changes it only if it is another one
        assert "cuda.current_device" not in text, "allocate on an input's device"
    assert not re.search(r"torch\.load\((?![^()]*weights_only=True)", text), "never a pickle"
    if path not in READS_THE_ENVIRONMENT:
        assert "os.environ" not in text, "a switch is an argument, not an environment variable"


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_import_is_lazy():
    """Importing loads no Triton, no extension and no CUDA, in a new process."""
    code = """
import sys, torch, cogvx_kernels, cogvx_kernels.testing, cogvx
heavy = ("triton", "cogvx_kernels._C", "numpy.f2py", "transformers", "diffusers", "av")
loaded = [name for name in heavy if name in sys.modules]
print(loaded, torch.cuda.is_initialized())
"""
    assert run_python(code).split("\n")[0] == "[] False"


def test_ops_are_registered_by_an_import_after_torch():
    code = """
import torch, cogvx_kernels
print(torch.ops.cogvx.rope3d.default, torch.ops.cogvx.frame_cache_join.default)
"""
    assert run_python(code).split() == ["cogvx.rope3d.default", "cogvx.frame_cache_join.default"]


def test_without_triton_the_references_run_and_doctor_says_so():
    code = """
import sys
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, NoTriton())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else found(name, *a)
import torch, cogvx_kernels
from cogvx_kernels.__main__ import main
x, angles = torch.randn(1, 5, 2, 8), torch.randn(3, 4)
out = cogvx_kernels.rope3d(x, angles.cos(), angles.sin(), text_len=2)
assert torch.equal(out[:, :2], x[:, :2]) and not torch.equal(out, x)
try:
    cogvx_kernels.rope3d(x, angles.cos(), angles.sin(), text_len=2, backend="kernel")
except RuntimeError as error:
    print(error)
assert main(["verify"]) == 2
assert main(["doctor"]) == 0
"""
    output = run_python(code)
    assert 'rope3d: backend="kernel" cannot run: Triton is not installed' in output
    assert "every op runs its plain-torch reference" in output


def test_public_names_are_there_and_sorted():
    folders = ("data", "vae", "transformer", "schedulers", "video", "checkpoint", "pipeline")
    folders = (*folders, "parallel", "shapes", "training")
    packages = ("cogvx", *(f"cogvx.{name}" for name in folders), "cogvx_kernels")
    for name in (*packages, *(f"cogvx_kernels.{name}" for name in (*OP_PACKAGES, "patching"))):
        module = importlib.import_module(name)
        assert module.__all__ == sorted(module.__all__)
        assert all(hasattr(module, public) for public in module.__all__)
