"""`generate`: sizes, options, callbacks, and one video for one seed."""

import json
import warnings
from itertools import groupby

import pytest
import torch
from diffusers import CogVideoXPipeline

from cogvx.generation import CHOICES
from cogvx.pipeline import CogVideoX, cogvideox
from cogvx.pipeline.conditioning import decode
from cogvx.pipeline.params import default_size
from cogvx.schedulers import NoiseSchedule
from cogvx.transformer import ExpertTransformer
from cogvx.vae import CausalVAE
from cogvx_kernels import module_backend

from .tiny_pipeline import (
    CHANNELS,
    DIM,
    SCHEDULER,
    SIDE,
    TEXT_LEN,
    Words,
    embeds,
    picture,
    randomised,
    tiny,
    transformer_config,
    vae_config,
)

SMALL = {"steps": 2, "num_frames": 9, "seed": 1}


def test_one_seed_one_video():
    pipe = tiny()
    video = pipe.generate("a panda", **SMALL)
    assert video.shape == (1, 9, 3, SIDE, SIDE) and video.dtype == torch.float32
    assert video.min() >= -1 and video.max() <= 1 and not video.requires_grad
    torch.rand(3)  # whatever else is drawn
    again = pipe.generate("a panda", **SMALL)
    assert torch.equal(video, again)
    by_generator = {**SMALL, "seed": None, "generator": torch.Generator().manual_seed(1)}
    assert torch.equal(video, pipe.generate("a panda", **by_generator))
    assert not torch.equal(video, pipe.generate("a panda", **{**SMALL, "seed": 2}))
    assert not torch.equal(video, pipe.generate("a bear", **SMALL))


def test_without_a_seed_torch_draws_one():
    pipe, unseeded = tiny(), {**SMALL, "seed": None}
    torch.manual_seed(5)
    one, two = pipe.generate("a", **unseeded), pipe.generate("a", **unseeded)
    assert not torch.equal(one, two)
    torch.manual_seed(5)
    assert torch.equal(one, pipe.generate("a", **unseeded))


@pytest.mark.parametrize("mode", ["text", "image", "video"])
def test_two_passes_equal_one_batch(mode):
    pipe = tiny("1.5-i2v" if mode == "image" else "5b")
    given = {"text": {}, "image": {"image": picture(1)}, "video": {"video": picture(1, 9)}}[mode]
    together, apart = (
        pipe.generate("a", **{**SMALL, "num_frames": None}, **given, cfg=cfg, output="latents")
        for cfg in ("batch", "two_pass")
    )
    # fp32 sums of another order, guidance of 6, two steps.
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)


def test_texts_are_encoded_once():
    pipe = tiny()
    pipe.generate(["a", "b"], negative_prompt="c", **SMALL)
    assert pipe.text_encoder.seen == [["a", "b"], ["c"]]
    pipe.text_encoder.seen.clear()
    pipe.generate(["a", "b"], negative_prompt=["c", "d"], **SMALL)
    assert pipe.text_encoder.seen == [["a", "b"], ["c", "d"]]
    pipe.text_encoder.seen.clear()
    pipe.generate("a", guidance=1.0, **SMALL)
    assert pipe.text_encoder.seen == [["a"]]


def test_embeddings_are_as_good_as_texts():
    pipe = tiny()
    words, nothing = (Words().encode([text], TEXT_LEN) for text in ("a panda", ""))
    expected = pipe.generate("a panda", **SMALL)
    pipe.text_encoder = None
    came = pipe.generate(prompt_embeds=words, negative_prompt_embeds=nothing, **SMALL)
    assert torch.equal(came, expected)


def test_uncond_of_zeros_is_that_of_sat():
    pipe = tiny()
    words = Words().encode(["a panda"], TEXT_LEN)
    zeros = {"prompt_embeds": words, "negative_prompt_embeds": torch.zeros_like(words)}
    came = pipe.generate("a panda", uncond="zeros", **SMALL)
    assert pipe.text_encoder.seen == [["a panda"]]
    assert torch.equal(came, pipe.generate(**zeros, **SMALL))


