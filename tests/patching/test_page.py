"""docs/using-it-in-your-code.md: its table is what is supported, its code runs, its files exist."""

import re
from pathlib import Path

import pytest

import cogvx_kernels as ck
from tests.patching.small import latents, pipeline

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "using-it-in-your-code.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def rows():
    """(model, op, whether mode "exact" keeps the bits, files of the proof) of the page's table."""
    models = []
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 5 or cells[1].startswith(("op", "---")):
            continue
        models = re.findall(r"`(\w+)`", cells[0]) or models
        [op] = re.findall(r"^`(\w+)`", cells[1])
        for model in models:
            yield model, op, cells[2] == "the same bits", re.findall(r"`(\w+\.py)`", cells[4])


def test_the_table_is_what_is_supported():
    said = {(model, op, bits) for model, op, bits, _ in rows()}
    assert said == {(row.model, row.op, row.bits) for row in ck.supported()}


def test_proofs_are_where_the_table_says():
    """The file is there, and names the model or makes it."""
    for model, op, _, files in rows():
        assert files, (model, op)
        texts = [(ROOT / "tests" / "patching" / file).read_text() for file in files]
        makes = "pipeline()" if "CogVideoX" in model else model
        assert any(makes in text or "small import" in text for text in texts), (model, op)


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)#]+)", PAGE):
        assert (ROOT / "docs" / link).exists(), link


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["patch", "stream"])
def test_the_code_runs(snippet):
    pipe = pipeline()
    names = {"pipe": pipe, "vae": pipe.vae, "latents": latents(5).transpose(1, 2), "ck": ck}
    exec(snippet, names)
    if "state" in names:
        assert names["state"].ended and names["video"].shape[1] == 8
