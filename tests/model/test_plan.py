"""The forecast against two independent measurements."""

import dataclasses
import json
import time

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from cogvx import frames as frame_rule
from cogvx.checkpoint.folder import transformer_values, vae_values
from cogvx.config import PRESETS, TransformerConfig, VAEConfig
from cogvx.memory import LiveBytes, module_bytes
from cogvx.plan import (
    GIB,
    MIB,
    Plan,
    PlanError,
    Stage,
    denoise_flops,
    forecast,
    size,
    vae_flops,
)
from cogvx.transformer import ExpertTransformer
from cogvx.vae import CausalVAE, DecodeState, Tiling
from cogvx_kernels import module_backend
from tests.harness.selection import rest

from . import tiny_pipeline

SMALL = {"block_out_channels": (16, 32, 32, 64), "norm_num_groups": 8, "layers_per_block": 1}
VAES = {
    "released": VAEConfig(**SMALL),
    "factorized": VAEConfig(**SMALL, factorized=True),
}
TRANSFORMERS = {
    "2b-like": TransformerConfig(
        num_attention_heads=4, attention_head_dim=16, num_layers=3, text_embed_dim=32,
        max_text_seq_length=16, sample_height=16, sample_width=24,
    ),
    "1.5-like": TransformerConfig(
        num_attention_heads=4, attention_head_dim=16, num_layers=3, text_embed_dim=32,
        max_text_seq_length=16, sample_height=16, sample_width=24, patch_size_t=2,
        patch_bias=False, use_rotary_positional_embeddings=True, in_channels=32,
        ofs_embed_dim=512, sample_frames=17,
    ),
    "experts": TransformerConfig(
        num_attention_heads=2, attention_head_dim=40, num_layers=2, text_embed_dim=32,
        max_text_seq_length=16, sample_height=16, sample_width=24, patch_size_t=1,
        use_rotary_positional_embeddings=True, num_text_experts=1, num_video_experts=1,
    ),
}  # fmt: skip


class Allocator:
    """The most that the CPU's allocator had given out, by the profiler: nothing of LiveBytes is in
    it. Moments inside a convolution do not count, because a plan leaves workspaces out."""

    def __enter__(self):
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *error):
        self.profile.__exit__(*error)
        events = self.profile.profiler.kineto_results.events()
        inside = [e for e in events if e.name() == "aten::convolution"]
        marks = [(e.start_ns(), 1, 1) for e in inside] + [(e.end_ns(), -1, -1) for e in inside]
        changes = [(e.start_ns(), 0, e.nbytes()) for e in events if e.name() == "[memory]"]
        live = depth = self.peak = 0
        for _, mark, change in sorted([*marks, *changes]):
            depth += mark
            live += 0 if mark else change
            if not depth:
                self.peak = max(self.peak, live)


def both(run):
    """(by LiveBytes, by the allocator) of a run; inputs are made inside."""
    with torch.no_grad():
        with LiveBytes() as live:
            run()
        with Allocator() as allocator:
            run()
    return live.peak, allocator.peak


def near(measured, forecasted):
    return all(value == pytest.approx(forecasted, rel=0.1) for value in measured)


