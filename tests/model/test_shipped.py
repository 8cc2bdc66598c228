"""The packaged model: its name, recipes, card and scores."""

import dataclasses
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from cogvx import CogVideoX
from cogvx.assets import SHIPPED, located
from cogvx.checkpoint import CheckpointError, load_vae
from cogvx.cli import parser
from cogvx.shapes.scoring import NAMES, score_model, score_vae
from cogvx.training import Recipe

TINY = located("tiny")
CARD = (TINY / "README.md").read_text()
REFINED = Recipe.read(TINY / "refined.toml")
SCORES = json.loads((TINY / "scores.json").read_text())


@cache
def shipped() -> CogVideoX:
    return CogVideoX.from_pretrained("tiny")


@pytest.fixture
def pipe(auto_is_what_a_cpu_has) -> CogVideoX:
    return shipped()


def test_bare_names_are_packaged_models_and_paths_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    assert SHIPPED == ("tiny",) and TINY.is_absolute() and (TINY / "recipe.toml").is_file()
    assert load_vae("tiny").config == load_vae(TINY).config
    for path in ("./tiny", Path("tiny"), tmp_path / "tiny"):
        with pytest.raises(CheckpointError, match="tiny: must hold"):
            load_vae(path)


def test_tiny_is_small_and_follows_its_recipe(pipe):
    recipe = Recipe.read("tiny")
    learned = {"scaling_factor": pipe.vae.config.scaling_factor}
    assert pipe.vae.config.to_dict() == {**recipe.vae.to_dict(), **learned}
    assert pipe.transformer.config == recipe.transformer
    kept = {p.dtype for part in (pipe.vae, pipe.transformer) for p in part.parameters()}
    assert kept == {torch.float32}  # on a CPU; 16 bits in the files
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < 12e6


def test_make_tiny_trains_it_again():
    """`make tiny` takes the recipes of the package; the second begins with what the first makes."""
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    commands = re.findall(r"^\tcogvx (train .*)$", makefile, re.MULTILINE)
    first, second = (parser.make().parse_args(command.split()) for command in commands)
    assert first.recipe == "tiny" and TINY.samefile(Path(second.recipe).parent)
    assert REFINED.model == str(first.out) and second.out != first.out
    clips = Recipe.read("tiny").data
    assert REFINED.data == dataclasses.replace(clips, clips=REFINED.data.clips)


def test_card_agrees_with_the_files(pipe):
    recipe = Recipe.read("tiny")
    for stage in (recipe.vae_training, recipe.transformer_training, REFINED.transformer_training):
        assert re.search(rf"\| steps \|.* {stage.steps:,}[ ,]", CARD)
    for part in (pipe.vae, pipe.transformer):
        assert f"{sum(p.numel() for p in part.parameters()):,} parameters" in CARD
    for name in NAMES:
        own, other = SCORES[name], SCORES["control"][name]
        assert re.search(rf"\| {name}\S* +\| {own:.1%} +\| {other:.1%} \|".replace("%", " %"), CARD)
    assert f"{SCORES['psnr_db']:.2f} dB" in CARD


def test_recorded_scores():
    assert SCORES["prompts"] == 200 and SCORES["psnr_db"] >= 30
    assert all(SCORES[name] >= 0.95 for name in NAMES) and SCORES["control"]["all"] <= 0.02


def test_vae_reconstructs_held_out_clips():
    assert score_vae(load_vae("tiny").float(), 10) >= 30


def test_clips_show_their_prompts(pipe):
    scores, control = score_model(pipe, 20)
    assert min(scores.color, scores.shape, scores.motion, scores.count) >= 0.85
    assert control.all <= 0.2


def test_unknown_words_are_refused(pipe):
    with pytest.raises(ValueError, match=r"got 'hexagon'. It knows: .*circle"):
        pipe.generate("a red hexagon moves right")
