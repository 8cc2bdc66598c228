"""Every wrong argument has an error that names it, what was wanted and what came."""

import dataclasses

import pytest
import torch

from cogvx.transformer import ExpertTransformer
from cogvx.transformer.positions import sincos_table
from cogvx_kernels import module_backend

from .tiny import ROPE, SIN_COS

LEARNED = dataclasses.replace(ROPE, use_learned_positional_embeddings=True)
V15 = dataclasses.replace(ROPE, patch_size_t=2)
OFS = dataclasses.replace(ROPE, ofs_embed_dim=6)


def right():
    return {
        "latents": torch.randn(2, 2, 4, 4, 6),
        "text": torch.randn(2, 5, 10),
        "timestep": torch.tensor([999, 37]),
    }


# What is wrong, the model, the argument in place of the right one, the error, what it says.
WRONG = [
    ("no tensor", ROPE, {"latents": [1.0]}, TypeError, r"latents must be a floating-point tensor"),
    ("whole numbers", ROPE, {"latents": torch.zeros(2, 2, 4, 4, 6).long()}, TypeError,
     r"latents must be a floating-point tensor \(batch, frames, channels, height, width\); "
     r"got int64 \(2, 2, 4, 4, 6\)"),
    ("no frames", ROPE, {"latents": torch.zeros(2, 4, 4, 6)}, ValueError,
     r"latents must be .*got float32 \(2, 4, 4, 6\)"),
    ("channels before frames", ROPE, {"latents": torch.zeros(2, 4, 3, 4, 6)}, ValueError,
     r"latents must have 4 channels .*; got 3 in \(2, 4, 3, 4, 6\)"),
    ("odd height", ROPE, {"latents": torch.zeros(2, 2, 4, 5, 6)}, ValueError,
     r"latents must have height a positive multiple of patch_size = 2, nearest 4 or 6; got 5"),
    ("odd width", ROPE, {"latents": torch.zeros(2, 2, 4, 4, 1)}, ValueError,
     r"latents must have width a positive multiple of patch_size = 2, nearest 2; got 1"),
    ("empty", ROPE, {"latents": torch.zeros(2, 0, 4, 4, 6)}, ValueError,
     r"latents must have frames a positive multiple of patch_size_t = 1, nearest 1; got 0"),
    ("odd frames in 1.5", V15, {"latents": torch.zeros(2, 3, 4, 4, 6)}, ValueError,
     r"latents must have frames a positive multiple of patch_size_t = 2, nearest 2 or 4; got 3"),
    ("another size, learned", LEARNED, {"latents": torch.zeros(2, 2, 4, 6, 4)}, ValueError,
     r"latents must be 4x6 in a model with learned positions.*; got 6x4"),
    ("text of one item", ROPE, {"text": torch.zeros(1, 5, 10)}, ValueError,
     r"text must have the batch of latents, 2; got 1"),
    ("text without a batch", ROPE, {"text": torch.zeros(5, 10)}, ValueError,
     r"text must be .*\(batch, text_len, text_embed_dim\); got float32 \(5, 10\)"),
    ("text too wide", ROPE, {"text": torch.zeros(2, 5, 11)}, ValueError,
     r"text must have text_embed_dim = 10 values a token; got 11"),
    ("short text, sin-cos", SIN_COS, {"text": torch.zeros(2, 4, 10)}, ValueError,
     r"text must have max_text_seq_length = 5 tokens .*; got 4"),
    ("long text, learned", LEARNED, {"text": torch.zeros(2, 6, 10)}, ValueError,
     r"text must have max_text_seq_length = 5 tokens .*; got 6"),
    ("half latents", ROPE, {"latents": torch.zeros(2, 2, 4, 4, 6).half()}, TypeError,
     r"latents must be float32 as the model is; got float16"),
    ("double text", ROPE, {"text": torch.zeros(2, 5, 10).double()}, TypeError,
     r"text must be float32 as latents are; got float64"),
    ("text elsewhere", ROPE, {"text": torch.zeros(2, 5, 10, device="meta")}, ValueError,
     r"text must be on the device of latents, cpu; got meta"),
    ("a plain number", ROPE, {"timestep": 37}, TypeError,
     r"timestep must be a tensor of numbers; got 37 \(int\)"),
    ("booleans", ROPE, {"timestep": torch.tensor([True, False])}, TypeError,
     r"timestep must be a tensor of numbers; got bool \(2,\)"),
    ("one of two timesteps", ROPE, {"timestep": torch.tensor([37])}, ValueError,
     r"timestep must be a scalar or \(batch,\) = \(2,\); got \(1,\)"),
    ("three timesteps", ROPE, {"timestep": torch.tensor([1, 2, 3])}, ValueError,
     r"timestep must be .* = \(2,\); got \(3,\)"),
    ("ofs missing", OFS, {}, ValueError, r"ofs must be given to a model with ofs_embed_dim"),
    ("ofs for none", ROPE, {"ofs": torch.tensor([2.0])}, ValueError,
     r"ofs must be None in a model without ofs_embed_dim; got float32 \(1,\)"),
    ("ofs of three", OFS, {"ofs": torch.ones(3)}, ValueError,
     r"ofs must be a scalar, \(1,\) or \(batch,\) = \(2,\); got \(3,\)"),
    ("ofs a number", OFS, {"ofs": 2.0}, TypeError, r"ofs must be a tensor of numbers; got 2.0"),
    ("a tuple to fill", ROPE, {"routing": ()}, TypeError, r"routing must be a list to fill"),
]  # fmt: skip


@pytest.mark.parametrize("config, wrong, error, says", [case[1:] for case in WRONG],
                         ids=[case[0] for case in WRONG])  # fmt: skip
def test_wrong_argument(config, wrong, error, says):
    with module_backend("reference"):
        model = ExpertTransformer(config)
    with pytest.raises(error, match=f"^ExpertTransformer: {says}"):
        model(**{**right(), **wrong})


@pytest.mark.parametrize("config", [ROPE, SIN_COS, LEARNED, V15])
def test_right_arguments(config):
    with module_backend("reference"):
        model = ExpertTransformer(config)
    assert model(**right()).shape == right()["latents"].shape


def test_wrong_attention():
    wanted = '^ExpertTransformer: attention must be one of "auto", "flash", .*; got .xformers'
    with pytest.raises(ValueError, match=wanted):
        ExpertTransformer(ROPE, "xformers")


def test_a_table_of_an_odd_width():
    with pytest.raises(ValueError, match="dim must be a multiple of 16; got 24"):
        sincos_table(24, (1, 2, 2), 1.0, 1.0)
