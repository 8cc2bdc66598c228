"""Every kind of model against diffusers' pipelines, with the same weights and random numbers."""

import pytest
import torch

from .tiny_pipeline import SIDE, embeds, picture, theirs, tiny

CASES = [  # kind, mode, frames
    ("2b", "text", 9),
    ("5b", "text", 9),
    ("5b", "text", 17),
    ("1.5", "text", 9),  # 3 latents: one of padding
    ("1.5", "text", 8),
    ("5b-i2v", "image", 9),
    ("1.5-i2v", "image", 9),
    ("1.5-i2v", "image", 8),
    ("2b", "video", 9),
    ("5b", "video", 9),
    ("1.5", "video", 8),
]


def both(kind, mode, frames, solver, steps=5, guidance=6.0, dynamic=False, batch=1, **options):
    """Pairs, ours and theirs: the latents after each step, at last the video."""
    pipe = tiny(kind)
    other = theirs(pipe, mode, solver)
    given = {**embeds(batch), "steps": steps, "guidance": guidance, "dynamic_guidance": dynamic}
    kwargs = {
        **embeds(batch),
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "use_dynamic_cfg": dynamic,
        "height": SIDE,
        "width": SIDE,
    }
    if mode != "video":
        given["num_frames"] = kwargs["num_frames"] = frames
    if mode == "image":
        given["image"] = picture(batch)
        kwargs["image"] = given["image"] / 2 + 0.5
    if mode == "video":
        given["video"] = picture(batch, frames)
        kwargs["video"] = list(given["video"][0] / 2 + 0.5)
        given["strength"] = kwargs["strength"] = 0.7
    ours, other_s = [], []

    def keep(pipe, step, timestep, tensors):
        other_s.append(tensors["latents"])
        return {}

    video = pipe.generate(
        solver=solver,
        generator=torch.Generator().manual_seed(3),
        callback=lambda step, timestep, latents: ours.append(latents),
        **given,
        **options,
    )
    expected = other(
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        callback_on_step_end=keep,
        **kwargs,
    ).frames
    assert len(ours) == len(other_s)
    yield from zip(ours, other_s, strict=True)
    yield video, 2 * expected - 1


def assert_close(came, expected):
    """fp32 in another order of sums, through a few steps: 1e-5 of the largest value."""
    assert came.shape == expected.shape and came.dtype == torch.float32
    atol = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(came, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("solver", ["ddim", "dpm"])
@pytest.mark.parametrize("kind, mode, frames", CASES)
def test_equals_diffusers(kind, mode, frames, solver):
    *_, (latents, _), (video, _) = pairs = list(both(kind, mode, frames, solver))
    for came, expected in pairs:
        assert_close(came, expected)
    assert len(pairs) == (4 if mode == "video" else 6)
    assert video.shape == (1, frames, 3, SIDE, SIDE)
    assert latents.shape[1] == -(-frames // 4) + (kind.startswith("1.5") and frames == 9)
    assert (video.abs() < 1).float().mean() > 0.9  # it is not the clamp that was compared


@pytest.mark.parametrize("solver", ["ddim", "dpm"])
@pytest.mark.parametrize(
    "options",
    [
        {"guidance": 1.0},
        {"dynamic": True},
        {"steps": 1},
        {"steps": 7, "compat": True},
        {"steps": 60, "compat": True},
        {"cfg": "two_pass"},
        {"batch": 2},
    ],
    ids=str,
)
def test_options_equal_diffusers(solver, options):
    for came, expected in both("5b", "text", 9, solver, **options):
        assert_close(came, expected)


@pytest.mark.parametrize("kind", ["5b-i2v", "1.5-i2v"])
def test_images_in_a_batch_equal_diffusers(kind):
    for came, expected in both(kind, "image", 9, "dpm", batch=2, dynamic=True):
        assert_close(came, expected)


def test_without_compat_60_steps_end_without_noise():
    """The correction shows: the last x0 is the video, and diffusers' is not quite."""
    *_, (video, expected) = both("5b", "text", 9, "dpm", steps=60)
    assert (video - expected).abs().max() > 1e-4 * expected.abs().max()
