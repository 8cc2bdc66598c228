"""T5 from a folder: no download, no mask, nothing cut in silence; embeddings as in diffusers."""

import json
import shutil
import subprocess
import sys
import warnings

import pytest
import sentencepiece
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file, save_file
from transformers import T5Tokenizer

from cogvx import CheckpointError
from cogvx.text import T5TextEncoder

from .tiny_pipeline import WORDS, text_encoder

DIM = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in hub layout with a random T5 of two layers and a vocabulary of a few words."""
    folder = tmp_path_factory.mktemp("model")
    text_encoder(DIM).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return T5TextEncoder.from_pretrained(folder)


@pytest.fixture(scope="module")
def pipe(encoder):
    """diffusers' pipeline, of which only the text stage is used."""
    return CogVideoXPipeline(
        tokenizer=encoder.tokenizer,
        text_encoder=encoder.model,
        vae=None,
        transformer=None,
        scheduler=None,
    )


PROMPTS = ["a panda plays the guitar", "rain falls on quiet green leaves in the bamboo forest", ""]


@pytest.mark.parametrize("max_length", [12, 16, 226])
def test_embeddings_are_those_of_diffusers(encoder, pipe, max_length):
    came = encoder.encode(PROMPTS, max_length)
    assert came.shape == (3, max_length, DIM) and came.dtype == torch.float32
    expected = pipe._get_t5_prompt_embeds(PROMPTS, max_sequence_length=max_length, device="cpu")
    assert torch.equal(came, expected)
    assert not came.requires_grad and encoder.dim == DIM


def test_padding_takes_part(encoder):
    """There is no mask: the same prompt padded further has other states."""
    short, long = (encoder.encode(PROMPTS[:1], length) for length in (12, 24))
    assert (short - long[:, :12]).abs().max() > 1e-3


