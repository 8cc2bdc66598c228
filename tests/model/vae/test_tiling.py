"""Tiles cover the frame, whatever their size, or are refused before any work."""

import random

import pytest
import torch

from cogvx.config import VAEConfig
from cogvx.vae import CausalVAE, Tiling
from cogvx.vae.tiling import tiled

CONFIG = VAEConfig(
    block_out_channels=(4, 4, 4, 4), latent_channels=2, layers_per_block=1, norm_num_groups=1
)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def meta():
    config = VAEConfig(
        block_out_channels=(2, 2, 2), latent_channels=2, layers_per_block=1, norm_num_groups=1
    )
    with torch.device("meta"):
        return CausalVAE(config)


@pytest.mark.parametrize("seed", range(120))
def test_any_tiling_gives_the_right_size_or_a_value_error(meta, seed):
    rng = random.Random(seed)
    height, width = (4 * rng.randint(1, 8) for _ in "hw")
    multiple = rng.choice((4, 4, 4, 1))
    tiling = Tiling(
        *(multiple * rng.randint(8 // multiple, 36 // multiple) for _ in "hw"),
        *(rng.choice((0.0, 1 / 6, 0.2, 0.5, 0.75, 0.7 * rng.random())) for _ in "hw"),
    )
    video = torch.empty(1, 1, 3, height, width, device="meta")
    z = torch.empty(1, 1, 2, height // 4, width // 4, device="meta")
    if tiling.height % 4 or tiling.width % 4:
        for call, x in ((meta.encode, video), (meta.decode, z)):
            with pytest.raises(ValueError, match="tiling must have a .* multiple of 4"):
                call(x, tiling=tiling)
    else:
        assert meta.encode(video, tiling=tiling).mean.shape == z.shape
        assert meta.decode(z, tiling=tiling).shape == video.shape


@pytest.mark.parametrize("overlap", (0.0, 1 / 6, 0.2, 0.5, 0.8))
@pytest.mark.parametrize("size", (1, 2, 5, 6, 11))
def test_blended_tiles_of_a_pointwise_function_equal_it(overlap, size):
    """If tiles agree, blending changes nothing and every pixel comes from its own place."""
    x = torch.randn(1, 2, 3, 8 * size, 8 * (size + 1), dtype=torch.float64)
    tiling = Tiling(40, 24, overlap, overlap)
    torch.testing.assert_close(tiled(lambda tile: tile.clone(), x, tiling, 8, (8, 8)), x)


def test_zero_overlap():
    """Tiles side by side, each decoded alone."""
    torch.manual_seed(0)
    vae = CausalVAE(CONFIG)
    z = torch.randn(1, 3, 2, 4, 6)
    video = vae.decode(z, tiling=Tiling(16, 24, 0.0, 0.0))
    for top in (0, 2):
        for left in (0, 3):
            alone = vae.decode(z[..., top : top + 2, left : left + 3])
            place = video[..., 8 * top : 8 * top + 16, 8 * left : 8 * left + 24]
            assert torch.equal(place, alone)


def test_frames_no_larger_than_a_tile_are_not_cut():
    vae = CausalVAE(CONFIG)
    z = torch.randn(1, 2, 2, 4, 4)
    assert torch.equal(vae.decode(z, tiling=Tiling(32, 32)), vae.decode(z))


@pytest.mark.parametrize(
    "options, error",
    (
        ({"overlap_height": 1.0}, ValueError),
        ({"overlap_width": -0.1}, ValueError),
        ({"overlap_width": float("nan")}, ValueError),
        ({"height": 0}, ValueError),
        ({"width": -8}, ValueError),
        ({"width": 8.0}, TypeError),
        ({"height": True}, TypeError),
        ({"overlap_height": "a sixth"}, TypeError),
    ),
)
def test_invalid_tiling_is_refused(options, error):
    with pytest.raises(error, match=f"Tiling: {next(iter(options))} must be "):
        Tiling(**options)


def test_progress_counts_chunks_of_all_tiles_and_clips():
    vae = CausalVAE(CONFIG)
    seen = []
    z = torch.randn(2, 5, 2, 4, 4)
    vae.decode(
        z, tiling=Tiling(16, 16, 0.5, 0.0), slicing=True, progress=lambda *at: seen.append(at)
    )
    total = 2 * (4 * 2) * 2  # clips, tiles, chunks of 3 and 2 latents
    assert seen == [(n, total) for n in range(total + 1)]


def test_gradients_flow_through_blended_tiles():
    torch.manual_seed(0)
    vae = CausalVAE(CONFIG)
    with torch.enable_grad():
        z = torch.randn(1, 3, 2, 4, 4, requires_grad=True)
        vae.decode(z, tiling=Tiling(16, 16, 0.5, 0.5)).square().mean().backward()
    assert z.grad.abs().amin() > 0


@pytest.mark.parametrize("tiling", (None, Tiling(32, 32)))
def test_under_autocast_floating_dtypes_may_differ_from_the_weights(tiling):
    """As with torch's layers: values are rounded to autocast's dtype first."""
    vae = CausalVAE(CONFIG)
    video, latents = torch.randn(1, 9, 3, 48, 48), torch.randn(1, 3, 2, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        (mean, clip), *others = (
            (
                vae.encode(video.to(dtype), tiling=tiling).mean,
                vae.decode(latents.to(dtype), tiling=tiling),
            )
            for dtype in (torch.float32, torch.bfloat16)
        )
    for other_mean, other_clip in others:
        torch.testing.assert_close(other_mean.float(), mean.float(), rtol=0.02, atol=0.02)
        torch.testing.assert_close(other_clip.float(), clip.float(), rtol=0.02, atol=0.02)
