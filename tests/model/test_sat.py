"""Checkpoints of SAT to hub layout: what we write as SAT would comes back bit for bit."""

import copy
import dataclasses
import os

import pytest
import torch

from cogvx.checkpoint import CheckpointError, load_scheduler, load_transformer, load_vae
from cogvx.config import PRESETS, TransformerConfig, VAEConfig
from cogvx.sat import convert, transformer_place, vae_place
from cogvx.transformer import ExpertTransformer
from cogvx.vae import CausalVAE

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 24,
    "text_embed_dim": 12,
    "num_layers": 2,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 5,
    "max_text_seq_length": 4,
}
ROTARY = {**TINY, "use_rotary_positional_embeddings": True}
LATER = {**ROTARY, "patch_size_t": 2, "patch_bias": False}
KINDS = {
    "2b": TransformerConfig(**TINY),
    "5b": TransformerConfig(**ROTARY),
    "5b-i2v": TransformerConfig(
        **{**ROTARY, "in_channels": 8, "use_learned_positional_embeddings": True}
    ),
    "1.5-5b": TransformerConfig(**LATER),
    "1.5-5b-i2v": TransformerConfig(**{**LATER, "in_channels": 8, "ofs_embed_dim": 24}),
}
TINY_VAE = VAEConfig(
    latent_channels=4,
    block_out_channels=(8, 12, 16),
    layers_per_block=2,
    norm_num_groups=4,
    sample_height=32,
    sample_width=32,
    scaling_factor=0.7,
)


def preset(kind):
    return dataclasses.replace(PRESETS[kind], transformer=KINDS[kind], vae=TINY_VAE)


def randomised(model):
    with torch.no_grad():
        for parameter in model.state_dict().values():
            parameter.normal_()
    return model


def transformer_as_sat(model):
    """A transformer's tensors under SAT's names, spelled out apart from `cogvx.sat`."""
    state, config = dict(model.state_dict()), model.config
    out = {}

    def move(ours, theirs):
        for kind in ("weight", "bias"):
            out[f"{theirs}.{kind}"] = state.pop(f"{ours}.{kind}")

    move("patch_embed.proj", "mixins.patch_embed.proj")
    move("patch_embed.text_proj", "mixins.patch_embed.text_proj")
    for ours, theirs in (("time_embedding", "time_embed"), ("ofs_embedding", "ofs_embed")):
        if theirs == "time_embed" or config.ofs_embed_dim:
            move(f"{ours}.linear_1", f"{theirs}.0")
            move(f"{ours}.linear_2", f"{theirs}.2")
    for i in range(config.num_layers):
        block, layer, adaln = f"transformer_blocks.{i}", f"transformer.layers.{i}", "adaln_layer"
        move(f"{block}.norm1.norm", f"{layer}.input_layernorm")
        move(f"{block}.norm2.norm", f"{layer}.post_attention_layernorm")
        move(f"{block}.attn1.norm_q", f"mixins.{adaln}.query_layernorm_list.{i}")
        move(f"{block}.attn1.norm_k", f"mixins.{adaln}.key_layernorm_list.{i}")
        move(f"{block}.attn1.to_out.0", f"{layer}.attention.dense")
        move(f"{block}.ff.net.0.proj", f"{layer}.mlp.dense_h_to_4h")
        move(f"{block}.ff.net.2", f"{layer}.mlp.dense_4h_to_h")
        for kind in ("weight", "bias"):
            q, k, v = (state.pop(f"{block}.attn1.to_{n}.{kind}") for n in "qkv")
            out[f"{layer}.attention.query_key_value.{kind}"] = torch.cat([q, k, v])
            # (shift, scale, gate) of attention, of the feed-forward; for video, then for text
            attention = state.pop(f"{block}.norm1.linear.{kind}").chunk(6)
            ffn = state.pop(f"{block}.norm2.linear.{kind}").chunk(6)
            rows = [*attention[:3], *ffn[:3], *attention[3:], *ffn[3:]]
            out[f"mixins.{adaln}.adaLN_modulations.{i}.1.{kind}"] = torch.cat(rows)
    move("norm_final", "transformer.final_layernorm")
    move("norm_out.norm", "mixins.final_layer.norm_final")
    move("norm_out.linear", "mixins.final_layer.adaLN_modulation.1")
    move("proj_out", "mixins.final_layer.linear")
    if config.use_learned_positional_embeddings:
        out["mixins.pos_embed.pos_embedding"] = state.pop("patch_embed.pos_embedding")
    elif not config.use_rotary_positional_embeddings:
        out["mixins.pos_embed.pos_embedding"] = torch.randn(1, 12, 16)
    if config.use_rotary_positional_embeddings:
        out["mixins.pos_embed.freqs_sin"] = torch.randn(3, 4)
        out["mixins.pos_embed.freqs_cos"] = torch.randn(3, 4)
    out["transformer.word_embeddings.embed_tokens.weight"] = torch.randn(2, 2)
    out["transformer.position_embeddings.weight"] = torch.randn(2, 2)
    assert not state
    return {f"model.diffusion_model.{key}": tensor for key, tensor in out.items()}


