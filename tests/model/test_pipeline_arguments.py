"""`generate`: names of arguments, generators, pictures; devices and dtypes of a pipeline."""

import inspect
import re
import warnings

import pytest
import torch
from diffusers.video_processor import VideoProcessor
from PIL import Image

from cogvx.config import PRESETS
from cogvx.generation import GenerationParams
from cogvx.pipeline import CogVideoX, default_dtype
from cogvx.pipeline.pictures import to_tensor

from .tiny_pipeline import (
    DIM,
    SIDE,
    embeds,
    picture,
    text_encoder,
    tiny,
)

SMALL = {"steps": 2, "num_frames": 9, "seed": 1}


def test_names_of_diffusers_are_taken():
    pipe, seen = tiny(), []
    ours = {"guidance": 3.0, "dynamic_guidance": True, "text_length": 4, "output": "latents"}
    wanted = pipe.generate("a", **SMALL, **ours, callback=lambda *now: seen.append(now[:2]))

    def callback(passed, step, timestep, tensors):
        assert passed is pipe and list(tensors) == ["latents"]
        assert (step, timestep) == seen[step]
        return tensors

    rest = {"num_frames": 9, "generator": torch.Generator().manual_seed(1)}
    came = pipe("a", num_inference_steps=2, guidance_scale=3.0, use_dynamic_cfg=True,
                max_sequence_length=4, output_type="latent", callback_on_step_end=callback,
                **rest)  # fmt: skip
    assert torch.equal(came, wanted)
    zero = {"callback_on_step_end": lambda *now: {"latents": torch.zeros_like(now[3]["latents"])}}
    assert pipe.generate("a", **SMALL, **zero, output="latents").abs().max() == 0
    assert "num_inference_steps" in inspect.getdoc(CogVideoX.generate)


def test_params_are_the_keyword_arguments():
    pipe, given = tiny(), {"steps": 2, "num_frames": 9, "seed": 1}
    wanted = pipe.generate("a", **given)
    assert torch.equal(pipe.generate(params=GenerationParams("a", **given)), wanted)
    params = GenerationParams("b", **{**given, "steps": 5})
    assert torch.equal(pipe.generate("a", params, steps=2), wanted)
    with pytest.raises(TypeError, match="params must be GenerationParams; got dict"):
        pipe.generate("a", given)
    names = list(inspect.signature(CogVideoX.generate).parameters)
    fields = list(inspect.signature(GenerationParams).parameters)
    assert names == ["self", "prompt", "params", *fields[1:]]
    text = inspect.getdoc(CogVideoX.generate)
    assert all(re.search(rf"^    (\w+, )*{name}[:,]", text, re.MULTILINE) for name in fields)


def test_solver_by_its_old_name():
    pipe = tiny()
    with pytest.warns(DeprecationWarning, match="scheduler is deprecated; use solver") as caught:
        old = pipe.generate("a", **SMALL, scheduler="dpm")
    assert caught[0].filename == __file__
    assert torch.equal(old, pipe.generate("a", **SMALL, solver="dpm"))
    with pytest.raises(TypeError, match="scheduler and solver are one argument; got both"):
        pipe.generate("a", scheduler="dpm", solver="dpm")


@pytest.mark.parametrize("mode", ["text", "image", "video"])
def test_each_video_of_its_own_generator(mode):
    """As if it had been made alone, with a solver that draws at every step."""
    pipe = tiny("5b-i2v" if mode == "image" else "5b")
    given = {"image": {"image": picture(1)}, "video": {"video": picture(2, 9)}}.get(mode, {})
    options = {"steps": 3, "solver": "dpm", "output": "latents"}
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    came = pipe.generate(["a", "b"], generator=generators, **given, **options)
    for n, prompt in enumerate("ab"):
        generator = [torch.Generator().manual_seed(5 + n)]
        alone = {name: source[-1:] if n else source[:1] for name, source in given.items()}
        one = pipe.generate(prompt, generator=generator, **alone, **options)
        torch.testing.assert_close(came[n : n + 1], one, rtol=0, atol=1e-5)