def test_image_latents_have_three_scales_in_1_5_and_one_in_1_0():
    image = picture(1)
    for kind, count in (("1.5-i2v", 3), ("5b-i2v", 1)):
        pipe = tiny(kind)
        videos = {
            name: pipe.generate("a", image=image, image_latent_scale=name, **SMALL)
            for name in CHOICES["image_latent_scale"]
        }
        distinct = {tuple(video.flatten().tolist()) for video in videos.values()}
        assert len(distinct) == count
    # "train" of 1.5 is what 1.0 does with the same weights.
    pipe, plain = tiny("1.5-i2v"), tiny("1.5-i2v")
    plain.vae.config = vae_config("5b")
    expected = plain.generate("a", image=image, **SMALL)
    came = pipe.generate("a", image=image, image_latent_scale="train", **SMALL)
    assert torch.equal(came, expected)


def test_one_image_or_video_serves_all_prompts():
    pipe = tiny("5b-i2v")
    came = pipe.generate(["a", "b"], image=picture(1), **SMALL)
    assert came.shape == (2, 9, 3, SIDE, SIDE) and not torch.equal(came[0], came[1])
    pipe = tiny()
    came = pipe.generate(["a", "b"], video=picture(1, 9), steps=2, seed=1)
    assert came.shape == (2, 9, 3, SIDE, SIDE) and not torch.equal(came[0], came[1])


def test_text_length_may_change_where_positions_do_not_count():
    pipe = tiny("5b")
    pipe.generate("a", text_length=TEXT_LEN - 2, **SMALL)
    pipe.generate("a", text_length=TEXT_LEN + 3, **SMALL)
    for kind in ("2b", "5b-i2v"):
        given = {"image": picture(1)} if kind == "5b-i2v" else {}
        with pytest.raises(ValueError, match=f"text_length must be {TEXT_LEN}"):
            tiny(kind).generate("a", text_length=TEXT_LEN - 2, **given, **SMALL)


def test_sizes_come_from_the_config_or_the_source():
    pipe = tiny("5b")
    assert pipe.generate("a", steps=1).shape == (1, 9, 3, SIDE, SIDE)
    assert pipe.generate("a", steps=1, height=16, width=48).shape == (1, 9, 3, 16, 48)
    source = picture(1, 1)[..., :16, :]
    assert pipe.generate("a", video=source, steps=2).shape == (1, 1, 3, 16, SIDE)
    pipe = tiny("1.5-i2v")
    assert pipe.generate("a", image=picture(1), steps=1).shape[1] == 9


def test_a_sample_size_of_300_is_not_a_size_to_generate():
    """The size that 1.5's converter writes bounds a table; nobody wants 2400x2400."""
    config = transformer_config("1.5", sample_height=300, sample_width=300)
    assert default_size(config, vae_config("1.5")) == (768, 1360)


