"""What is inside the package: found by its name, and as good as it should be."""

from pathlib import Path

import pytest

from cogvx.assets import SHIPPED, located
from cogvx.checkpoint import CheckpointError, load_vae
from cogvx.data.scoring import score_vae
from cogvx.training import Recipe

TINY = located("tiny")


def test_names_are_those_of_the_package_and_paths_are_yours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    assert SHIPPED == ("tiny",) and TINY.is_absolute() and (TINY / "recipe.toml").is_file()
    assert load_vae("tiny").config == load_vae(TINY).config
    for path in ("./tiny", Path("tiny"), tmp_path / "tiny"):
        with pytest.raises(CheckpointError, match="tiny: must hold"):
            load_vae(path)


def test_its_vae_is_small_and_what_its_recipe_says():
    vae = load_vae("tiny")
    learned = {"scaling_factor": vae.config.scaling_factor}
    assert vae.config.to_dict() == {**Recipe.read("tiny").vae.to_dict(), **learned}
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < 12e6


def test_held_out_clips_come_back():
    assert score_vae(load_vae("tiny").float(), 10) >= 30
