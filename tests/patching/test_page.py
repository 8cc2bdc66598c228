"""docs/diffusers.md: its table is what is supported, its code runs, its files exist."""

import re
from pathlib import Path

import pytest

import cogvx_kernels as ck
from tests.patching.small import embeds, generate, latents, pipeline

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "diffusers.md").read_text()
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


def test_table_equals_supported():
    listed = {(model, op, bits) for model, op, bits, _ in rows()}
    assert listed == {(row.model, row.op, row.bits) for row in ck.supported()}


def test_test_files_of_the_table_exist():
    """The file is there, and names the model or makes it."""
    for model, op, _, files in rows():
        assert files, (model, op)
        texts = [(ROOT / "tests" / "patching" / file).read_text() for file in files]
        makes = "pipeline()" if "CogVideoX" in model else model
        assert any(makes in text or "small import" in text for text in texts), (model, op)


def test_links_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)", PAGE):
        assert (ROOT / "docs" / link).exists(), link


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["generate", "patch", "stream"])
def test_code_runs(snippet, tmp_path, monkeypatch):
    pipe = pipeline()
    monkeypatch.chdir(tmp_path)
    # It has no text encoder: the embeddings of any prompt, and a clip of two steps.
    monkeypatch.setattr(pipe, "encode_prompt", lambda *of, **options: tuple(embeds().values()))
    few = {"num_inference_steps": 2, "num_frames": 9, "height": 32, "width": 32}
    call = type(pipe).__call__
    monkeypatch.setattr(type(pipe), "__call__", lambda *of, **options: call(*of, **few, **options))
    names = {"pipe": pipe, "vae": pipe.vae, "latents": latents(5).transpose(1, 2), "ck": ck}
    exec(snippet, names)
    if "state" in names:
        assert names["state"].ended and names["video"].shape[1] == 8
    if "report" in names:
        assert all(row.calls for row in names["report"].rows)
        assert Path("kite.mp4").stat().st_size > 0
    assert len(SNIPPETS) == 3


def test_report_of_the_page():
    """All of it that is the same on every machine: what was called, and what was not."""
    pipe = pipeline()
    report = ck.patch(pipe)
    generate(pipe)
    [page] = re.findall(r"```\n(CogVideoXPipeline, .*?)```", PAGE, re.DOTALL)
    lines = [line.partition(": kernel")[0] for line in page.splitlines()]
    shown = [line for line in lines if "reference, " not in line]
    assert len(shown) > 7
    for line in shown:
        assert line in str(report), line
