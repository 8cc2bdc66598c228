"""Public functions of the factorised family: options and defaults."""

import inspect

import pytest
import torch

import cogvx
from cogvx import build, build_transformer, build_vae
from cogvx.vae import CausalVAE

# The sizes of the first design's tests (`docs/model.md`, section 8.2).
SMALL_VAE = {
    "in_channels": 2,
    "latent_channels": 2,
    "num_frames": 5,
    "spatial_downsample": 2,
    "temporal_downsample": 2,
    "base_channels": 4,
}
SMALL_TRANSFORMER = {
    "hidden_size": 32,
    "num_heads": 4,
    "num_layers": 2,
    "num_frames": 5,
    "text_hidden_size": 16,
    "mlp_ratio": 2.0,
    "latent_channels": 2,
}


def test_a_video_goes_through_the_vae_and_back():
    torch.manual_seed(0)
    encoder, decoder = build_vae(**SMALL_VAE)
    video = torch.rand(1, 5, 2, 4, 4) * 2 - 1
    with torch.no_grad():
        latents = cogvx.encode_video(encoder, video)
        back = cogvx.decode_latent(decoder, latents)
    assert latents.shape == (1, 3, 2, 2, 2)
    assert back.shape == video.shape
    assert latents.isfinite().all() and back.isfinite().all()


@pytest.mark.parametrize(("frames", "latents"), [(49, 13), (1, 1), (9, 3)])
def test_forty_nine_frames_are_thirteen_latents_are_forty_nine_frames(frames, latents):
    encoder, decoder = build_vae(base_channels=8)
    with torch.no_grad():
        z = cogvx.encode_video(encoder, torch.rand(1, frames, 3, 16, 24))
        assert z.shape == (1, latents, 16, 2, 3)
        assert cogvx.decode_latent(decoder, z).shape == (1, frames, 3, 16, 24)


@pytest.mark.parametrize("patch_size", [(1, 2, 2), (2, 2, 2), (1, 1, 1), (1, 4, 4)])
def test_the_prediction_has_the_shape_of_the_latents(patch_size):
    torch.manual_seed(0)
    model = build_transformer(**SMALL_TRANSFORMER, patch_size=patch_size)
    latents = torch.randn(2, 2, 2, 4, 8)
    with torch.no_grad():
        out = model(latents, torch.randn(2, 3, 16), torch.tensor([999, 10]))
    assert out.shape == latents.shape
    assert out.isfinite().all()


def test_gradients_reach_every_parameter_of_the_transformer():
    torch.manual_seed(0)
    experts = {"num_text_experts": 2, "num_video_experts": 2, "expert_top_k": 2}
    model = build_transformer(**SMALL_TRANSFORMER, **experts)
    for parameter in model.parameters():  # what begins at zero would hide what is behind it
        torch.nn.init.normal_(parameter, std=0.1)
    out = model(torch.randn(1, 3, 2, 4, 4), torch.randn(1, 40, 16), torch.tensor([500]))
    out.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # What text becomes in the last block nobody reads, so its last feed-forward learns nothing.
    assert without and all(n.startswith("transformer_blocks.1.ff.text") for n in without), without


def test_the_count_is_exact_and_allocates_nothing():
    model = build_transformer(**SMALL_TRANSFORMER, num_video_experts=2)
    exact = sum(p.numel() for p in model.parameters())
    assert cogvx.param_count(**SMALL_TRANSFORMER, num_video_experts=2) == exact
    pipe = cogvx.build(**{**SMALL_VAE, **SMALL_TRANSFORMER})
    assert cogvx.param_count(pipe) == cogvx.param_count(pipe.transformer)
    assert cogvx.param_count(pipe) == cogvx.param_count(**SMALL_TRANSFORMER)
    assert cogvx.param_count(torch.nn.Linear(2, 3)) == 9
    for wrong in ({"model": "5b"}, {"model": pipe, "num_layers": 2}):
        with pytest.raises(TypeError, match="param_count: model must be a torch module or a CogV"):
            cogvx.param_count(**wrong)
    default = cogvx.param_count()  # of 42 layers, 1920 wide: gigabytes if they were allocated
    assert default == cogvx.param_count(**cogvx.recommended_defaults())
    assert cogvx.param_count(num_layers=43) - default == cogvx.param_count(
        num_layers=2
    ) - cogvx.param_count(num_layers=1)


def test_the_recommended_defaults_are_the_defaults():
    parameters = {
        **inspect.signature(build_vae).parameters,
        **inspect.signature(build_transformer).parameters,
    }
    for name, value in cogvx.recommended_defaults().items():
        assert parameters[name].default == value, name


def test_frequencies_are_sin_then_cos_and_t_major():
    sin, cos = cogvx.rope3d_freqs(4, 3, 2)
    assert sin.shape == cos.shape == (24, 20)
    assert sin.dtype == cos.dtype == torch.float32
    assert torch.allclose(sin.square() + cos.square(), torch.ones_like(sin))
    # head dim 40: 4 pairs turn with time, 8 with height, 8 with width; token (2, 1, 1)
    token, inverse = (2 * 3 + 1) * 2 + 1, 10000.0 ** -(torch.arange(8) / 8)
    expected = torch.cat([2 * 10000.0 ** -(torch.arange(4) / 4), inverse, inverse])
    assert torch.allclose(sin[token], expected.sin(), atol=1e-6)
    assert cogvx.rope3d_freqs(1, 1, 1, hidden_size=128, num_heads=2)[0].shape == (1, 32)


def test_build_gives_the_whole_pipeline():
    pipeline = build(
        **SMALL_VAE, **{k: v for k, v in SMALL_TRANSFORMER.items() if k not in SMALL_VAE}
    )
    assert isinstance(pipeline.vae, CausalVAE)
    assert pipeline.transformer.config.in_channels == pipeline.vae.config.latent_channels == 2


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (build_vae, {"num_frames": 50}, "num_frames must have 1 . 4k frames, nearest 49 or 53"),
        (build_vae, {"spatial_downsample": 6}, "spatial_downsample must be a power of two; got 6"),
        (build_vae, {"temporal_downsample": 16}, "temporal_downsample must be at most"),
        (build_transformer, {"num_heads": 7}, "num_heads must divide hidden_size 1920; got 7"),
        (build_transformer, {"patch_size": (1, 2, 4)}, "patch_size must be .*height and width"),
        (build_transformer, {"num_text_experts": 0}, "must both be 0"),
        (build_transformer, {"expert_top_k": 3}, "expert_top_k must be at most"),
        (cogvx.rope3d_freqs, {"time": 1, "height": 1, "width": 1, "num_heads": 7}, "num_heads"),
        (cogvx.rope3d_freqs, {"time": 0, "height": 1, "width": 1}, "grid must be positive"),
    ],
)
def test_wrong_options_are_refused_by_name(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(**options)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="unknown option 'hiden_size'; it takes base_channels"):
        cogvx.param_count(hiden_size=3)
