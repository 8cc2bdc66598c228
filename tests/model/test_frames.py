"""The frame rule, against the counts of diffusers (`docs/model.md`, section 4.7)."""

import pytest

from cogvx import frames
from cogvx.config import VAEConfig

FACTORIZED = VAEConfig(
    factorized=True, num_sample_frames_batch_size=4, num_latent_frames_batch_size=1
)
LATENTS_OF = {1: 1, 8: 2, 9: 3, 17: 5, 25: 7, 33: 9, 49: 13, 81: 21, 161: 41}
FRAMES_OF = {1: 1, 2: 8, 3: 9, 4: 16, 12: 48, 13: 49, 20: 80, 21: 81, 22: 88, 41: 161}


@pytest.mark.parametrize(("video", "latents"), LATENTS_OF.items())
def test_frames_to_latents(video, latents):
    assert frames.latent_frames(video) == latents


@pytest.mark.parametrize(("latents", "video"), FRAMES_OF.items())
def test_latents_to_frames(latents, video):
    assert frames.video_frames(latents) == video


@pytest.mark.parametrize("config", [VAEConfig(), FACTORIZED], ids=["released", "factorized"])
def test_a_valid_clip_comes_back_as_long_as_it_was(config):
    valid = [n for n in range(-3, 200) if frames.is_valid(n, config)]
    assert len(valid) > 40
    for n in valid:
        assert frames.video_frames(frames.latent_frames(n, config), config) == n


@pytest.mark.parametrize("config", [VAEConfig(), FACTORIZED], ids=["released", "factorized"])
def test_plans_cover_the_clip(config):
    for n in range(1, 90):
        assert sum(frames.decode_plan(n, config)) == n
        if frames.is_valid(n, config):
            plan = frames.encode_plan(n, config)
            assert sum(plan) == n
            latents = frames.decode_plan(frames.latent_frames(n, config), config)
            assert len(plan) == len(latents)


def test_what_remains_goes_into_the_first_chunk():
    assert frames.encode_plan(49) == (9, 8, 8, 8, 8, 8)
    assert frames.encode_plan(81) == (9, *(8,) * 9)
    assert frames.decode_plan(13) == (3, 2, 2, 2, 2, 2)
    assert frames.decode_plan(21) == (3, *(2,) * 9)
    assert frames.decode_plan(22) == (2,) * 11
    assert frames.decode_plan(1) == (1,)


def test_the_factorised_vae_takes_the_first_frame_alone():
    assert frames.encode_plan(17, FACTORIZED) == (1, 4, 4, 4, 4)
    assert frames.decode_plan(5, FACTORIZED) == (1, 1, 1, 1, 1)


@pytest.mark.parametrize("config", [VAEConfig(), FACTORIZED], ids=["released", "factorized"])
def test_the_nearest_valid_counts_are_the_nearest(config):
    valid = [n for n in range(1, 300) if frames.is_valid(n, config)]
    for n in range(-5, 200):
        below = max((v for v in valid if v < n), default=None)
        above = min(v for v in valid if v > n)
        expected = (n,) if n in valid else tuple(v for v in (below, above) if v is not None)
        assert frames.nearest_valid(n, config) == expected


def test_errors_name_the_rule_and_the_nearest():
    message = r"encode: video must have 1, 8k or 8k \+ 1 frames, nearest 49 or 56; got 52"
    with pytest.raises(ValueError, match=message):
        frames.check("encode", "video", 52)
    with pytest.raises(ValueError, match=r"1 \+ 4k frames, nearest 13 or 17; got 16"):
        frames.check("encode", "video", 16, FACTORIZED)
    message = (
        "decode: video must have a width that is a multiple of 16, nearest 80 or 96; got 64x90"
    )
    with pytest.raises(ValueError, match=message):
        frames.check_size("decode", "video", 64, 90, 16)
    with pytest.raises(ValueError, match="nearest 16; got 0x90"):
        frames.check_size("decode", "video", 0, 90, 16)
