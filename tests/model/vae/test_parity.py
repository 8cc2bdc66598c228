"""The released VAE equals diffusers' AutoencoderKLCogVideoX: keys, values, chunk plans, tiles."""

import copy

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from cogvx import frames
from cogvx.config import PRESETS, VAEConfig
from cogvx.vae import CausalVAE, DiagonalGaussian, Tiling

RELATIVE = 1e-5
TINY = dict(
    block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
)
CONFIGS = {
    "tiny": TINY,
    "widths": {**TINY, "block_out_channels": (8, 12, 12, 16), "layers_per_block": 2},
    "ratio-1": {**TINY, "temporal_compression_ratio": 1},
    "ratio-2": {**TINY, "temporal_compression_ratio": 2},
    "ratio-8": {**TINY, "temporal_compression_ratio": 8},
    "eps": {**TINY, "norm_eps": 1e-3},
    "narrow": {**TINY, "block_out_channels": (4, 4, 4, 4), "norm_num_groups": 1},
    "three-levels": {**TINY, "block_out_channels": (8, 8, 16)},
}


def pair(name="tiny"):
    """(diffusers' VAE, ours) with the same random weights."""
    options = CONFIGS[name]
    levels = len(options["block_out_channels"])
    torch.manual_seed(0)
    theirs = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * levels,
        up_block_types=("CogVideoXUpBlock3D",) * levels,
        **options,
    ).eval()
    for parameter in theirs.parameters():  # a fresh norm is the identity, which would hide it
        parameter.data += 0.1 * torch.randn(parameter.shape)
    ratio = options.get("temporal_compression_ratio", 4)
    theirs.num_sample_frames_batch_size = 2 * ratio
    ours = CausalVAE(VAEConfig(**options, num_sample_frames_batch_size=2 * ratio))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.fixture(scope="module")
