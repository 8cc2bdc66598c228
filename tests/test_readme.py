"""README's examples, run as they stand, and the commands it names."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cogvx.assets import SHIPPED
from cogvx.cli.parser import make
from tests.model import tiny_pipeline

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"`(cogvx [^`]+)`", README)

# What an example, told from the others by a line of it, prints if it is asked.
ASKED = {
    "from diffusers import": (
        "print(tuple(video.shape))",
        "(1, 9, 3, 32, 32)",
    ),
    'CogVideoX.from_pretrained("tiny")': (
        "print(tuple(video.shape))",
        "(1, 17, 3, 64, 64)",
    ),
    'CogVideoX.from_pretrained("CogVideoX-5b")': (
        "print(tuple(video.shape))",
        "(1, 9, 3, 32, 32)",
    ),
    "import cogvx\n": (
        "print(tuple(latents.shape), tuple(video.shape), tuple(v.shape))",
        "(1, 5, 16, 8, 12) (1, 17, 3, 64, 96) (1, 5, 16, 8, 12)",
    ),
    "import spatial_norm_silu": (
        "print(tuple(x.shape), tuple(cache.shape), tuple(h.shape))",
        "(1, 64, 8, 32, 48) (1, 64, 2, 32, 48) (1, 64, 8, 32, 48)",
    ),
    "import qk_norm_rope3d": (
        "print(tuple(q.shape), q.dtype)",
        "(1, 442, 30, 64) torch.float32",
    ),
    "import ExpertFFN": (
        "print(tuple(y.shape), y.requires_grad)",
        "(1, 442, 128) True",
    ),
}


def test_there_are_examples():
    assert len(EXAMPLES) == len(ASKED)


@pytest.mark.parametrize("line", ASKED)
def test_example_runs_as_pasted_into_a_file(line, tmp_path):
    [example] = [example for example in EXAMPLES if line in example]
    question, answer = ASKED[line]
    if "from_pretrained" in example:
        [name] = re.findall(r'from_pretrained\("(.*?)"', example)
        if name not in SHIPPED:
            tiny_pipeline.save(tmp_path / name)
    path = tmp_path / "example.py"
    path.write_text(f"{example}\n{question}\n")
    done = subprocess.run(
        [sys.executable, path],
        cwd=tmp_path,
        env={**os.environ, "TRITON_INTERPRET": "0"},  # as a reader runs it
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == answer


def test_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake (\w+)", README)) <= targets


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_knows_what_readme_says(command):
    assert callable(make().parse_args(shlex.split(command)[1:]).run)