@pytest.mark.parametrize("cfg", ["batch", "two_pass"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_step_of_the_transformer(name, cfg):
    config = TRANSFORMERS[name]
    plan = forecast(config, VAES["released"], frames=17, height=128, width=192, cfg=cfg,
                    dtype=torch.float32, backend="reference")  # fmt: skip
    with module_backend("reference"):
        model = ExpertTransformer(config)
    stage = plan.stage("denoise")
    assert stage.weights == module_bytes(model)
    copies = 2 if cfg == "batch" else 1
    frames = 5 + 5 % (config.patch_size_t or 1)

    def step():
        latents = torch.zeros(1, frames, config.in_channels, 16, 24)
        ofs = None if config.ofs_embed_dim is None else torch.tensor(2.0)
        text = model.project_text(torch.zeros(copies, 16, 32))
        ahead = model.modulations(torch.arange(50), ofs)
        model(torch.cat([latents] * copies), text, modulations=ahead.at(9))

    measured = both(step)
    assert near(measured, stage.activations), (measured, stage)


@pytest.mark.parametrize("frames", [1, 33])
@pytest.mark.parametrize("family", VAES)
def test_the_vae(family, frames):
    config = VAES[family]
    plan = forecast(
        None, config, frames=frames, height=32, width=48, dtype=torch.float32, backend="reference"
    )
    vae = CausalVAE(config)
    assert plan.stage("encode").weights + plan.stage("decode").weights == module_bytes(vae)
    measured = both(lambda: vae.encode(torch.zeros(1, frames, 3, 32, 48)))
    assert near(measured, plan.stage("encode").activations), (measured, plan.stage("encode"))
    latents = frame_rule.latent_frames(frames, config)
    measured = both(lambda: vae.decode(torch.zeros(1, latents, 16, 4, 6)))
    assert near(measured, plan.stage("decode").activations), (measured, plan.stage("decode"))


@pytest.mark.parametrize("family", ["released", rest("factorized")])
def test_streams(family):
    config = VAES[family]
    plan = forecast(
        None, config, frames=25, height=32, width=48, dtype=torch.float32, backend="reference"
    )
    vae = CausalVAE(config)

    def decode():
        pieces = (torch.zeros(1, n, 16, 4, 6) for n in plan.stage("decode").chunks)
        for _ in vae.stream_decode(pieces, total=7):
            pass

    def encode():
        pieces = (torch.zeros(1, n, 3, 32, 48) for n in plan.stage("encode").chunks)
        for _ in vae.stream_encode(pieces, total=25):
            pass

    for name, run in (("decode", decode), ("encode", encode)):
        measured = both(run)
        assert near(measured, plan.stage(name).streamed), (measured, plan.stage(name))


@pytest.mark.parametrize("family", [rest("released"), "factorized"])
def test_tiles(family):
    config, tiling = VAES[family], Tiling(32, 48)
    plan = forecast(None, config, frames=9, height=64, width=96, dtype=torch.float32,
                    backend="reference", tiling=tiling)  # fmt: skip
    vae = CausalVAE(config)
    with torch.no_grad():
        with LiveBytes() as live:
            vae.decode(torch.zeros(1, 3, 16, 8, 12), tiling=tiling)
        assert near([live.peak], plan.stage("decode").activations), (live.peak, plan)
        with LiveBytes() as live:
            vae.encode(torch.zeros(1, 9, 3, 64, 96), tiling=tiling)
        assert near([live.peak], plan.stage("encode").activations), (live.peak, plan)


def test_a_tiled_clip_no_larger_than_a_tile_is_not_tiled():
    options = {"frames": 17, "height": 64, "width": 64, "dtype": torch.float32}
    assert forecast(None, VAES["released"], **options) == forecast(
        None, VAES["released"], **options, tiling=Tiling()
    )


def test_the_cache_is_what_a_state_holds():
    config = VAES["released"]
    plan = forecast(
        None, config, frames=33, height=32, width=48, dtype=torch.float32, backend="reference"
    )
    vae, state, held = CausalVAE(config), DecodeState(), []
    with torch.no_grad():
        pieces = (torch.zeros(1, n, 16, 4, 6) for n in plan.stage("decode").chunks)
        for _ in vae.stream_decode(pieces, state, total=9):
            held.append(state.nbytes)
    assert max(held) == plan.stage("decode").cache > 0


def test_two_layers_are_as_many_as_there_are():
    config = TRANSFORMERS["2b-like"]
    deep = dataclasses.replace(config, num_layers=7)
    shallow, deeper = (
        forecast(c, VAES["released"], frames=17, height=256, width=384, backend="reference").stage(
            "denoise"
        )
        for c in (config, deep)
    )
    of_four_layers = 4 * 12 * config.hidden_size * 2  # bytes of their modulations at a step
    assert deeper.activations == shallow.activations + 50 * of_four_layers
    assert shallow.weights < deeper.weights
    with module_backend("reference"):
        model = ExpertTransformer(deep).to(torch.bfloat16)
    with torch.no_grad(), LiveBytes() as live:
        latents = torch.zeros(1, 5, 16, 32, 48, dtype=torch.bfloat16)
        text = model.project_text(torch.zeros(2, 16, 32, dtype=torch.bfloat16))
        ahead = model.modulations(torch.arange(50))
        model(torch.cat([latents] * 2), text, modulations=ahead.at(9)).float()
    assert live.peak == pytest.approx(deeper.activations, rel=0.01)


def test_modulations_of_a_small_clip_are_its_largest_moment():
    """Their weights are copied while they are made, which a small clip does not hide."""
    config = dataclasses.replace(TRANSFORMERS["2b-like"], num_layers=30)
    plan = forecast(config, VAES["released"], frames=1, height=16, width=16, dtype=torch.float32,
                    guidance=False, backend="reference")  # fmt: skip
    with module_backend("reference"):
        model = ExpertTransformer(config)
    with torch.no_grad(), LiveBytes() as live:
        ahead = model.modulations(torch.arange(50))
        assert ahead.values.shape == (50, 12 * 30 + 2, config.hidden_size)
        assert live.now == ahead.values.nbytes
    norms = [p for name, p in model.named_parameters() if ".linear." in name]
    assert live.peak > sum(p.nbytes for p in norms)
    assert plan.stage("denoise").activations == pytest.approx(live.peak, rel=0.01)


def test_a_stream_does_not_grow():
    short, long = (
        forecast(None, VAES["released"], frames=n, height=64, width=64, encoded=0).stage("decode")
        for n in (33, 321)
    )
    assert (short.streamed, short.cache) == (long.streamed, long.cache)
    assert long.activations > short.activations


def test_released_models_in_seconds():
    """Bytes of the caches that the released decoders need, and the tokens of their sequences."""
    preset = PRESETS["5b"]
    start = time.monotonic()
    plan = forecast(
        preset.transformer, preset.vae, frames=49, height=480, width=720, text_bytes=9 * GIB
    )
    assert time.monotonic() - start < 30
    assert plan.latent_frames == 13 and plan.video_tokens == 17550 and plan.text_tokens == 226
    decode = plan.stage("decode")
    assert decode.chunks == (3, 2, 2, 2, 2, 2)
    assert 2600 * MIB < decode.cache < 2680 * MIB
    assert plan.stage("denoise").weights == 2 * 5_570_283_072
    assert plan.weights == sum(stage.weights for stage in plan.stages)
    assert plan.total == plan.weights + decode.activations
    assert [stage.name for stage in plan.stages] == ["text", "denoise", "decode"]


def test_the_largest_decoder_cache():
    vae = PRESETS["1.5-5b"].vae
    plan = forecast(None, vae, frames=25, height=768, width=1360, encoded=0)
    assert 8000 * MIB < plan.stage("decode").cache < 8098 * MIB


def test_an_image_is_encoded_where_the_model_takes_one():
    plan = forecast(TRANSFORMERS["1.5-like"], VAES["released"], frames=17, height=128, width=192)
    assert plan.stage("encode").chunks == (1,)
    assert plan.latent_frames == 5 and plan.video_tokens == 3 * 8 * 12  # one latent is padding


def test_what_cannot_fit_is_refused_by_name():
    config, vae = TRANSFORMERS["2b-like"], VAES["released"]
    options = {"frames": 9, "height": 128, "width": 192}
    plan = forecast(config, vae, **options)
    plan.check(plan.total)
    message = (
        r"plan: decode must fit into .* for 9 frames of 128x192; it needs .*What helps: tiling"
    )
    with pytest.raises(PlanError, match=message):
        plan.check(plan.total - 1)
    with pytest.raises(PlanError, match="What helps: fewer bytes a weight"):
        plan.check(plan.weights - 1)
    with pytest.raises(PlanError, match=message):
        forecast(config, vae, **options, budget=plan.total - 1)
    tiled = forecast(config, vae, **options, tiling=Tiling(64, 96), budget=plan.total - 1)
    assert tiled.total < plan.total


def test_what_is_no_clip_is_refused():
    for wrong, message in (
        ({"frames": 12}, "1, 8k or 8k"),
        ({"height": 136}, "multiple of 16"),
        ({"cfg": "both"}, "cfg must be"),
    ):
        options = {"frames": 17, "height": 128, "width": 192, **wrong}
        with pytest.raises(ValueError, match=message):
            forecast(TRANSFORMERS["2b-like"], VAES["released"], **options)


def test_it_can_be_read_by_people_and_programs():
    plan = Plan(9, 64, 64, 1, 3, 16, 48, (Stage("decode", 3 * GIB, MIB, MIB, 512, (3, 2, 2)),))
    assert "decode     3.00 GiB        1 MiB      1 MiB" in str(plan) and "3, 2 x 2" in str(plan)
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["total"] == 3 * GIB + MIB and values["stages"][0]["chunks"] == [3, 2, 2]
    assert size(3 * GIB // 2) == "1.50 GiB" and size(MIB) == "1 MiB"


def test_operations_are_those_of_diffusers():
    """Convolutions, products of matrices and attention, counted by torch as diffusers runs them."""
    vae = VAEConfig(
        latent_channels=2, block_out_channels=(16, 32, 32, 64), layers_per_block=2,
        norm_num_groups=4, sample_height=32, sample_width=32,
    )  # fmt: skip
    config = tiny_pipeline.transformer_config("5b", num_attention_heads=4, sample_width=16)
    with torch.no_grad(), torch.device("meta"):
        autoencoder = AutoencoderKLCogVideoX.from_config(vae_values(vae))
        transformer = CogVideoXTransformer3DModel.from_config(transformer_values(config))
        counted = []
        for run in (
            lambda: autoencoder.decode(torch.empty(1, 2, 5, 4, 6)),
            lambda: autoencoder.encode(torch.empty(1, 3, 17, 32, 48)),
            lambda: transformer(
                torch.empty(1, 3, 4, 4, 16), torch.empty(1, 6, 16), torch.empty(1),
                image_rotary_emb=(torch.empty(48, 16), torch.empty(48, 16)),
            ),
        ):  # fmt: skip
            with FlopCounterMode(display=False) as counter:
                run()
            counted.append(counter.get_total_flops())
    made = [
        vae_flops(vae, 5, 4, 6, decode=True),
        vae_flops(vae, 5, 4, 6, decode=False),
        denoise_flops(config, 3, 4, 16),
    ]
    assert made == pytest.approx(counted, rel=0.05)
