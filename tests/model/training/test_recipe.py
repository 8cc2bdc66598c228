"""Recipes: files, settings and refused values."""

import re

import pytest

from cogvx.training import Recipe
from cogvx.training.recipe import learning_rate

from .recipes import small


def test_packaged_recipe_round_trips():
    recipe = Recipe.read("tiny")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.vae_training is not None and recipe.transformer_training is not None
    assert recipe.vae.factorized and recipe.transformer.num_video_experts >= 1


def test_settings_replace_values_of_the_file():
    settings = ["transformer_training.steps=7", "seed=3", "transformer_training.schedule=constant"]
    recipe = Recipe.read("tiny", settings)
    training = recipe.transformer_training
    assert (training.steps, recipe.seed, training.schedule) == (7, 3, "constant")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps", "a setting must be like"),
        ("a.b.c=1", "a setting must be like"),
        ("vae_training.step=1", "^vae_training: unknown key 'step'"),
        ("training.steps=1", "^unknown key 'training'"),
        ("vae_training.steps=0", r"^vae_training: steps must be an integer in \[1"),
        ("vae_training.steps=many", "^vae_training: steps must be an integer; got"),
        ("vae.layers_per_block=0", r"^vae: layers_per_block must be an integer in \[1"),
        ("transformer.use_bias=1", "^transformer: unknown key 'use_bias'"),
        ("scheduler.beta_start=high", "^scheduler: beta_start must be a number"),
        ("vae_training.schedule=linear", "schedule must be one of"),
        ("transformer_training.optimizer=sgd", "optimizer must be one of"),
        ("vae_training.optimizer=muon", "^vae_training: optimizer must be adamw"),
        ("vae_training.accumulate=3", "accumulate must divide batch_size"),
        ("vae_training.save_every=7", "save_every must be a multiple of log_every"),
        ("transformer_training.text_dropout=1.5", r"text_dropout must be a number in \[0.0, 1.0\]"),
        ("transformer_training.posterior=mean", "posterior must be one of"),
        ("transformer_training.lora_rank=4", "adamw for the adapters of lora_rank 4; got muon"),
        ("data.frames=18", "data.frames must have 1 . 4k frames, nearest 17 or 21"),
        ("vae_training.frames=12", "^vae_training.frames must have"),
        ("vae_training.frames=21", "vae_training.frames must be at most data.frames 17; got 21"),
        ("seed=-1", "^seed must be a whole number"),
        ("data=3", "data must be a table"),
    ],
)
def test_bad_values_are_refused(setting, message):
    with pytest.raises(ValueError) as raised:
        Recipe.read("tiny", [setting])
    assert re.search(message, str(raised.value).rpartition("recipe.toml: ")[2])


def test_a_stage_and_its_model_are_required():
    with pytest.raises(ValueError, match="got neither"):
        small(vae_training=None, transformer_training=None)
    with pytest.raises(ValueError, match="model must be the folder of a model for lora_rank"):
        small(transformer_training={"optimizer": "adamw", "lora_rank": 4})
    with pytest.raises(ValueError, match="unless vae and transformer are both there"):
        small(vae=None)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        Recipe.read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[data\n")
    with pytest.raises(ValueError, match=r"bad\.toml: .*(bracket|Expected)"):
        Recipe.read(tmp_path / "bad.toml")


def test_learning_rate_schedules():
    options = small(vae_training={"steps": 100, "warmup": 10, "learning_rate": 1.0}).vae_training
    rates = [learning_rate(options, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[9:] == sorted(rates[9:], reverse=True) and 0.01 < rates[-1] < 0.012
    options = small(vae_training={"schedule": "constant", "learning_rate": 1.0}).vae_training
    assert [learning_rate(options, step) for step in (0, 1, 5)] == [0.5, 1.0, 1.0]
