"""README and docs: examples run, commands parse, links and file names lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cogvx.cli.parser import make
from cogvx.training import Recipe
from cogvx_kernels import _backend
from cogvx_kernels.__main__ import TOOLS
from cogvx_kernels.tools import options
from tests.model import tiny_pipeline

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
OTHERS = ["CONTRIBUTING.md"]
OTHERS += [f"{folder}/README.md" for folder in ("benchmarks/results", "examples", "tests/harness")]
PAGES = ["README.md", *DOCS, *OTHERS, "cogvx/assets/tiny/README.md"]
TEXT = {page: (ROOT / page).read_text() for page in PAGES}

# By a line of each example of README: what to print after it, and the output.
README = {
    "from diffusers import": ("tuple(video.shape)", "(1, 9, 3, 32, 32)"),
    'from_pretrained("tiny")': ("tuple(video.shape)", "(1, 17, 3, 64, 64)"),
    "import qk_norm_rope3d": ("tuple(q.shape), q.dtype", "(1, 442, 30, 64) torch.float32"),
}
# By page, the shapes of variables after each of its examples, in order.
SHAPES = {
    "docs/quickstart.md": [
        {"video": (1, 17, 3, 64, 64)},
        {"video": (1, 9, 3, 32, 32)},
        {"latents": (1, 9, 8, 16, 16), "frames": (1, 33, 3, 64, 64)},
        {"latents": (1, 5, 16, 8, 12), "video": (1, 17, 3, 64, 96), "v": (1, 5, 16, 8, 12)},
    ],
    "docs/ops.md": [
        {"q": (1, 442, 30, 64), "k": (1, 442, 30, 64)},
        {"x": (2, 29, 64), "h": (2, 29, 64)},
        {"y": (1, 442, 128)},
        {"cache": (1, 64, 2, 32, 48), "h": (1, 64, 8, 32, 48)},
        {"joined": (1, 16, 6, 8, 8), "following": (1, 16, 2, 8, 8)},
    ],
}
# Run elsewhere: tests/patching/test_page.py has a pipeline for these.
RUN_ELSEWHERE = {"docs/diffusers.md"}


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", TEXT[page], re.DOTALL)


def commands(page: str) -> list[str]:
    """Commands of this project in a page: in backticks, or lines of a block of code."""
    inline = re.findall(r"`((?:cogvx|cogvx-kernels) [a-z][^`]*)`", TEXT[page])
    torchrun = r"(?:torchrun [^\n]*? -m )?"
    blocks = re.findall(
        rf"^ {{0,4}}{torchrun}((?:cogvx|cogvx-kernels) [a-z][^\n]*)$", TEXT[page], re.MULTILINE
    )
    return [command for command in [*inline, *blocks] if "COMMAND" not in command]


def test_readme_is_short():
    assert len(TEXT["README.md"].splitlines()) <= 150
    assert (ROOT / "docs/images/tiny.gif").stat().st_size < 600_000
    assert len(examples("README.md")) == len(README)


def test_readme_examples_run_as_pasted_into_a_file(tmp_path):
    """In one new process that imports torch once; the last example, of fewest imports, first."""
    tiny_pipeline.save(tmp_path / "THUDM" / "CogVideoX-5b")
    wanted = []
    for number, example in enumerate(reversed(examples("README.md"))):
        [(expression, expected)] = [found for line, found in README.items() if line in example]
        (tmp_path / f"{number}.py").write_text(f"{example}\nprint({expression})\n")
        wanted.append(expected)
    run = "for n in range(3): runpy.run_path(f'{n}.py', run_name='__main__'); print('\\0', end='')"
    done = subprocess.run(
        [sys.executable, "-c", f"import runpy\n{run}"],
        cwd=tmp_path,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split("\0")
    assert [text.strip().splitlines()[-1] for text in printed[:-1]] == wanted


@pytest.mark.filterwarnings("ignore:the prompt:UserWarning")  # the small model reads 6 tokens
@pytest.mark.parametrize(
    "page, number", [(page, n) for page, rows in SHAPES.items() for n in range(len(rows))]
)
def test_example_of_docs_runs(page, number, tmp_path, monkeypatch):
    found = examples(page)
    assert len(found) == len(SHAPES[page])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_backend, "INTERPRETED", False)  # references, as on a CPU
    if "CogVideoX-5b" in found[number]:
        tiny_pipeline.save(tmp_path / "CogVideoX-5b")
    names: dict[str, torch.Tensor] = {}
    exec(compile(found[number], page, "exec"), names)
    assert {name: tuple(names[name].shape) for name in SHAPES[page][number]} == SHAPES[page][number]


@pytest.mark.parametrize("page", sorted(set(PAGES) - set(SHAPES) - RUN_ELSEWHERE - {"README.md"}))
def test_other_examples_compile(page):
    for example in examples(page):
        compile(example, page, "exec")


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_those_of_the_command_line(page):
    for command in commands(page):
        program, *arguments = shlex.split(command, comments=True)
        if program == "cogvx-kernels":
            assert arguments[0] in TOOLS, command
            parse = getattr(options, arguments[0], list)
        else:
            parse = make().parse_args
            if len(arguments) == 1:  # a name in a sentence, or a command without options
                arguments.append("--help")
        try:
            parse(arguments[1:] if program == "cogvx-kernels" else arguments)
        except SystemExit as end:
            assert end.code == 0, command


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)", TEXT[page])) <= targets


def test_recipe_of_training_is_one(tmp_path, monkeypatch):
    [recipe] = re.findall(r"```toml\n(.*?)```", TEXT["docs/training.md"], re.DOTALL)
    monkeypatch.chdir(tmp_path)
    tiny_pipeline.save(tmp_path / "CogVideoX-5b")
    (tmp_path / "lora.toml").write_text(recipe)
    assert Recipe.read("lora.toml").transformer_training.lora_rank == 64


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", TEXT[page]):
        target = (ROOT / page).parent / link if link else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), f"{link}#{anchor}"


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_exist(page):
    """Paths in backticks that begin with a folder of the project."""
    folders = "cogvx|cogvx_kernels|csrc|tests|benchmarks|examples|docs"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", TEXT[page]):
        assert (ROOT / path).exists(), path


def test_files_of_architecture_hold_the_names_beside_them():
    table = TEXT["docs/architecture.md"].split("## Where to change what")[1].split("## ")[0]
    for row in table.splitlines()[3:]:
        place = row.rsplit("|", 2)[1] if row else ""
        files = [ROOT / path for path in re.findall(r"`(\w+/[\w/]+\.py)`", place)]
        text = "".join(path.read_text() for path in files)
        for name in re.findall(r"`(\w+)(?:\.\w+)?`", place):
            assert not files or name in text, f"{name} in {place}"


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_pages_run_exist(page):
    for module in re.findall(r"python -m ((?:benchmarks|examples|tests)[\w.]*)", TEXT[page]):
        path = ROOT.joinpath(*module.rstrip(".").split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_files_of_a_package_are_in_it():
    sections = re.split(r"^##+ ", TEXT["docs/architecture.md"], flags=re.MULTILINE)
    for section in sections:
        heading, _, text = section.partition("\n")
        folders = [ROOT / name for name in heading.split(", ") if name.startswith("cogvx")]
        for name in re.findall(r"`([\w/]+\.py)`", text) if folders else ():
            places = [*folders, ROOT / "cogvx", ROOT]
            assert any((folder / name).exists() for folder in places), f"{heading}: {name}"