def test_several_videos_of_each_prompt():
    pipe = tiny("5b-i2v")
    images = {"image": picture(2)}
    came = pipe.generate(["a", "b"], num_videos_per_prompt=2, **images, **SMALL)
    assert pipe.text_encoder.seen == [["a", "b"], [""]]  # each text once
    doubled = {"image": picture(2).repeat_interleave(2, 0)}
    assert torch.equal(came, pipe.generate(["a", "a", "b", "b"], **doubled, **SMALL))
    both = embeds(2)
    came = pipe.generate(**both, num_videos_per_prompt=2, **images, **SMALL)
    both = {name: tensor.repeat_interleave(2, 0) for name, tensor in both.items()}
    assert torch.equal(came, pipe.generate(**both, **doubled, **SMALL))


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_pil_images_are_resized_as_in_diffusers(mode):
    pipe = tiny("5b-i2v")
    noise = torch.Generator().manual_seed(1)
    photo = Image.fromarray((255 * torch.rand(48, 48, 3, generator=noise)).byte().numpy())
    photo = photo.convert(mode)
    processor = VideoProcessor(vae_scale_factor=8)
    wanted = processor.preprocess(photo.convert("RGB"), height=SIDE, width=SIDE)
    torch.testing.assert_close(to_tensor("image", photo, SIDE, SIDE), wanted, rtol=0, atol=1e-6)
    clip = to_tensor("video", [photo] * 9, SIDE, SIDE)
    assert clip.shape == (1, 9, 3, SIDE, SIDE) and torch.equal(clip[0, 3], clip[0, 0])
    came = pipe.generate("a", image=photo, **SMALL)
    assert torch.equal(
        came, pipe.generate("a", image=to_tensor("image", photo, SIDE, SIDE), **SMALL)
    )


def test_arrays_are_pictures_too():
    pixels = torch.arange(SIDE * SIDE * 3).remainder(256).byte().view(SIDE, SIDE, 3)
    image = to_tensor("image", pixels.numpy(), SIDE, SIDE)
    assert torch.equal(image, (pixels.permute(2, 0, 1).float() / 127.5 - 1)[None])
    images = to_tensor("image", [pixels.numpy(), Image.fromarray(pixels.numpy())], SIDE, SIDE)
    assert torch.equal(images, image.expand(2, -1, -1, -1))
    assert to_tensor("image", pixels.numpy(), 16, 16).shape == (1, 3, 16, 16)
    clip = pixels.expand(9, -1, -1, -1).numpy()
    for video, batch in ((clip, 1), (list(clip), 1), ([clip, clip], 2), ([list(clip)] * 2, 2)):
        assert to_tensor("video", video, SIDE, SIDE).shape == (batch, 9, 3, SIDE, SIDE)
    came = tiny().generate("a", video=list(clip), steps=2, seed=1)
    assert came.shape == (1, 9, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match="video must be of videos of one length; got 9, 8 frames"):
        to_tensor("video", [list(clip), list(clip[:8])], SIDE, SIDE)
    with pytest.warns(UserWarning, match="image of 32x32 is stretched to 16x32.*crop it first"):
        to_tensor("image", pixels.numpy(), 16, SIDE)


def test_images_that_seem_to_be_in_0_to_1_are_warned_of():
    pipe = tiny("5b-i2v")
    with pytest.warns(UserWarning, match="image has no value below 0.*2 . image - 1") as caught:
        pipe.generate("a", image=picture(1) / 2 + 0.5, **SMALL)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.generate("a", image=picture(1), **SMALL)


def test_to_moves_every_part_and_repr_says_where_it_is():
    pipe = tiny()
    pipe.text_encoder = text_encoder(DIM)
    assert pipe.to("cpu", torch.bfloat16) is pipe
    assert {p.dtype for p in pipe.text_encoder.model.parameters()} == {torch.bfloat16}
    assert pipe.dtype == next(pipe.vae.parameters()).dtype == torch.bfloat16
    assert str(pipe.device) == "cpu" and pipe.to("cpu").dtype == torch.bfloat16
    count = sum(parameter.numel() for parameter in pipe.transformer.parameters())
    lines = repr(pipe).splitlines()
    assert lines[0] == "CogVideoX(text-to-video and video-to-video, 9 frames of 32x32 by default)"
    assert lines[1] == f"  transformer: ExpertTransformer, {count:,} parameters, bfloat16 on cpu"
    assert lines[3].startswith("  text_encoder: T5TextEncoder, ") and lines[4] == "  solver: ddim"
    assert pipe.to(torch.float32).dtype == torch.float32
    for wrong in ((torch.int8,), ("cpu", torch.int8), (torch.float16, torch.float16)):
        with pytest.raises(TypeError, match=r"CogVideoX.to: dtype must be"):
            pipe.to(*wrong)
    assert repr(tiny("5b-i2v")).startswith("CogVideoX(image-to-video, ")


def test_default_dtypes_are_those_of_publication():
    for name, dtype in (("2b", "float16"), ("5b", "bfloat16"), ("1.5-5b-i2v", "bfloat16")):
        config = PRESETS[name].transformer
        assert default_dtype(config) == default_dtype(config, "cuda:1") == getattr(torch, dtype)
        assert default_dtype(config, torch.device("cpu")) == torch.float32
