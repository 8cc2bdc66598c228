"""HunyuanVideo, FramePack and Mochi of diffusers, small and random, and what they take."""

import torch
from diffusers import (
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    MochiTransformer3DModel,
)
from torch.overrides import TorchFunctionMode

DIM, HEADS, TEXT_LEN, CHANNELS = 24, 2, 5, 4
FRAMES, SIDE = 3, 4  # of latents: 12 tokens, 4 in each frame
VIDEO_LEN, FIRST_LEN = 12, 4


def transformer(kind, dtype=torch.float32):
    torch.manual_seed(0)
    model = mochi() if kind == "mochi" else hunyuan(kind)
    with torch.no_grad():
        for parameter in model.parameters():  # weights of norms too, which begin as ones
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def hunyuan(kind):
    options = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": DIM // HEADS,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": 8,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 4, 4),
    }
    if kind == "framepack":
        return HunyuanVideoFramepackTransformer3DModel(
            **options, has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True
        )
    conditioned = "token_replace" if kind == "image" else None
    return HunyuanVideoTransformer3DModel(**options, image_condition_type=conditioned)


def mochi():
    return MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=HEADS,
        attention_head_dim=DIM // HEADS,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=CHANNELS,
        text_embed_dim=8,
        time_embed_dim=8,
    )


def inputs(kind, dtype=torch.float32, batch=2):
    """Arguments of one call; the first text has two tokens of padding."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    mask = torch.ones(batch, TEXT_LEN, dtype=torch.bool)
    mask[0, 3:] = False
    arguments = {
        "hidden_states": random(batch, CHANNELS, FRAMES, SIDE, SIDE),
        "encoder_hidden_states": random(batch, TEXT_LEN, 8),
        "encoder_attention_mask": mask,
        "timestep": torch.tensor([3, 17][:batch]),
        "return_dict": False,
    }
    if kind != "mochi":
        arguments["pooled_projections"] = random(batch, 8)
        arguments["guidance"] = torch.full((batch,), 6.0, dtype=dtype)
    if kind == "framepack":
        arguments |= {
            "image_embeds": random(batch, 3, 8),
            "indices_latents": torch.arange(4, 4 + FRAMES),
            "latents_clean": random(batch, CHANNELS, 2, SIDE, SIDE),
            "indices_latents_clean": torch.arange(2, 4),
            "latents_history_2x": random(batch, CHANNELS, 2, SIDE, SIDE),
            "indices_latents_history_2x": torch.arange(2),
            "latents_history_4x": random(batch, CHANNELS, 4, SIDE, SIDE),
            "indices_latents_history_4x": torch.arange(4),
        }
    return arguments


def block_inputs(kind, blocks, dtype=torch.float32, grad=False):
    """Arguments of a block, by position: those that a gradient is of come first."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad)

    text_dim = 16 if kind == "mochi" else DIM
    streams = random(2, VIDEO_LEN, DIM), random(2, TEXT_LEN, text_dim), random(2, DIM)
    if kind == "mochi":
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
        angles = torch.randn(VIDEO_LEN, HEADS, DIM // HEADS // 2, generator=generator)
        return *streams, mask, (angles.cos(), angles.sin())
    mask = torch.ones(2, 1, 1, VIDEO_LEN + TEXT_LEN, dtype=torch.bool)
    mask[0, ..., -2:] = False
    angles = torch.randn(VIDEO_LEN, DIM // HEADS // 2, generator=generator)
    rotary = tuple(table.repeat_interleave(2, 1) for table in (angles.cos(), angles.sin()))
    of_first = (random(2, DIM) if kind == "image" else None, FIRST_LEN)
    return *streams, mask, rotary, *of_first


def in_float64(arguments):
    """Copies, and leaves of a graph of their own; tables of angles are what they are."""
    return [
        x.detach().double().requires_grad_(x.requires_grad)
        if torch.is_tensor(x) and x.is_floating_point()
        else x
        for x in arguments
    ]


class Float64(TorchFunctionMode):
    """Wherever a model turns to fp32 on the path, a copy of it in fp64 stays in fp64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wide(x):
            return torch.float64 if x is torch.float32 else x

        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.to and args[0].is_floating_point():
            args = tuple(map(wide, args))
            kwargs = {key: wide(x) for key, x in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))