@pytest.mark.parametrize("frames, latents", [(1, 2), (8, 2), (9, 4), (16, 4), (17, 6)])
def test_1_5_pads_to_whole_patches_and_drops_what_it_padded(frames, latents):
    pipe = tiny("1.5")
    shapes = []
    video = pipe.generate(
        "a",
        steps=1,
        num_frames=frames,
        seed=1,
        callback=lambda step, timestep, x: shapes.append(x.shape[1]),
    )
    assert shapes == [latents] and video.shape[1] == frames
    padded = pipe.generate("a", steps=1, num_frames=frames, seed=1, output="latents")
    assert padded.shape[1] == latents
    drop = latents - -(-frames // 4)
    assert torch.equal(video, decode(pipe.vae, padded[:, drop:]))


def test_1_5_takes_a_video_of_odd_latents():
    """diffusers refuses it; the padding is the first latent again, as in training."""
    pipe, video = tiny("1.5"), picture(1, 9)
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    came = pipe.generate("a", video=video, steps=50, strength=0.02, guidance=1.0, seed=1)
    assert came.shape == video.shape
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        latents = 0.7 * pipe.vae.encode(video).sample(generator)
    latents = torch.cat([latents[:, :1], latents], 1)
    noise = torch.randn(latents.shape, generator=generator)
    assert torch.equal(calls[0], NoiseSchedule(SCHEDULER).add_noise(latents, noise, 19))


def test_strength_keeps_the_video_as_much_as_it_says():
    pipe, video = tiny("5b"), picture(1, 9)
    calls = []
    pipe.generate("a", video=video, steps=10, strength=0.3, callback=lambda *a: calls.append(a[:2]))
    assert calls == [(0, 299), (1, 199), (2, 99)]


def test_guidance_of_one_asks_once():
    pipe = tiny()
    batches = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    pipe.generate("a", guidance=1.0, **SMALL)
    pipe.generate("a", guidance=1.5, **SMALL)
    pipe.generate("a", guidance=1.5, cfg="two_pass", **SMALL)
    assert batches == [1, 1, 2, 2, 1, 1, 1, 1]


def test_callback_sees_every_step_and_may_change_it():
    pipe, seen = tiny(), []

    def callback(step, timestep, latents):
        seen.append((step, timestep, tuple(latents.shape)))
        return torch.zeros_like(latents).double() if step == 1 else None

    came = pipe.generate("a", **SMALL, callback=callback, output="latents")
    assert seen == [(0, 999, (1, 3, CHANNELS, 4, 4)), (1, 499, (1, 3, CHANNELS, 4, 4))]
    assert came.dtype == torch.float32 and came.abs().max() == 0


@pytest.mark.parametrize("mode", ["text", "image", "video"])
def test_progress_tells_of_every_stage(mode):
    pipe = tiny("5b-i2v" if mode == "image" else "5b")
    given = {"image": {"image": picture(1)}, "video": {"video": picture(2, 17)}}.get(mode, {})
    prompts = ["a", "b"] if mode == "video" else "a"
    calls = []
    frames = {} if mode == "video" else {"num_frames": 17}
    pipe.generate(prompts, steps=4, **frames, **given, progress=lambda *now: calls.append(now))
    stages = {stage: [now[1:] for now in group] for stage, group in groupby(calls, lambda t: t[0])}
    names = (
        ["text", "denoise", "decode"] if mode == "text" else ["text", "encode", "denoise", "decode"]
    )
    assert list(stages) == names
    assert stages["text"] == [(0, 2), (1, 2), (2, 2)]
    steps = 3 if mode == "video" else 4
    assert stages["denoise"] == [(n, steps) for n in range(steps + 1)]
    assert stages["decode"] == [(0, 2), (1, 2), (2, 2)]  # 5 latents in chunks of 3 and 2
    if mode != "text":
        # of two videos, each in two chunks, the second begins where the first ends
        done, count = ([0, 1], 1) if mode == "image" else ([0, 1, 2, 2, 3, 4], 4)
        assert stages["encode"] == [(n, count) for n in done]


def poison(module, value=float("nan")):
    weight = next(module.parameters()).data
    weight[(0,) * weight.dim()] = value


def test_the_first_bad_stage_is_named(tmp_path):
    pipe = tiny()
    pipe.text_encoder.encode = lambda prompts, length: torch.full((1, length, DIM), float("inf"))
    with pytest.raises(FloatingPointError, match="the text encoder gave NaN or infinity"):
        pipe.generate("a", **SMALL)
    pipe = tiny()
    poison(pipe.vae.encoder)
    with pytest.raises(FloatingPointError, match="the VAE's encoder gave NaN or infinity"):
        pipe.generate("a", video=picture(1, 9))
    pipe = tiny()

    def callback(step, timestep, latents):
        if step == 1:
            poison(pipe.transformer)

    with pytest.raises(FloatingPointError, match="step 3 of 5, timestep 599, gave NaN .*float32"):
        pipe.generate("a", steps=5, num_frames=9, callback=callback)
    pipe = tiny()
    poison(pipe.vae.decoder, float("inf"))
    with pytest.raises(FloatingPointError, match="decode gave NaN or infinity"):
        pipe.generate("a", **SMALL, save_latents=tmp_path / "kept.safetensors")
    assert (tmp_path / "kept.safetensors").is_file()  # what a failed decode does not cost


def test_large_models_in_float16_are_warned_of(monkeypatch):
    monkeypatch.setattr(cogvideox, "LARGE", 32)
    pipe = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.generate("a", **SMALL)
        pipe.transformer.bfloat16()
        pipe.generate("a", **SMALL)
    pipe.transformer.half()
    with pytest.warns(
        UserWarning, match="in float16 they overflow: a black video, or NaN; .*dtype=torch.bfloat16"
    ):
        pipe.generate("a", **SMALL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype):
    pipe, other = tiny(), tiny()
    other.transformer.to(dtype)
    other.vae.to(dtype)
    latents, half = (
        p.generate("a", guidance=2.0, **SMALL, output="latents") for p in (pipe, other)
    )
    assert half.dtype == dtype
    # Noise of another dtype is other noise: the two have no number in common but their sizes.
    assert half.shape == latents.shape
    given = {"latents": torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))}
    one, two = (p.generate("a", guidance=2.0, **SMALL, **given) for p in (pipe, other))
    assert two.dtype == torch.float32
    # Two layers, two steps and a decoder, in 8 bits of mantissa; the videos' spread is 0.3.
    assert (one - two).abs().mean() < 0.05