def tiny():
    return pair()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def apart(ours, theirs):
    """The largest difference, in units of the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def their_decode(vae, latents):
    return vae.decode(latents.transpose(1, 2)).sample.transpose(1, 2)


def their_encode(vae, video):
    return vae.encode(video.transpose(1, 2)).latent_dist.parameters.transpose(1, 2)


@pytest.mark.parametrize("latents", range(1, 14))
def test_decode_equals_diffusers_for_every_number_of_latents(tiny, latents):
    theirs, ours = tiny
    z = torch.randn(1, latents, 4, 2, 3)
    video = ours.decode(z)
    assert video.shape[1] == (4 * latents - 3 if latents % 2 else 4 * latents)
    assert apart(video, their_decode(theirs, z)) < RELATIVE


@pytest.mark.parametrize("count", (1, 8, 9, 16, 17, 25, 33, 49))
def test_encode_equals_diffusers_for_every_valid_number_of_frames(tiny, count):
    theirs, ours = tiny
    video = torch.randn(1, count, 3, 16, 24)
    assert apart(ours.encode(video).moments, their_encode(theirs, video)) < RELATIVE


@pytest.mark.parametrize("options", ({"algo": "conv2d"}, {"fold": False}), ids=str)
def test_every_convolution_algorithm_equals_diffusers(options):
    theirs, ours = pair("widths")
    ours.set_convolutions(**options)
    z = torch.randn(2, 3, 4, 3, 2)
    video = torch.randn(2, 9, 3, 24, 16)
    assert apart(ours.decode(z), their_decode(theirs, z)) < RELATIVE
    assert apart(ours.encode(video).moments, their_encode(theirs, video)) < RELATIVE


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_equals_diffusers(name):
    theirs, ours = pair(name)
    z = torch.randn(2, 5, 4, 3, 2)
    video = torch.randn(2, frames.video_frames(5, ours.config), 3, 24, 16)
    assert apart(ours.decode(z), their_decode(theirs, z)) < RELATIVE
    assert apart(ours.encode(video).moments, their_encode(theirs, video)) < RELATIVE


def test_with_gradients_values_equal_diffusers_too(tiny):
    theirs, ours = tiny
    z = torch.randn(1, 5, 4, 2, 3)
    with torch.enable_grad():
        video = ours.decode(z)
        moments = ours.encode(video).moments
    assert video.requires_grad and moments.requires_grad
    assert apart(video, their_decode(theirs, z)) < RELATIVE
    assert apart(moments, their_encode(theirs, video)) < RELATIVE


@pytest.mark.parametrize("latents", (3, 4))
def test_bfloat16_error_is_at_most_twice_diffusers(latents):
    theirs, ours = pair("widths")
    z = torch.randn(1, latents, 4, 3, 4).bfloat16()
    video = torch.randn(1, frames.video_frames(latents), 3, 24, 32).bfloat16()
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    exact = copy.deepcopy(ours).double()
    for mine, other, fp64 in (
        (ours.decode(z), their_decode(theirs, z), exact.decode(z.double())),
        (
            ours.encode(video).moments,
            their_encode(theirs, video),
            exact.encode(video.double()).moments,
        ),
    ):
        assert mine.dtype is torch.bfloat16
        mine, other = mine.double() - fp64, other.double() - fp64
        assert mine.abs().max() <= 2 * other.abs().max()
        assert mine.square().mean() <= 4 * other.square().mean()


@pytest.mark.parametrize("height, width", ((248, 400), (96, 368), (424, 104), (208, 360)))
def test_default_tiles_equal_diffusers(height, width):
    """Rows and columns of tiles, edges of a few latents, and a frame that needs no cut."""
    theirs, ours = pair("narrow")
    theirs.enable_tiling()
    z = torch.randn(1, 1, 4, height // 8, width // 8)
    video = torch.randn(1, 1, 3, height, width)
    assert apart(ours.decode(z, tiling=Tiling()), their_decode(theirs, z)) < RELATIVE
    assert (
        apart(ours.encode(video, tiling=Tiling()).moments, their_encode(theirs, video)) < RELATIVE
    )


def test_small_tiles_equal_diffusers_over_several_chunks(tiny):
    theirs, ours = copy.deepcopy(tiny[0]), tiny[1]
    theirs.enable_tiling(32, 40, 0.25, 0.2)
    z = torch.randn(2, 5, 4, 9, 10)
    video = torch.randn(1, 17, 3, 72, 80)
    tiling = Tiling(32, 40, 0.25, 0.2)
    assert apart(ours.decode(z, tiling=tiling), their_decode(theirs, z)) < RELATIVE
    assert apart(ours.encode(video, tiling=tiling).moments, their_encode(theirs, video)) < RELATIVE


def test_slicing_equals_single_clips(tiny):
    ours = tiny[1]
    z, video = torch.randn(3, 3, 4, 2, 3), torch.randn(3, 9, 3, 16, 24)
    alone = torch.cat([ours.decode(clip) for clip in z.split(1)])
    assert torch.equal(ours.decode(z, slicing=True), alone)
    assert apart(alone, ours.decode(z)) < RELATIVE
    alone = torch.cat([ours.encode(clip).moments for clip in video.split(1)])
    assert torch.equal(ours.encode(video, slicing=True).moments, alone)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_samples_of_a_seed_equal_diffusers(dtype):
    theirs, ours = pair()
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    video = torch.randn(2, 9, 3, 16, 24).to(dtype)
    posterior = ours.encode(video)
    distribution = type(theirs.encode(video.transpose(1, 2)).latent_dist)
    same = distribution(posterior.moments.transpose(1, 2))
    for name in ("mean", "logvar", "std"):
        assert torch.equal(getattr(posterior, name), getattr(same, name).transpose(1, 2)), name
    drawn = posterior.sample(torch.Generator().manual_seed(3))
    expected = same.sample(torch.Generator().manual_seed(3)).transpose(1, 2)
    assert torch.equal(drawn, expected) and drawn.dtype is dtype
    assert torch.equal(posterior.mode(), posterior.mean)
    torch.manual_seed(4)
    drawn = posterior.sample()
    torch.manual_seed(4)
    assert torch.equal(drawn, same.sample().transpose(1, 2))


def test_log_variance_is_clamped():
    moments = torch.tensor([0.0, 0.0, 100.0, -100.0]).reshape(1, 1, 4, 1, 1)
    assert DiagonalGaussian(moments).logvar.flatten().tolist() == [20.0, -30.0]


def test_kl_equals_torch_for_each_clip():
    posterior = DiagonalGaussian(torch.randn(3, 2, 8, 4, 5))
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), kl.sum(dim=(1, 2, 3, 4)))
    assert DiagonalGaussian(torch.zeros(1, 1, 2, 1, 1)).kl().tolist() == [0.0]


def test_the_released_vae_has_its_keys_shapes_and_parameters():
    """docs/model.md, section 4.11."""
    with torch.device("meta"):
        theirs = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(128, 256, 256, 512),
        )
        for preset in PRESETS.values():
            ours = CausalVAE(preset.vae)
            shapes = {key: x.shape for key, x in ours.state_dict().items()}
            assert shapes == {key: x.shape for key, x in theirs.state_dict().items()}
    assert len(shapes) == 436
    assert sum(p.numel() for p in ours.parameters()) == 215_583_907
    assert sum(p.numel() for p in ours.encoder.parameters()) == 92_215_456
    assert sum(p.numel() for p in ours.decoder.parameters()) == 123_368_451


def test_gradients_equal_those_of_diffusers(tiny):
    theirs, ours = copy.deepcopy(tiny)
    z = torch.randn(1, 5, 4, 2, 2)
    with torch.enable_grad():
        for model, decode, encode in (
            (theirs, lambda z: their_decode(theirs, z), lambda v: their_encode(theirs, v)),
            (ours, ours.decode, lambda v: ours.encode(v).moments),
        ):
            model.zero_grad()
            encode(decode(z)).square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = expected[name].grad.abs().max()
        assert (parameter.grad - expected[name].grad).abs().max() <= 1e-4 * scale + 1e-9, name
