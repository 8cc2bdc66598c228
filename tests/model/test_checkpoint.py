"""Load and save model folders: compatible with diffusers; invalid files are rejected."""

import copy
import dataclasses
import json
import os
import random
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
)
from safetensors.torch import load_file, save_file

from cogvx import checkpoint
from cogvx.checkpoint import (
    CheckpointError,
    load_scheduler,
    load_transformer,
    load_vae,
    save_scheduler,
    save_transformer,
    save_vae,
)
from cogvx.checkpoint import tensors as tensor_files
from cogvx.config import PRESETS, SchedulerConfig, TransformerConfig, VAEConfig
from cogvx.memory import LiveBytes, module_bytes
from cogvx.pipeline import CogVideoX
from cogvx.transformer import ExpertTransformer
from cogvx.vae import CausalVAE

from .checkpoints import (
    INDEX,
    TINY,
    WEIGHTS,
    assert_same,
    files,
    randomised,
    tiny_transformer,
)

ROTARY = {**TINY, "use_rotary_positional_embeddings": True}
KINDS = {
    "2b": TINY,
    "5b": ROTARY,
    "5b-i2v": {**ROTARY, "in_channels": 8, "use_learned_positional_embeddings": True},
    "1.5-5b": {**ROTARY, "patch_size_t": 2, "patch_bias": False},
    "1.5-5b-i2v": {
        **ROTARY,
        "patch_size_t": 2,
        "patch_bias": False,
        "in_channels": 8,
        "ofs_embed_dim": 8,
    },
}
TINY_VAE = VAEConfig(
    latent_channels=4,
    block_out_channels=(8, 8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    sample_height=32,
    sample_width=32,
)


@pytest.fixture
def tiny():
    return tiny_transformer()


class RealBytes(LiveBytes):
    """Without the meta device."""

    def count(self, *tensors):
        super().count(*[t for t in tensors if not isinstance(t, torch.Tensor) or not t.is_meta])


def unused_by(kind, folder):
    """The keys of a config that diffusers warns of."""
    _, unused = kind.from_config(kind.load_config(folder), return_unused_kwargs=True)
    return [key for key in unused if not key.startswith("_")]


@pytest.mark.parametrize("shard", [None, "8KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_diffusers_saved_loads(kind, shard, tmp_path):
    theirs = randomised(CogVideoXTransformer3DModel(**KINDS[kind]))
    theirs.save_pretrained(tmp_path / "transformer", **({"max_shard_size": shard} if shard else {}))
    assert (INDEX in files(tmp_path / "transformer")) is bool(shard)
    for path in (tmp_path, tmp_path / "transformer"):
        ours = load_transformer(path)
        assert ours.config == TransformerConfig(**KINDS[kind])
        assert not ours.training
        assert_same(ours, theirs.float())  # diffusers makes the learned positions in float64


@pytest.mark.parametrize("shard", [10**9, 8000])
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_what_we_saved(kind, shard, tmp_path):
    ours = randomised(ExpertTransformer(TransformerConfig(**KINDS[kind])))
    save_transformer(ours, tmp_path, shard)
    theirs, info = CogVideoXTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    # diffusers leaves this buffer in the fp64 that it was made in, and puts our numbers into it
    assert_same(ours, theirs.float())
    assert not any(info.values())
    assert not unused_by(CogVideoXTransformer3DModel, tmp_path)
    assert_same(load_transformer(tmp_path), ours)


def test_vae_and_diffusers_read_each_other(tmp_path):
    ours = randomised(CausalVAE(TINY_VAE))
    save_vae(ours, tmp_path / "vae", 20_000)
    assert INDEX in files(tmp_path / "vae")
    theirs, info = AutoencoderKLCogVideoX.from_pretrained(
        tmp_path / "vae", output_loading_info=True
    )
    assert not any(info.values())
    assert not unused_by(AutoencoderKLCogVideoX, tmp_path / "vae")
    assert_same(ours, theirs)
    theirs.save_pretrained(tmp_path / "again")
    again = load_vae(tmp_path / "again")
    assert again.config == TINY_VAE
    assert_same(load_vae(tmp_path), again)


@pytest.mark.parametrize("solver", ["ddim", "dpm"])
def test_scheduler_and_diffusers_read_each_other(solver, tmp_path):
    kind = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}[solver]
    config = SchedulerConfig(snr_shift_scale=1.0)
    save_scheduler(config, tmp_path / "scheduler", solver)
    assert load_scheduler(tmp_path) == (solver, config)
    assert not unused_by(kind, tmp_path / "scheduler")
    theirs = kind.from_pretrained(tmp_path / "scheduler")
    assert theirs.config.snr_shift_scale == 1.0
    theirs.save_pretrained(tmp_path / "again")
    assert load_scheduler(tmp_path / "again") == (solver, config)


def test_the_config_of_a_first_release_lacks_keys(tiny, tmp_path):
    save_transformer(tiny, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    late = "patch_size_t", "patch_bias", "ofs_embed_dim", "use_learned_positional_embeddings"
    for key in late:
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(load_transformer(tmp_path), tiny)


def test_released_configs_are_spelled_without_keys_of_ours():
    for preset in PRESETS.values():
        values = checkpoint.folder.transformer_values(preset.transformer)
        assert values["_class_name"] == "CogVideoXTransformer3DModel"
        assert not values.keys() & checkpoint.folder.OURS
        assert TransformerConfig.from_dict(values) == preset.transformer
        values = checkpoint.folder.vae_values(preset.vae)
        assert values["_class_name"] == "AutoencoderKLCogVideoX"
        assert not values.keys() & checkpoint.folder.OURS
        assert VAEConfig.from_dict(values) == preset.vae


def test_models_that_diffusers_does_not_have(tmp_path):
    options = {**ROTARY, "num_text_experts": 2, "num_video_experts": 3, "mlp_ratio": 2.0}
    routed = randomised(ExpertTransformer(TransformerConfig(**options)))
    save_transformer(routed, tmp_path / "transformer", 8000)
    again = load_transformer(tmp_path)
    assert again.config == routed.config
    assert_same(again, routed)
    factorized = randomised(CausalVAE(dataclasses.replace(TINY_VAE, factorized=True)))
    save_vae(factorized, tmp_path / "vae")
    assert load_vae(tmp_path).config == factorized.config
    assert_same(load_vae(tmp_path), factorized)
    for name, wanted in (("transformer", "ExpertTransformer"), ("vae", "CausalVAE")):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["_class_name"] == wanted


def test_dtype_variant_and_device(tiny, tmp_path):
    save_transformer(tiny, tmp_path)
    half = load_transformer(tmp_path, torch.bfloat16)
    assert_same(half, tiny.to(torch.bfloat16))
    os.rename(tmp_path / WEIGHTS, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(CheckpointError, match="pass variant='fp16', which is what there is"):
        load_transformer(tmp_path)
    assert_same(load_transformer(tmp_path, torch.bfloat16, variant="fp16"), half)
    for wrong in ("../x", "", 16):
        with pytest.raises(ValueError, match="variant must be a short word"):
            load_transformer(tmp_path, variant=wrong)
    with pytest.raises(TypeError, match="dtype must be a floating torch.dtype"):
        load_transformer(tmp_path, torch.int32)
    assert load_transformer(tmp_path, device="meta", variant="fp16").proj_out.weight.is_meta


def test_at_most_the_model_and_one_tensor_in_memory(tmp_path):
    options = {**TINY, "num_layers": 8, "attention_head_dim": 16}
    save_transformer(ExpertTransformer(TransformerConfig(**options)), tmp_path, 50_000)
    for dtype in (None, torch.bfloat16):
        with RealBytes() as live:
            model = load_transformer(tmp_path, dtype)
        largest = max(p.numel() for p in model.parameters()) * 4
        assert live.peak <= module_bytes(model) + largest


def test_every_fault_is_reported_before_anything_is_read(tmp_path, monkeypatch):
    """Each tensor in turn is missing, renamed, of another shape, of another dtype."""
    save_transformer(ExpertTransformer(TransformerConfig(**{**TINY, "num_layers": 1})), tmp_path)
    whole = load_file(tmp_path / WEIGHTS)

    def never(*_):
        raise AssertionError("the report must come before any weight is read")

    monkeypatch.setattr(tensor_files.TensorFile, "read", never)
    for name, tensor in whole.items():
        rest = {key: value for key, value in whole.items() if key != name}
        shape, other = list(tensor.shape), [*tensor.shape[:0:-1], 1, tensor.shape[0]]
        faults = {
            "missing": (rest, f"{name}: expected {shape}; got nothing"),
            "renamed": (
                {**rest, name + "x": tensor},
                f"{name}x in {WEIGHTS}: expected nothing; got {shape}",
            ),
            "reshaped": (
                {**rest, name: tensor.reshape(other)},
                f"{name} in {WEIGHTS}: expected {shape}; got {other}",
            ),
            "retyped": (
                {**rest, name: tensor.to(torch.int32)},
                f"{name} in {WEIGHTS}: expected F64, F32, F16, BF16; got I32",
            ),
        }
        for fault, (damaged, wanted) in faults.items():
            save_file(damaged, tmp_path / WEIGHTS)
            with pytest.raises(CheckpointError) as raised:
                load_transformer(tmp_path)
            assert wanted in str(raised.value), fault
            assert str(tmp_path) in str(raised.value)


def test_the_report_is_short(tiny, tmp_path):
    save_transformer(tiny, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_layers": 1}))
    with pytest.raises(CheckpointError, match="24 unexpected") as raised:
        load_transformer(tmp_path)
    assert "… and 14 more" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 13


def test_an_index_must_agree_with_its_files(tiny, tmp_path):
    save_transformer(tiny, tmp_path, 8000)
    index = json.loads((tmp_path / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    name = next(key for key, shard in index["weight_map"].items() if shard == shards[0])
    first = load_file(tmp_path / shards[0])

    def refused(match):
        with pytest.raises(CheckpointError, match=match) as raised:
            load_transformer(tmp_path)
        assert name in str(raised.value)

    save_file({k: v for k, v in first.items() if k != name}, tmp_path / shards[0])
    refused(f"must be in {shards[0]}, as the index says; it is not there")
    save_file(first, tmp_path / shards[0])
    last = load_file(tmp_path / shards[-1])
    save_file({**last, name: first[name]}, tmp_path / shards[-1])
    refused("must be in one file; 2 hold it")
    save_file(last, tmp_path / shards[-1])
    del index["weight_map"][name]
    (tmp_path / INDEX).write_text(json.dumps(index))
    refused(f"must be in the index, because {shards[0]} holds it")
    os.remove(tmp_path / shards[0])
    with pytest.raises(CheckpointError, match=f"has no file {shards[0]}"):
        load_transformer(tmp_path)


def test_weights_that_are_not_finite_are_named_on_request(tiny, tmp_path):
    tiny.proj_out.weight.data[0, 1] = float("nan")
    tiny.norm_final.bias.data[:] = float("inf")
    save_transformer(tiny, tmp_path)
    assert load_transformer(tmp_path).proj_out.weight[0, 1].isnan()
    with pytest.raises(CheckpointError, match="2 tensors") as raised:
        load_transformer(tmp_path, check_finite=True)
    assert f"proj_out.weight in {WEIGHTS}: 1 of 256" in str(raised.value)
    assert f"norm_final.bias in {WEIGHTS}: 16 of 16" in str(raised.value)


def test_wrong_arguments_are_named(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="must be a folder"):
        load_transformer(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="must hold config.json, or a folder transformer/"):
        load_transformer(tmp_path)
    with pytest.raises(CheckpointError):
        load_transformer("a\0b")
    with pytest.raises(TypeError, match="model must be a CausalVAE"):
        save_vae(tiny, tmp_path)
    with pytest.raises(TypeError, match="model must be an ExpertTransformer"):
        save_transformer(torch.nn.Linear(1, 1), tmp_path)
    with pytest.raises(ValueError, match="max_shard_bytes must be a positive integer"):
        save_transformer(tiny, tmp_path, 0)
    with pytest.raises(ValueError, match="solver must be one of ddim, dpm"):
        save_scheduler(SchedulerConfig(), tmp_path, "euler")
    save_transformer(tiny, tmp_path)
    with pytest.raises(CheckpointError, match="_class_name must be AutoencoderKLCogVideoX"):
        load_vae(tmp_path)


def test_hostile_configs_are_refused_quickly_or_load(tiny, seed, tmp_path):
    """300 configs with one or two arbitrary values."""
    import resource
    import time

    save_transformer(tiny, tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    chance = random.Random(seed)
    hostile = [
        "-1", "0", "1", "2", "3", "65536", "1000000000", "1" + "0" * 5000, "1" + "0" * 30, "1e999",
        "-0.0", "4.0", "1e400", "NaN", "Infinity", "-Infinity", "null", "true", "false", '"16"',
        '""', "[]", "{}", "[16]", '"\\ud800"', "[" * 10000 + "]" * 10000, '{"a": 1, "a": 2}',
        '"' + "x" * 500_000 + '"', "0x10", "1" * 24, "1024", "1e-30",
    ]  # fmt: skip
    loaded, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(300):
        texts = {key: json.dumps(value) for key, value in good.items()}
        for key in chance.sample([*good, "no_such_key"], chance.choice([1, 1, 2])):
            texts[key] = chance.choice(hostile)
        text = "{" + ", ".join(f'"{key}": {value}' for key, value in texts.items()) + "}"
        (tmp_path / "config.json").write_text(text)
        start = time.perf_counter()
        try:
            load_transformer(tmp_path)
            loaded += 1
        except CheckpointError as error:
            assert str(tmp_path) in str(error)
            assert len(str(error)) < 5000
        assert time.perf_counter() - start < 1
    assert loaded < 150
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_layers": 10**9}, r"num_layers must be an integer in \[1, 1024\]"),
        ({"num_layers": 1024}, "num_layers must be at most 2"),
        ({"num_attention_heads": 65536, "attention_head_dim": 65536}, "weights must be at most"),
        ({"mlp_ratio": 999_999.0}, "weights must be at most"),
        ({"num_text_experts": 256, "num_video_experts": 256}, "weights must be at most"),
        ({"patch_size": 65536, "in_channels": 65536, "sample_height": 65536, "sample_width": 65536},
         "proj.weight in .*expected .16, 65536, 65536, 65536"),
    ],
)  # fmt: skip
def test_a_config_may_not_be_larger_than_the_files(changes, match, tiny, tmp_path):
    save_transformer(tiny, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with LiveBytes() as live, pytest.raises(CheckpointError, match=match):
        load_transformer(tmp_path)
    assert live.peak == 0 or "proj.weight" in match


def test_a_vae_may_not_be_larger_than_the_files(tmp_path):
    save_vae(CausalVAE(TINY_VAE), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, name in (
        ({"layers_per_block": 65536}, "layers_per_block"),
        ({"block_out_channels": [65536] * 16}, "block_out_channels"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(CheckpointError, match=f"{name} must be at most"):
            load_vae(tmp_path)


WIDE = {
    "norms": lambda name: "norm" in name,
    "last": lambda name: name.startswith(("proj_out", "decoder.conv_out")),
}


@pytest.mark.parametrize("shard", [10**9, 8000])
@pytest.mark.parametrize("wide", WIDE)
def test_mixed_dtypes_become_that_of_most_numbers(wide, shard, tiny, tmp_path):
    """As after a training that kept some layers in float32; a float64 buffer is one of them."""
    vae = randomised(CausalVAE(TINY_VAE))
    for model, save, load in (
        (tiny, save_transformer, load_transformer),
        (vae, save_vae, load_vae),
    ):
        expected = copy.deepcopy(model).to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.bfloat16()
            if WIDE[wide](name):
                parameter.data = parameter.data.float()
        save(model, tmp_path, shard)
        assert_same(load(tmp_path), expected)
        assert_same(load(tmp_path, torch.float32), model.float())  # not through bfloat16
        for path in tmp_path.iterdir():
            path.unlink()


def test_a_pipeline_of_parts_of_several_dtypes_and_variants(released, tmp_path):
    """Each part is read in its own, and what goes between them is converted."""
    folder = tmp_path / "model"
    shutil.copytree(released, folder)
    save_vae(load_vae(released, torch.float32), folder / "vae")
    clip = {"steps": 1, "num_frames": 9, "height": 32, "width": 32, "seed": 0}
    pipe = CogVideoX.from_pretrained(folder)
    assert next(pipe.vae.parameters()).dtype == torch.float32
    expected = pipe.generate("a", **clip)
    weights = folder / "vae" / WEIGHTS
    weights.rename(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(CheckpointError, match="vae: .*pass variant='fp16', which is what there"):
        CogVideoX.from_pretrained(folder)
    again = CogVideoX.from_pretrained(folder, variant="fp16")
    assert torch.equal(again.generate("a", **clip), expected)
    with pytest.raises(CheckpointError, match="transformer: .*leave variant out"):
        load_transformer(folder, variant="fp16")
    with pytest.raises(CheckpointError, match="must hold .*bf16"):
        CogVideoX.from_pretrained(folder, variant="bf16")