def test_long_prompts_are_cut_with_a_warning(encoder, pipe):
    prompts = [PROMPTS[0], " ".join(WORDS)]
    with pytest.warns(
        UserWarning, match="the prompt 'a the panda .* has 16 tok.* 8; left"
    ) as warned:
        came = encoder.encode(prompts, 8)
    assert len(warned) == 1
    # Seven words and the closing token are seen.
    assert str(warned[0].message).endswith(repr(" ".join(WORDS[7:])))
    expected = pipe._get_t5_prompt_embeds(prompts, max_sequence_length=8, device="cpu")
    assert torch.equal(came, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(prompts, 8)  # warned already


def test_a_prompt_that_just_fits_is_not_warned_of(encoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode([" ".join(WORDS)], len(WORDS) + 1)


def test_dtype_is_that_of_the_files_or_the_given_one(folder, encoder):
    half = T5TextEncoder.from_pretrained(folder, dtype=torch.bfloat16)
    came = half.encode(PROMPTS, 16)
    assert came.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits through two layers; states are of order 1.
    torch.testing.assert_close(came.float(), encoder.encode(PROMPTS, 16), rtol=0.1, atol=0.1)


def test_saved_and_read_again(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    again = T5TextEncoder.from_pretrained(tmp_path)
    assert torch.equal(again.encode(PROMPTS, 16), encoder.encode(PROMPTS, 16))


@pytest.mark.parametrize("missing", ["text_encoder", "tokenizer"])
def test_a_missing_folder_is_named(folder, tmp_path, missing):
    for name in {"text_encoder", "tokenizer"} - {missing}:
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(FileNotFoundError, match=f"{missing}/ is missing"):
        T5TextEncoder.from_pretrained(tmp_path)


def test_pickled_weights_are_refused(folder, tmp_path):
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    (tmp_path / "text_encoder").mkdir()
    config = (folder / "text_encoder" / "config.json").read_text()
    (tmp_path / "text_encoder" / "config.json").write_text(config)
    torch.save({}, tmp_path / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="model.safetensors.* pytorch_model.bin.*pickle"):
        T5TextEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("module", ["transformers", "sentencepiece", "google.protobuf"])
def test_a_missing_package_is_named_with_what_to_install(module, released, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    package = module.removeprefix("google.")
    with pytest.raises(ModuleNotFoundError) as raised:
        T5TextEncoder.from_pretrained(released)
    wanted = f"T5TextEncoder: {package} is not installed; pip install cogvx[text]"
    assert str(raised.value) == wanted


def test_a_tokenizer_json_needs_neither_sentencepiece_nor_protobuf(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    T5TextEncoder.from_pretrained(folder)


def test_a_released_tokenizer_is_spiece_model_alone(released):
    """Its tokens are those of sentencepiece with the closing one, and those of transformers."""
    assert not (released / "tokenizer" / "tokenizer.json").exists()
    encoder = T5TextEncoder.from_pretrained(released)
    assert encoder.encode(PROMPTS, 226).dtype == torch.bfloat16
    path = str(released / "tokenizer" / "spiece.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=path)
    theirs = T5Tokenizer.from_pretrained(released / "tokenizer")
    end = theirs.eos_token_id
    for prompt in (*PROMPTS, "Größe, 7 zebras", "  two  spaces "):
        tokens = encoder.tokenizer(prompt).input_ids
        assert tokens == [*pieces.encode(prompt), end] == theirs(prompt).input_ids
    states = encoder.model(encoder.tokenizer(PROMPTS[0], return_tensors="pt").input_ids)[0]
    exact = encoder.encode(PROMPTS[:1], states.shape[1])
    assert torch.equal(exact, states)


def copied(folder, new):
    shutil.copytree(folder, new)
    return new


def test_variants_of_a_text_encoder(released, tmp_path):
    expected = T5TextEncoder.from_pretrained(released).encode(PROMPTS, 226)
    folder = copied(released, tmp_path / "model")
    inner = folder / "text_encoder"
    index = json.loads((inner / "model.safetensors.index.json").read_text())
    names = {name: name.replace("model-", "model.fp16-") for name in index["weight_map"].values()}
    for name, new in names.items():
        (inner / name).rename(inner / new)
    index["weight_map"] = {key: names[name] for key, name in index["weight_map"].items()}
    (inner / "model.safetensors.index.json").unlink()
    (inner / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="pass variant='fp16', which is what there is"):
        T5TextEncoder.from_pretrained(folder)
    half = T5TextEncoder.from_pretrained(folder, variant="fp16")
    assert torch.equal(half.encode(PROMPTS, 226), expected)


def test_mixed_dtypes_become_that_of_most_numbers(released, tmp_path):
    folder = copied(released, tmp_path / "model")
    for path in (folder / "text_encoder").glob("*.safetensors"):
        tensors = load_file(path)
        wide = {name: t.float() if "norm" in name else t for name, t in tensors.items()}
        save_file(wide, path, {"format": "pt"})
    encoder = T5TextEncoder.from_pretrained(folder)
    assert {p.dtype for p in encoder.model.parameters()} == {torch.bfloat16}
    expected = T5TextEncoder.from_pretrained(released).encode(PROMPTS, 226)
    assert torch.equal(encoder.encode(PROMPTS, 226), expected)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 862388\n"


@pytest.mark.parametrize(
    "name", ["tokenizer/spiece.model", "text_encoder/config.json", "text_encoder/*.safetensors"]
)
def test_files_of_another_kind_are_named(name, released, tmp_path):
    folder = copied(released, tmp_path / "model")
    path = sorted(folder.glob(name))[0]
    whole = path.read_bytes()
    for data, words in (
        (LFS, "a git-lfs pointer.*git lfs pull.*hf download"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"Entry not found", "text, which begins 'Entry not found'"),
        (b"", "an empty file"),
    ):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"{path.name}: must be .*; got {words}"):
            T5TextEncoder.from_pretrained(folder)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=str(path.parent)):
        T5TextEncoder.from_pretrained(folder)
    path.rename(f"{path}.incomplete")
    with pytest.raises(CheckpointError, match=f"{path.parent.name}: .*\\.incomplete is a download"):
        T5TextEncoder.from_pretrained(folder)


def test_missing_weights_are_refused(released, tmp_path):
    """transformers would make them at random, with a warning."""
    folder = copied(released, tmp_path / "model")
    inner = folder / "text_encoder"
    index = inner / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    lost = "encoder.final_layer_norm.weight"
    path = inner / values["weight_map"].pop(lost)
    save_file({k: v for k, v in load_file(path).items() if k != lost}, path, {"format": "pt"})
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"1 are missing:\n *{lost}"):
        T5TextEncoder.from_pretrained(folder)


def test_importing_text_imports_no_transformers():
    code = "import sys, cogvx.text; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
