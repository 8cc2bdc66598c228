"""diffusers' CogVideoX, small and random, and what it gives."""

import contextlib
import copy

import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from cogvx.checkpoint.folder import vae_values
from tests.model.tiny_pipeline import (
    CHANNELS,
    DIM,
    TEXT_LEN,
    embeds,
    picture,
    randomised,
    theirs,
    tiny,
    vae_config,
)

HEADDIM = 16
FRAMES, SIDE = 3, 4  # of latents
NEAR = 1e-5  # relative, in fp32, of two orders of the same sums through a whole model


def pipeline(kind="5b", mode="text", solver="ddim"):
    return theirs(tiny(kind), mode, solver)


def transformer(kind="5b"):
    return pipeline(kind).transformer


def vae():
    return pipeline().vae


def small_vae():
    """A decoder of two levels, the first of which doubles time: every kind of layer."""
    config = vae_config(
        "5b", block_out_channels=(8, 8), temporal_compression_ratio=2,
        num_sample_frames_batch_size=4,
    )  # fmt: skip
    return randomised(AutoencoderKLCogVideoX.from_config(vae_values(config)))


def inputs(model, batch=2, frames=FRAMES, dtype=torch.float32, seed=0):
    """Arguments of one call of a transformer."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    config = model.config
    rows = config.patch_size_t or 1
    frames += -frames % rows
    arguments = {
        "hidden_states": random(batch, frames, config.in_channels, SIDE, SIDE),
        "encoder_hidden_states": random(batch, TEXT_LEN, DIM),
        "timestep": torch.tensor([7, 500][:batch]),
    }
    if config.use_rotary_positional_embeddings:
        grid = (SIDE // 2, SIDE // 2)
        arguments["image_rotary_emb"] = get_3d_rotary_pos_embed(
            HEADDIM, ((0, 0), grid), grid, frames // rows, grid_type="slice", max_size=grid
        )
    if config.ofs_embed_dim:
        arguments["ofs"] = torch.full((1,), 2.0, dtype=dtype)
    return arguments


def predicted(model, **options):
    with torch.no_grad():
        return model(**inputs(model), **options).sample


def latents(frames=5, batch=1, side=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, CHANNELS, frames, side, side + 2, generator=generator).to(dtype)


def clip(frames=9, batch=1, side=32):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, frames, side, side + 16, generator=generator)


def generate(pipe, mode="text", **options):
    """Two steps of a pipeline: the video."""
    given = {"image": (picture(1) + 1) / 2} if mode == "image" else {}
    clip = [(picture(9) + 1) / 2]
    if mode in ("video", "control"):
        given = {"video" if mode == "video" else "control_video": clip}
    else:
        given |= {"num_frames": 9}
    arguments = {
        "height": 32,
        "width": 32,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(4),
        "output_type": "pt",
        **embeds(),
        **given,
        **options,
    }
    return pipe(**arguments).frames


def double(model):
    return copy.deepcopy(model).double()


def relative(ours, fp64):
    return float((ours.double() - fp64).norm() / fp64.norm())


@contextlib.contextmanager
def assert_untouched(model):
    """Afterwards every module has the attributes that it had, and the very same ones."""
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    yield
    for name, module in model.named_modules():
        now = vars(module)
        assert now.keys() == before[name].keys(), name
        assert all(now[key] is before[name][key] for key in now), name