def test_given_latents_are_the_noise():
    pipe = tiny()
    noise = torch.randn(1, 3, CHANNELS, 4, 4)
    one, two = (pipe.generate("a", steps=2, latents=noise, seed=seed) for seed in (1, 2))
    assert torch.equal(one, two)
    kept = noise.clone()
    pipe.generate("a", steps=2, latents=noise, solver="dpm")
    assert torch.equal(noise, kept)


def test_nothing_is_left_for_the_garbage_collector_to_train():
    pipe = tiny()
    pipe.generate("a", **SMALL)
    assert all(parameter.grad is None for parameter in pipe.transformer.parameters())
    assert torch.is_grad_enabled()


def test_factorised_model_with_experts():
    config = transformer_config("1.5", patch_size_t=1, num_text_experts=1, num_video_experts=2)
    vae = vae_config(
        "5b",
        factorized=True,
        num_sample_frames_batch_size=4,
        num_latent_frames_batch_size=1,
    )
    with module_backend("reference"):
        transformer = ExpertTransformer(config)
    pipe = CogVideoX(randomised(transformer), randomised(CausalVAE(vae)), SCHEDULER, Words())
    assert pipe.generate("a", steps=2, num_frames=13, seed=1).shape == (1, 13, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match=r"1 \+ 4k frames, nearest 5 or 9; got 8"):
        pipe.generate("a", num_frames=8)


def test_saved_and_loaded(tmp_path):
    pipe = tiny(solver="dpm")
    expected = pipe.generate("a", **SMALL)
    pipe.save_pretrained(tmp_path)
    again = CogVideoX.from_pretrained(tmp_path, backend="reference", text_encoder=Words())
    assert again.solver == "dpm" and again.scheduler == pipe.scheduler
    assert torch.equal(again.generate("a", **SMALL), expected)
    assert CogVideoX.from_pretrained(tmp_path).text_encoder is None
    # And diffusers reads the folder.
    other = CogVideoXPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    other.set_progress_bar_config(disable=True)
    given = {**embeds(), "num_frames": 9, "generator": torch.Generator().manual_seed(1)}
    latents = other(**given, num_inference_steps=2, output_type="latent").frames
    given["generator"].manual_seed(1)
    came = again.generate(**given, steps=2, output="latents")
    torch.testing.assert_close(came, latents, rtol=0, atol=1e-5)


def test_a_text_encoder_in_the_index_must_be_there(tmp_path):
    tiny().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder"] == [None, None]
    index["text_encoder"] = ["transformers", "T5EncoderModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="text_encoder/ is missing"):
        CogVideoX.from_pretrained(tmp_path)
    assert CogVideoX.from_pretrained(tmp_path, text_encoder=False).text_encoder is None
    with pytest.raises(ValueError, match="text_encoder must be there to encode a prompt"):
        CogVideoX.from_pretrained(tmp_path, text_encoder=False).generate("a")


def test_plan_is_of_this_model():
    plan = tiny("1.5").plan(num_frames=17, guidance=False)
    assert (plan.frames, plan.height, plan.width) == (17, SIDE, SIDE)
    assert plan.video_tokens == 3 * 2 * 2  # 5 latents and one of padding, two of time a token
    assert tiny().plan().frames == 9
