"""T5 from a folder: no download, no mask, nothing cut in silence; embeddings as in diffusers."""

import subprocess
import sys
import warnings

import pytest
import torch
from diffusers import CogVideoXPipeline

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
    with pytest.warns(UserWarning, match="prompt 1 has 16 tokens.* 8; left out: ") as warned:
        came = encoder.encode(prompts, 8)
    assert len(warned) == 1
    # Seven words and the closing token are seen.
    assert str(warned[0].message).endswith(repr(" ".join(WORDS[7:])))
    expected = pipe._get_t5_prompt_embeds(prompts, max_sequence_length=8, device="cpu")
    assert torch.equal(came, expected)


def test_a_prompt_that_just_fits_is_not_warned_of(encoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode([" ".join(WORDS)], len(WORDS) + 1)


def test_dtype_is_that_of_the_files_or_the_one_asked_for(folder, encoder):
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
    with pytest.raises(OSError, match="safetensors"):
        T5TextEncoder.from_pretrained(tmp_path)


def test_without_transformers_the_error_says_what_to_install():
    code = """
import sys
sys.modules["transformers"] = None
from cogvx.text import T5TextEncoder
try:
    T5TextEncoder.from_pretrained("nowhere")
except ModuleNotFoundError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install cogvx[text]" in said.stdout


def test_importing_text_imports_no_transformers():
    code = "import sys, cogvx.text; print('transformers' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
