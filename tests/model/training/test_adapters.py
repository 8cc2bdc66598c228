"""LoRA training of a released model, with peft's adapters."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from cogvx import CogVideoX, load_transformer
from cogvx.cli import main
from cogvx.shapes import ProceduralClips
from cogvx.training import Recipe, train
from cogvx.training.lora import FILE, TARGETS, add_adapters
from cogvx.training.trainer import new_transformer
from cogvx.video import write_video
from tests.parallel import ranks

from ..tiny_pipeline import DIM, TEXT_LEN, save, theirs

RECIPE = """
model = "model"
[data]
folder = "latents"
frames = 9
height = 32
width = 32
[transformer_training]
steps = 4
batch_size = 2
learning_rate = 1e-2
warmup = 0
log_every = 2
save_every = 2
sample_every = 2
lora_rank = 2
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Folder with a released model, three videos with captions and a recipe."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "model", "5b")
    (tmp_path / "videos").mkdir()
    clips = ProceduralClips(frames=9, height=32, width=32)
    for number in range(3):
        write_video(tmp_path / "videos" / f"{number}.mp4", clips[number].video[None], 8)
        (tmp_path / "videos" / f"{number}.txt").write_text("a panda plays the guitar")
    (tmp_path / "lora.toml").write_text(RECIPE)
    return tmp_path


@pytest.mark.parametrize("size", [1, 2])
def test_lora_from_videos_loads_in_diffusers(here, capsys, size):
    """Trained by one process, or sharded over two ranks."""
    assert main(["encode", "videos", "--model", "model", "--out", "latents", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["clips"] == 3
    if size == 1:
        assert main(["train", "lora.toml", "--out", "run", "--json"]) == 0
        summary = json.loads(capsys.readouterr().out)
    else:
        recipe = Recipe.read("lora.toml", ["transformer_training.shard=true"])
        points = ranks.run(train, 2, recipe, here / "run")[0]["transformer"]
        summary = {f"transformer_{name}": value for name, value in points[-1].items()}
    assert summary["transformer_step"] == 4 and summary["transformer_loss"] > 0
    assert not (here / "run" / "transformer").exists()  # the model is as it was, in its own folder
    state = load_file(here / "run" / FILE)
    layers = 2 * len(TARGETS) * load_transformer("model").config.num_layers
    assert len(state) == layers and all(name.startswith("transformer.") for name in state)
    assert any(t.abs().max() > 0 for name, t in state.items() if "lora_B" in name)

    pipe = CogVideoX.from_pretrained("model", text_encoder=False)
    x, text = torch.randn(1, 3, 4, 4, 4), torch.randn(1, TEXT_LEN, DIM)
    call = {"encoder_hidden_states": text, "timestep": torch.tensor([500])}
    with torch.no_grad():
        plain = pipe.transformer(x, text, torch.tensor([500]))
        other = theirs(pipe, "text", "ddim")
        other.load_lora_weights(here / "run")
        rope = other._prepare_rotary_positional_embeddings(32, 32, 3, torch.device("cpu"))
        expected = other.transformer(x, image_rotary_emb=rope, **call).sample
        add_adapters(pipe.transformer, 2)
        adapted = {
            name.removeprefix("transformer.").replace("lora_A.", "lora_A.default.")
            .replace("lora_B.", "lora_B.default."): tensor
            for name, tensor in state.items()
        }  # fmt: skip
        missing, unexpected = pipe.transformer.load_state_dict(adapted, strict=False)
        ours = pipe.transformer(x, text, torch.tensor([500]))
    assert not unexpected and not any("lora" in name for name in missing)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-3


def test_new_adapters_change_no_output_and_are_all_that_is_trained(here):
    transformer = load_transformer("model")
    x, text = torch.randn(1, 3, 4, 4, 4), torch.randn(1, TEXT_LEN, DIM)
    before = transformer(x, text, torch.tensor([500]))
    add_adapters(transformer, 4)
    assert torch.equal(transformer(x, text, torch.tensor([500])), before)
    trained = {name for name, p in transformer.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.filterwarnings("ignore:train. this CPU has no instructions for bfloat16")
def test_frozen_model_is_bfloat16(here):
    """Adapters stay float32, and losses are close to those of a float32 model."""
    assert main(["encode", "videos", "--model", "model", "--out", "latents", "--quiet"]) == 0
    recipes = [
        Recipe.read("lora.toml", [f"transformer_training.precision={precision}"])
        for precision in ("bfloat16", "float32")
    ]
    transformer = new_transformer(recipes[0])
    kinds = {p.requires_grad: p.dtype for p in transformer.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    (short,), (long,) = (
        train(recipe, here / name).values() for recipe, name in zip(recipes, "ab", strict=True)
    )
    for one, other in zip(short, long, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05)


def test_videos_without_embeddings_are_refused(here):
    recipe = Recipe.read("lora.toml", ['data.folder="videos"'])
    with pytest.raises(ValueError, match="cogvx encode videos --model model --out FOLDER"):
        train(recipe, here / "run")


def test_released_transformer_trains_without_lora(here):
    """All weights change, and the result has diffusers' config."""
    assert main(["encode", "videos", "--model", "model", "--out", "latents", "--quiet"]) == 0
    settings = ["transformer_training.lora_rank=0", "transformer_training.steps=2"]
    train(Recipe.read("lora.toml", settings), here / "run")
    before, after = (load_transformer(here / name).state_dict() for name in ("model", "run"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    config = json.loads((here / "run" / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "CogVideoXTransformer3DModel"


def test_missing_peft_is_reported(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"peft is not installed; pip install cogvx\[train"
    ):
        add_adapters(load_transformer("model"), 2)