def vae_as_sat(model):
    out = {}
    last = len(model.config.block_out_channels) - 1
    for name, tensor in model.state_dict().items():
        words = name.split(".")
        for at, word in enumerate(words):
            if word == "mid_block":
                words[at : at + 3] = ["mid", f"block_{int(words[at + 2]) + 1}"]
            elif word == "down_blocks":
                words[at] = "down"
            elif word == "up_blocks":
                words[at : at + 2] = ["up", str(last - int(words[at + 1]))]
            elif word == "resnets":
                words[at] = "block"
            elif word == "conv_shortcut":
                words[at] = "nin_shortcut"
            elif word in ("downsamplers", "upsamplers"):
                words[at : at + 2] = [word[:-2]]
        out[".".join(words)] = tensor
    assert len(out) == len(model.state_dict())
    assert "decoder.up.1.upsample.conv.weight" in out
    assert "encoder.down.0.downsample.conv.weight" in out
    return {**out, "loss.logvar": torch.zeros(()), "loss.perceptual.weight": torch.ones(2)}


def saved(state, path, container="module"):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({container: state} if container else state, path)
    return path


def assert_same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype is theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("container", ["model", "module", "state_dict", None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_transformer_comes_back_bit_for_bit(kind, container, tmp_path):
    model = randomised(ExpertTransformer(KINDS[kind])).to(torch.bfloat16)
    source = saved(transformer_as_sat(model), tmp_path / "in" / "x.pt", container)
    # what the shapes tell is taken from them, so the preset need not have it
    given = dataclasses.replace(
        preset(kind),
        transformer=dataclasses.replace(
            KINDS[kind],
            num_attention_heads=4,
            num_layers=1,
            time_embed_dim=99,
            text_embed_dim=1,
            ofs_embed_dim=None,
        ),
    )
    found = convert(source, tmp_path / "out", preset=given)
    assert found.transformer == KINDS[kind]
    again = load_transformer(tmp_path / "out")
    assert again.config == KINDS[kind]
    assert_same(again, model)
    assert sorted(os.listdir(tmp_path / "out")) == ["scheduler", "transformer"]
    assert load_scheduler(tmp_path / "out") == (given.solver, given.scheduler)


def test_folders_and_a_vae_and_dtype(tmp_path):
    model, vae = randomised(ExpertTransformer(KINDS["5b"])), randomised(CausalVAE(TINY_VAE))
    saved(transformer_as_sat(model), tmp_path / "sat" / "1" / "mp_rank_00_model_states.pt")
    # the text encoder that some carry along is published apart
    state = {**vae_as_sat(vae), "conditioner.embedders.0.weight": torch.ones(1)}
    alone = saved(state, tmp_path / "vae.pt", "state_dict")
    for latest in (None, "1"):
        if latest:
            (tmp_path / "sat" / "latest").write_text(f"{latest}\n")
        found = convert(
            tmp_path / "sat",
            tmp_path / "out",
            torch.float16,
            vae=alone,
            preset=preset("5b"),
            max_shard_bytes=10_000,
        )
        assert found.vae == TINY_VAE
        assert_same(load_transformer(tmp_path / "out"), copy.deepcopy(model).half())
        assert_same(load_vae(tmp_path / "out"), copy.deepcopy(vae).half())
    assert len(os.listdir(tmp_path / "out" / "transformer")) > 3
    inside = {f"first_stage_model.{key}": tensor for key, tensor in vae_as_sat(vae).items()}
    source = saved({**transformer_as_sat(model), **inside}, tmp_path / "both.pt", "model")
    convert(source, tmp_path / "out2", preset=preset("5b"))
    assert_same(load_vae(tmp_path / "out2"), vae)
    convert(alone, tmp_path / "out3", preset=preset("5b"))
    assert_same(load_vae(tmp_path / "out3"), vae)
    assert sorted(os.listdir(tmp_path / "out3")) == ["scheduler", "vae"]


@pytest.mark.parametrize("name", PRESETS)
def test_released_models_are_recognised_by_their_shapes(name, tmp_path, monkeypatch):
    """On the meta device: every name, and every shape, of the five."""
    monkeypatch.setattr("cogvx.sat.save", lambda *_: None)
    with torch.device("meta"):
        model = ExpertTransformer(PRESETS[name].transformer)
        states = transformer_as_sat(model)
    monkeypatch.setattr("cogvx.sat._load", lambda _: states)
    (tmp_path / "x.pt").touch()
    assert convert(tmp_path / "x.pt", tmp_path / "out") == PRESETS[name]


def test_a_preset_is_required_if_it_cannot_be_recognised(tmp_path):
    source = saved(transformer_as_sat(ExpertTransformer(KINDS["5b"])), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="preset must be one of 2b, 5b, .* cannot be recognised"):
        convert(source, tmp_path / "out")
    with pytest.raises(ValueError, match="preset must be one of .*; got '6b'"):
        convert(source, tmp_path / "out", preset="6b")
    with pytest.raises(ValueError, match="preset must be one of"):
        convert(saved(vae_as_sat(CausalVAE(TINY_VAE)), tmp_path / "v.pt"), tmp_path / "out")
    with pytest.raises(TypeError, match="dtype must be a floating"):
        convert(source, tmp_path / "out", torch.int8)
    assert not (tmp_path / "out").exists()


def test_each_key_that_is_lost_or_new_or_misshapen_is_named(tmp_path):
    config = dataclasses.replace(KINDS["1.5-5b-i2v"], num_layers=1)
    whole = transformer_as_sat(ExpertTransformer(config))
    prefix = "model.diffusion_model."
    dropped = "embed_tokens", "freqs_", "position_embedding"
    path = tmp_path / "x.pt"
    for key, tensor in whole.items():
        if any(word in key for word in dropped):
            continue
        rest = {k: v for k, v in whole.items() if k != key}
        short = key.removeprefix(prefix)
        for state, wanted in (
            (rest, short),
            ({**rest, key + "x": tensor}, short),
            ({**rest, key: tensor[..., None]}, short),
            ({**rest, key: tensor.int()}, short),
            ({**whole, key + ".more": tensor}, f"{short}.more': expected nothing; got"),
        ):
            with pytest.raises(CheckpointError) as raised:
                convert(saved(state, path), tmp_path / "out", preset=preset("1.5-5b-i2v"))
            assert wanted in str(raised.value)
    stranges = {"optimizer.x": torch.ones(1)}, {"step": 7}, {3: torch.ones(1)}
    repeated = {f"{prefix}x": torch.ones(1).expand(1 << 40)}  # four bytes that say they are 4 TB
    for strange in (*stranges, repeated):
        with pytest.raises(CheckpointError, match="got also"):
            convert(saved({**whole, **strange}, path), tmp_path / "out", preset="5b")
    assert not (tmp_path / "out").exists()


def test_a_vae_that_lacks_a_tensor_names_it(tmp_path):
    whole = vae_as_sat(CausalVAE(TINY_VAE))
    for key in list(whole)[:: len(whole) // 8]:
        if not key.startswith("loss"):
            state = {k: v for k, v in whole.items() if k != key}
            with pytest.raises(CheckpointError) as raised:
                convert(saved(state, tmp_path / "x.pt"), tmp_path / "out", preset=preset("5b"))
            assert key in str(raised.value)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_is_refused(legacy, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "x.pt"
    state = {"model.diffusion_model.x": torch.ones(1), "y": Payload(str(marker))}
    torch.save({"module": state}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        convert(path, tmp_path / "out", preset="5b")
    assert not marker.exists()
    torch.load(path, weights_only=False)["module"]["y"].close()
    assert marker.exists()  # it would have


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"\x80\4.", bytes(1000), b"{}"])
def test_what_is_no_checkpoint_is_refused(data, tmp_path):
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.pt: must be a checkpoint.* as torch.save"):
        convert(tmp_path / "x.pt", tmp_path / "out", preset="5b")
    whole = saved({"a": torch.ones(100)}, tmp_path / "y.pt").read_bytes()
    for cut in range(0, len(whole), 97):
        (tmp_path / "y.pt").write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            convert(tmp_path / "y.pt", tmp_path / "out", preset="5b")


def test_paths_that_are_no_checkpoint(tmp_path):
    state = {"model.diffusion_model.x": torch.ones(1)}

    def refused(match, source=tmp_path / "sat"):
        with pytest.raises(CheckpointError, match=match):
            convert(source, tmp_path / "out", preset="5b")

    refused("does not exist", tmp_path / "nowhere.pt")
    refused("got neither", saved({}, tmp_path / "empty.pt"))
    torch.save(torch.ones(1), tmp_path / "tensor.pt")
    refused("must hold tensors by name; got Tensor", tmp_path / "tensor.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    refused("must be a regular file; got a pipe", tmp_path / "pipe.pt")
    (tmp_path / "sat").mkdir()
    refused("must hold `latest`, or one folder with mp_rank_00_model_states.pt; got 0")
    (tmp_path / "sat" / "latest").write_text("../elsewhere")
    refused("latest: must name a folder; got '../elsewhere'")
    (tmp_path / "sat" / "latest").write_text("1000")
    refused("1000: is no folder, but")
    saved(state, tmp_path / "sat" / "1000" / "mp_rank_00_model_states.pt")
    refused("must have 2 dimensions")
    saved(state, tmp_path / "sat" / "1000" / "mp_rank_01_model_states.pt")
    refused("split over several ranks")
    (tmp_path / "sat" / "latest").unlink()
    saved(state, tmp_path / "sat" / "2000" / "mp_rank_00_model_states.pt")
    refused("got 2")


def test_places_are_as_documented():
    place = transformer_place("transformer_blocks.7.norm2.linear.bias")
    assert place == ("mixins.adaln_layer.adaLN_modulations.7.1.bias", (3, 4, 5, 9, 10, 11), 12)
    assert vae_place("decoder.up_blocks.0.resnets.3.conv1.conv.weight", 4).key == (
        "decoder.up.3.block.3.conv1.conv.weight"
    )
