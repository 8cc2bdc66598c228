"""Arguments that `generate` refuses before anything is computed; parts that do not fit together."""

import numpy as np
import pytest
import torch

from cogvx.config import PRESETS
from cogvx.generation import GenerationParams
from cogvx.pipeline import CogVideoX
from cogvx.pipeline.params import resolve
from cogvx.transformer import ExpertTransformer
from cogvx.vae import CausalVAE, Tiling

from .tiny_pipeline import (
    SCHEDULER,
    SIDE,
    Words,
    embeds,
    picture,
    tiny,
    transformer_config,
    vae_config,
)

WRONG = {
    "neither prompt": ({"prompt": None}, "prompt must be given, or else prompt_embeds; got nei"),
    "both prompts": ({**embeds()}, "prompt must be given, or else prompt_embeds; got both"),
    "no prompts": ({"prompt": []}, "prompt must be at least one text"),
    "numbers": ({"prompt": [1]}, "prompt must be text or a list of texts"),
    "negatives": ({"negative_prompt": ["a", "b"]}, "negative_prompt must be one text, or 1"),
    "zeros": ({"negative_prompt": "a", "uncond": "zeros"}, "negative_prompt must be empty with"),
    "no frames": ({"num_frames": 0}, "num_frames must have 1, 8k or 8k . 1 frames, nearest 1; got"),
    "no height": ({"height": 0}, "height must be a multiple of 16, nearest 16; got 0$"),
    "no text": ({"text_length": 0}, "text_length must be at least 1; got 0"),
    "guidance": ({"guidance": float("nan")}, "guidance must be a finite number; got nan"),
    "frames": ({"num_frames": 12}, "num_frames must have 1, 8k or 8k . 1 frames, nearest 9 or 16"),
    "height": ({"height": 40}, "generate: height must be a multiple of 16, nearest 32 or 48; got"),
    "width": ({"width": 8}, "generate: width must be a multiple of 16, nearest 16; got 8$"),
    "image": ({"image": picture(1)}, "image must be None; got one: this is a text- and video-to"),
    "two sources": ({"image": picture(1), "video": picture(1, 9)}, "image must be None where a"),
    "steps": ({"steps": 0}, r"generate: steps must be an integer in \[1, 1000\]; got 0"),
    "many steps": ({"steps": 1001}, r"generate: steps must be an integer in \[1, 1000\]; got 1001"),
    "half steps": ({"steps": 1.5}, "steps must be an integer; got 1.5"),
    "text for a size": ({"width": "32"}, "width must be an integer; got '32'"),
    "no number": ({"guidance": "6"}, "guidance must be a number; got '6'"),
    "strength": ({"video": picture(1, 9), "strength": 0.01}, "strength must be at least 1/50 for "
                 "50 steps, so that one is made, or steps at least 100; got 0.01"),
    "strength of one step": ({"video": picture(1, 9), "steps": 1}, "strength must be at least 1 "
                             "for 1 step, so that one is made, or steps at least 2; got 0.8"),
    "no strength": ({"video": picture(1, 9), "strength": 0}, "strength must be above 0 and at mos"),
    "too strong": ({"video": picture(1, 9), "strength": 1.5}, "strength must be above 0 and at m"),
    "tiling": ({"tiling": Tiling(10, 16)}, "tiling must have a height .* multiple of 8.*; got 10"),
    "video height": ({"video": picture(1, 9)[..., :24, :]}, "video must have a height .*got 24"),
    "bytes": ({"video": picture(1, 9).byte()}, r"got uint8 .*; video.float\(\) / 127.5 - 1"),
    "a path": ({"video": "a.mp4"}, "got str; PIL images are taken too, and cogvx.video.read_video"),
    "pixels": ({"video": 127 * (picture(1, 9) + 1)}, "got values from .* / 127.5 - 1 brings"),
    "copies": ({"num_videos_per_prompt": 0}, "num_videos_per_prompt must be at least 1; got 0"),
    "generators": ({"generator": [torch.Generator()] * 2}, "one for each of 1 videos; got 2"),
    "no generator": ({"generator": [1]}, "generator must be a torch.Generator or .*got int"),
    "two names": ({"steps": 2, "num_inference_steps": 2}, "num_inference_steps of diffusers and"),
    "a typo": ({"num_inference_step": 2}, "unknown argument .*did you mean num_inference_steps"),
    "none of ours": ({"eta": 0.0}, "eta of diffusers has no counterpart here; leave it out"),
    "output type": ({"output_type": "pil"}, 'output_type must be "latent".*got .pil.*write_video'),
    "solver": ({"solver": "euler"}, "solver must be one of ddim, dpm; got 'euler'"),
    "cfg": ({"cfg": "none"}, "cfg must be one of batch, two_pass"),
    "uncond": ({"uncond": "none"}, "uncond must be one of prompt, zeros"),
    "scale": ({"image_latent_scale": "x"}, "image_latent_scale must be one of diffusers, sat, tr"),
    "output": ({"output": "pil"}, "output must be one of video, latents"),
    "seeds": ({"seed": 1, "generator": torch.Generator()}, "seed must be None beside a generator"),
    "latents": ({"latents": torch.zeros(1, 3, 4, 4, 5)}, r"= \(1, 3, 4, 4, 4\); got float32 \(1,"),
    "video dims": ({"video": picture(9)}, r"video must be a tensor \(batch, frames, 3, height, w"),
    "video range": ({"video": 3 * picture(1, 9)}, r"video must be in \[-1, 1\]; got values from"),
    "video frames": ({"video": picture(1, 12)}, "video must have 1, 8k or 8k . 1 frames"),
    "video length": ({"video": picture(1, 9), "num_frames": 17}, "num_frames must be the video's"),
    "video size": ({"video": picture(1, 9), "height": 64}, "height must be the video's, 32 .res"),
    "videos": ({"video": picture(2, 9)}, "video must be one, or one for each of 1 prompts; got 2"),
    "noise": ({"video": picture(1, 9), "latents": torch.zeros(1)}, "latents must be None where a"),
    "checkpoints": ({"checkpoint_every": 2}, "checkpoint_every must be at least 1, and save_late"),
    "folder": ({"save_latents": "/nowhere/a.safetensors"}, "save_latents must be a file in a fo"),
    "no place": ({"save_latents": "/proc/a.safetensors"}, "save_latents must be where a file can"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_before_anything_is_computed(name):
    options, match = WRONG[name]
    pipe = tiny()
    with pytest.raises((ValueError, TypeError, OSError), match=match):
        pipe.generate(**{"prompt": "a", "num_frames": None, **options})
    assert pipe.text_encoder.seen == []


def test_configs_are_enough_to_know_a_request():
    """Refused by a command before it reads gigabytes of weights."""
    preset = PRESETS["1.5-5b"]
    request = resolve(preset.transformer, preset.vae, GenerationParams("a"))
    assert request.shape == (1, 22, 16, 96, 170) and request.padding == 1
    assert (request.num_frames, request.height, request.width) == (81, 768, 1360)
    for options, match in (
        ({"steps": 2000}, "steps must be an integer"),
        ({"width": 1000}, "width must be a multiple of 16"),
        ({"num_frames": 50}, "num_frames must have"),
        ({"tiling": Tiling(100, 100)}, "tiling must have a height"),
        ({"guidance": float("inf")}, "guidance must be a finite number"),
        ({"solver": "euler"}, "solver must be one of"),
        ({}, r"steps must be an integer in \[1, 40\]; got 50"),
    ):
        more = {} if options else {"num_train_timesteps": 40}
        with pytest.raises(ValueError, match=match):
            resolve(preset.transformer, preset.vae, GenerationParams("a", **options), **more)


def test_image_models_refuse_what_is_no_image():
    pipe = tiny("5b-i2v")
    for options, match in (
        ({}, "image must be given; got none: this is an image-to-video model"),
        ({"video": picture(1, 9)}, "image must be given"),
        ({"image": "photo.png"}, r"image must be a tensor \(batch, 3, height, width\).*got str"),
        ({"image": picture(1).long()}, "image must be a tensor"),
        (
            {"image": np.zeros((SIDE, SIDE, 3))},
            r"of uint8.*got an array \(32, 32, 3\) of fl",
        ),
        ({"image": np.zeros((SIDE, SIDE, 4), np.uint8)}, r"got an array \(32, 32, 4\) of uint8"),
        ({"image": 255 * picture(1)}, r"image must be in \[-1, 1\]"),
        ({"image": float("nan") * picture(1)}, r"image must be in \[-1, 1\]; got values from nan"),
        ({"image": picture(3)}, "image must be one, or one for each of 1 prompts; got 3"),
        ({"image": picture(1)[..., :16]}, "32x32, the only size that this model's learned posit"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            pipe.generate("a", **options)


def test_embeddings_of_another_shape_are_refused():
    words = embeds()["prompt_embeds"]
    for wrong in ({"prompt_embeds": words[..., :8]}, {**embeds(), "prompt_embeds": words[:, :4]}):
        with pytest.raises(ValueError, match=r"must be \(batch, text_len, text_embed_dim\) = "):
            tiny().generate(**wrong)
    both = {"negative_prompt": "a", **embeds()}
    with pytest.raises(ValueError, match="negative_prompt must be empty where negative_prompt_em"):
        tiny().generate(**both)


def test_parts_that_do_not_fit_are_refused():
    transformer = ExpertTransformer(transformer_config("5b"))
    vae = CausalVAE(vae_config("5b"))
    with pytest.raises(ValueError, match="vae must have the transformer's 4 latent channels"):
        CogVideoX(transformer, CausalVAE(vae_config("5b", latent_channels=8)), SCHEDULER)
    odd = ExpertTransformer(transformer_config("5b", in_channels=5))
    with pytest.raises(ValueError, match="4 channels in, as out, or twice as many.*got 5"):
        CogVideoX(odd, vae, SCHEDULER)
    encoder = Words()
    encoder.dim = 8
    with pytest.raises(ValueError, match="text_encoder must have .* text_embed_dim 16; got 8"):
        CogVideoX(transformer, vae, SCHEDULER, encoder)
    with pytest.raises(ValueError, match="solver must be one of ddim, dpm; got euler"):
        CogVideoX(transformer, vae, SCHEDULER, solver="euler")
