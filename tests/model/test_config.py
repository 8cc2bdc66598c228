"""Configs: what they accept, what they refuse, and that they say what the released files say."""

import inspect
import json
import re

import diffusers
import pytest

from cogvx import frames
from cogvx.config import PRESETS, SchedulerConfig, TransformerConfig, VAEConfig
from cogvx_kernels.testing import SIZES

OF_PRESETS = [name for name in SIZES if name.rsplit("-", 2)[0] in PRESETS]
# What 1.0 releases leave out of transformer/config.json (`docs/model.md`, section 9).
LACKING = ("patch_size_t", "patch_bias", "ofs_embed_dim", "use_learned_positional_embeddings")

WRONG = {
    "a huge integer": (TransformerConfig, {"num_layers": 10**9}, "num_layers must be"),
    "a huge width": (TransformerConfig, {"text_embed_dim": 2**40}, "text_embed_dim must be"),
    "a negative": (TransformerConfig, {"in_channels": -16}, "in_channels must be"),
    "zero": (TransformerConfig, {"patch_size": 0}, "patch_size must be"),
    "a word": (TransformerConfig, {"num_layers": "30"}, "num_layers must be an integer"),
    "a half": (TransformerConfig, {"num_layers": 1.5}, "num_layers must be an integer"),
    "infinity": (TransformerConfig, {"mlp_ratio": float("inf")}, "mlp_ratio must be"),
    "not a number": (TransformerConfig, {"norm_eps": float("nan")}, "norm_eps must be"),
    "true for a number": (TransformerConfig, {"num_layers": True}, "num_layers must be"),
    "one for true": (VAEConfig, {"factorized": 1}, "factorized must be a bool"),
    "a number for a list": (VAEConfig, {"block_out_channels": 8}, "block_out_channels must be"),
    "a long list": (VAEConfig, {"block_out_channels": [32] * 99}, "block_out_channels must be"),
    "an unknown key": (VAEConfig, {"chanels": 3}, "unknown key 'chanels'"),
    "another activation": (TransformerConfig, {"activation_fn": "relu"}, "activation_fn must be"),
    "another target": (SchedulerConfig, {"prediction_type": "epsilon"}, "prediction_type must be"),
    "groups that do not divide": (VAEConfig, {"norm_num_groups": 5}, "norm_num_groups must divide"),
    "too much compression": (VAEConfig, {"temporal_compression_ratio": 16}, "power of two"),
    "an odd chunk": (VAEConfig, {"num_latent_frames_batch_size": 3}, "must be even"),
    "chunks that do not fit": (VAEConfig, {"num_sample_frames_batch_size": 4}, "must be temporal"),
    "experts of one modality": (TransformerConfig, {"num_text_experts": 2}, "both at least 1"),
    "more chosen than there are": (TransformerConfig, {"expert_top_k": 2}, "expert_top_k must be"),
    "positions twice": (
        TransformerConfig,
        {"use_learned_positional_embeddings": True, "patch_size_t": 2},
        "use_learned_positional_embeddings must be false",
    ),
    "times that cannot be added": (
        TransformerConfig,
        {"ofs_embed_dim": 8},
        "ofs_embed_dim must be null or time_embed_dim 512.*got 8",
    ),
    "an odd head": (
        TransformerConfig,
        {"use_rotary_positional_embeddings": True, "attention_head_dim": 63},
        "attention_head_dim must be even",
    ),
    "a size between patches": (TransformerConfig, {"sample_width": 91}, "sample_width must be"),
    "a list for an object": (TransformerConfig, [1], "must be a JSON object"),
}


@pytest.mark.parametrize("config", [TransformerConfig, VAEConfig, SchedulerConfig])
def test_a_config_survives_json(config):
    assert config.from_dict(json.loads(json.dumps(config().to_dict()))) == config()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    for config in (PRESETS[name].transformer, PRESETS[name].vae, PRESETS[name].scheduler):
        assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (TransformerConfig, diffusers.CogVideoXTransformer3DModel),
        (VAEConfig, diffusers.AutoencoderKLCogVideoX),
    ],
)
def test_the_defaults_are_those_of_diffusers(ours, theirs):
    """Defaults of the models; those of diffusers' schedulers are of no release."""
    parameters = inspect.signature(theirs.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert len(defaults) > 15
    assert ours.from_dict(defaults) == ours()


def test_keys_that_old_releases_lack_take_their_defaults():
    spelled = TransformerConfig().to_dict()
    for key in LACKING:
        del spelled[key]
    assert TransformerConfig.from_dict(spelled) == TransformerConfig()


def test_notes_of_the_writer_are_passed_over():
    notes = {"_class_name": "CogVideoXTransformer3DModel", "_diffusers_version": "0.31.0"}
    assert TransformerConfig.from_dict({**notes, "num_layers": 2}).num_layers == 2


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_config_is_refused_by_name(case):
    config, values, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=message) as error:
        config.from_dict(values)
    assert str(error.value).startswith(config.__name__)
    about_the_value = str(error.value).partition(" The keys are ")[0]
    assert len(about_the_value) < 300


@pytest.mark.parametrize("name", OF_PRESETS)
def test_the_sizes_that_kernels_are_timed_at_are_those_of_the_presets(name):
    """`SIZES` of the kernels and `PRESETS` are two tables of the same models."""
    model, height, width, length = re.fullmatch(r"(.+)-(\d+)x(\d+)-(\d+)f", name).groups()
    size, config, vae = SIZES[name], PRESETS[model].transformer, PRESETS[model].vae
    patch = vae.spatial_compression_ratio * config.patch_size
    latents = frames.latent_frames(int(length), vae)
    assert size.frames == -(-latents // (config.patch_size_t or 1))
    assert (size.height, size.width) == (int(height) // patch, int(width) // patch)
    assert (size.nheads, size.headdim) == (config.num_attention_heads, config.attention_head_dim)
    assert size.text_len == config.max_text_seq_length
