"""The examples: run as a reader runs them, and their properties on other shapes."""

import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from cogvx_kernels import _backend, rope3d_tables, slice_positions
from examples import conv_vae, mmdit_block

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
README = (ROOT / "examples/README.md").read_text()

SAME_WEIGHTS = "the same weights: <All keys matched successfully>"
# The last lines of each example's output, as patterns.
LINES = {
    "conv_vae": [
        "AfterDecoder: error against fp64 .*",
        "  peak of live bytes: [0-9,]+ whole, [0-9,]+ in chunks",
        "  chunks equal the whole bit for bit: True",
        "largest difference: .*",
    ],
    "mmdit_block": ["AfterBlock: error against fp64 .*; of 27 gradients at most .*, .*"],
}


@pytest.fixture(autouse=True)
def as_without_the_interpreter(monkeypatch):
    """On a CPU an example shows the references; the kernels' own tests have the interpreter."""
    monkeypatch.setattr(_backend, "INTERPRETED", False)


def shape_of(text: str) -> list[str]:
    """Lines of an output without numbers, names and booleans, which differ between machines."""
    return re.sub(r"[\d.,e-]+\d|True|False|(text|video)\.\w+\.\w+", "…", text).splitlines()


def test_examples_run_and_print_what_their_page_shows():
    """Each as a program, in one new process that imports torch once."""
    program = """import runpy, sys
for name in sys.argv[1:]:
    print(name)
    runpy.run_module(f"examples.{name}", run_name="__main__")
    print(chr(0), end="")"""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program, *NAMES],
        cwd=ROOT, capture_output=True, text=True, env={**kept, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *outputs, rest = done.stdout.split("\0")
    assert len(outputs) == len(NAMES) and not rest
    for name, output in zip(NAMES, outputs, strict=True):
        first, *printed = output.splitlines()
        assert first == name and printed[0] == SAME_WEIGHTS
        end = printed[-len(LINES[name]) :]
        assert all(map(re.fullmatch, LINES[name], end)), output
        [shown] = re.findall(rf"`python -m examples\.{name}`.*?```\n(.*?)```", README, re.DOTALL)
        assert shape_of(shown) == shape_of("\n".join(printed)), (
            "examples/README.md shows what is printed"
        )


@pytest.mark.parametrize("chunks", [[1, 1, 1, 1], [3, 1], [2, 2]])
def test_chunks_of_the_decoder_are_the_whole_bit_for_bit(chunks):
    decoder = conv_vae.AfterDecoder()
    latents = torch.randn(2, 8, 4, 3, 5)
    whole, _ = conv_vae.decode(decoder, latents, [4])
    joined, _ = conv_vae.decode(decoder, latents, chunks)
    assert whole.shape == (2, 3, 13, 12, 20)
    assert torch.equal(joined, whole)


def test_clips_are_independent():
    decoder, latents = conv_vae.AfterDecoder(), torch.randn(2, 8, 3, 3, 4)
    cache_of_each = [{}, {}]
    with torch.no_grad():
        pieces = [
            [decoder(latents[i : i + 1, :, at : at + 1], cache_of_each[i]) for i in (0, 1)]
            for at in range(3)
        ]
    for i in (0, 1):
        alone, _ = conv_vae.decode(decoder, latents[i : i + 1], [3])
        assert torch.equal(torch.cat([piece[i] for piece in pieces], 2), alone)


@pytest.mark.parametrize("grid, text_len", [((2, 3, 5), 11), ((1, 2, 3), 1)])
def test_block_and_gradients_err_as_plain_torch(grid, text_len):
    before, after = mmdit_block.BeforeBlock(48, 2, 80), mmdit_block.AfterBlock(48, 2, 80)
    for parameter in before.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    after.load_state_dict(before.state_dict())
    cos, sin = rope3d_tables(slice_positions(grid), split=(8, 8, 8))
    text, video = torch.randn(2, text_len, 48), torch.randn(2, len(cos), 48)
    dout = torch.randn(2, text_len + len(cos), 48)
    arguments = text, video, torch.randn(2, 48), cos, sin, dout
    exact = mmdit_block.results(deepcopy(before).double(), *(x.double() for x in arguments))
    plain, fused = (mmdit_block.results(block, *arguments) for block in (before, after))
    assert set(fused) == {"output", "text", "video", "temb", *before.state_dict()}
    for name, x in exact.items():
        off_by = [((found[name] - x).norm() / x.norm()).item() for found in (plain, fused)]
        assert off_by[1] <= 2 * off_by[0] + 3e-7, f"{name}: {off_by[1]:.1e}, not {off_by[0]:.1e}"


def test_new_block_is_the_identity():
    block = mmdit_block.AfterBlock(48, 2, 80)  # adaLN-zero: its gates are zero
    cos, sin = rope3d_tables(slice_positions((1, 2, 3)), split=(8, 8, 8))
    x = torch.randn(2, 5 + 6, 48)
    assert torch.equal(block(x, torch.randn(2, 48), cos, sin, text_len=5), x)
