"""Build the factorised CogVideoX, an architecture for training from scratch.

It differs from the released model in three parts: a strictly causal VAE of separate spatial and
temporal convolutions, whose norms are per frame; one feed-forward per modality, or several with a
router; and integer positions. By default it has 42 layers, hidden size 1920, 48 heads of 40 dims.
"""

import inspect
from collections.abc import Callable
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from cogvx_kernels import rope3d_tables, slice_positions, split_headdim

from . import frames, vae
from .config import SchedulerConfig, TransformerConfig, VAEConfig
from .pipeline import CogVideoX
from .transformer import ExpertTransformer
from .vae import CausalVAE, Decoder, Encoder


def build_vae(
    in_channels: int = 3,
    latent_channels: int = 16,
    num_frames: int = 49,
    spatial_downsample: int = 8,
    temporal_downsample: int = 4,
    base_channels: int = 128,
) -> tuple[Encoder, Decoder]:
    """Encoder and decoder of a factorised `CausalVAE`, with random weights.

    in_channels          of the video, 3 for RGB
    latent_channels      of a latent
    num_frames           of a clip to be encoded, 1 + temporal_downsample·k; only checked, the
                         modules take any such number
    spatial_downsample   pixels of a latent's side, a power of two
    temporal_downsample  frames of a latent, a power of two, at most spatial_downsample
    base_channels        width at full resolution; deeper levels have 2, 2, 4, 4, … times it

    Raises ValueError for an invalid option, naming it and what was wanted.
    """
    config = _vae_config(
        in_channels, latent_channels, spatial_downsample, temporal_downsample, base_channels
    )
    frames.check("build_vae", "num_frames", num_frames, config)
    model = CausalVAE(config)
    return model.encoder, model.decoder


def build_transformer(
    patch_size: tuple[int, int, int] = (1, 2, 2),
    hidden_size: int = 1920,
    num_heads: int = 48,
    num_layers: int = 42,
    num_frames: int = 49,
    text_hidden_size: int = 4096,
    mlp_ratio: float = 4.0,
    num_text_experts: int = 1,
    num_video_experts: int = 1,
    *,
    latent_channels: int = 16,
    expert_top_k: int = 1,
) -> ExpertTransformer:
    """`ExpertTransformer` with feed-forward experts of each modality, with random weights.

    patch_size         latents of a token along (frames, height, width); height and width alike
    hidden_size        a multiple of num_heads; the head dim is their quotient
    num_frames         default number of video frames of a pipeline; the transformer takes any
    text_hidden_size   width of the text encoder's states
    mlp_ratio          width of a feed-forward over hidden_size
    num_text_experts   feed-forwards for text tokens, num_video_experts for video tokens; 0 and 0 is
                       one for both, as in the released models
    expert_top_k       experts of each token, if a modality has several

    Raises ValueError for an invalid option, naming it and what was wanted.
    """
    where = "build_transformer"
    if len(patch_size) != 3 or patch_size[1] != patch_size[2]:
        raise ValueError(
            f"{where}: patch_size must be (frames, side, side), height and width alike; "
            f"got {tuple(patch_size)}"
        )
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(
            f"{where}: num_heads must divide hidden_size {hidden_size}; got {num_heads}"
        )
    side = patch_size[1]
    config = TransformerConfig(
        num_attention_heads=num_heads,
        attention_head_dim=hidden_size // num_heads,
        in_channels=latent_channels,
        out_channels=latent_channels,
        text_embed_dim=text_hidden_size,
        num_layers=num_layers,
        sample_frames=num_frames,
        sample_height=max(60 // side, 1) * side,
        sample_width=max(90 // side, 1) * side,
        patch_size=side,
        patch_size_t=patch_size[0],
        use_rotary_positional_embeddings=True,
        mlp_ratio=mlp_ratio,
        num_text_experts=num_text_experts,
        num_video_experts=num_video_experts,
        expert_top_k=expert_top_k,
    )
    return ExpertTransformer(config)


def build(**options: Any) -> CogVideoX:
    """Pipeline with random weights; takes the options of `build_vae` and `build_transformer`.

    It has no text encoder: pass `prompt_embeds` to `generate`, or set `text_encoder`.
    Raises TypeError for an unknown option.
    """
    encoder, decoder = build_vae(**_options_of(build_vae, options))
    return CogVideoX(
        transformer=build_transformer(**_options_of(build_transformer, options)),
        vae=CausalVAE.of(encoder, decoder),
        scheduler=SchedulerConfig(snr_shift_scale=1.0),
    )


def encode_video(encoder: Encoder, video: Tensor) -> Tensor:
    """Encode a video to latents, the mode of the posterior.

    video    (batch, frames, channels, height, width) in [-1, 1]; frames 1 + temporal_downsample·k
    returns  (batch, 1 + k, latent_channels, height / spatial_downsample, width / …): 49 -> 13
    """
    return vae.encode(encoder, video).mode()


def decode_latent(decoder: Decoder, latents: Tensor) -> Tensor:
    """Decode latents to a video in about [-1, 1]: (batch, frames, channels, height, width)."""
    return vae.decode(decoder, latents)


def rope3d_freqs(
    time: int, height: int, width: int, hidden_size: int = 1920, num_heads: int = 48
) -> tuple[Tensor, Tensor]:
    """RoPE tables (sin, cos), each (time·height·width, head_dim // 2) fp32, time slowest.

    Note the order: `cogvx_kernels.rope3d_tables` returns (cos, sin). Sizes are in tokens. The dims
    of a head are split by `split_headdim`: 16, 24, 24 of 64 and 8, 16, 16 of 40 for time, height
    and width. Raises ValueError if the head dim is odd or below 6.
    """
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(
            f"rope3d_freqs: num_heads must divide hidden_size {hidden_size}; got {num_heads}"
        )
    split = split_headdim(hidden_size // num_heads)
    cos, sin = rope3d_tables(slice_positions((time, height, width)), split)
    return sin, cos


def param_count(model: CogVideoX | nn.Module | None = None, **options: Any) -> int:
    """Count the parameters of a model, or of `build_transformer(**options)`, exactly.

    model    a module, or a pipeline, of which the transformer is counted
    options  instead of a model, which is then not allocated; those of `build_vae` have no effect

    >>> param_count(num_layers=2) == param_count(build(num_layers=2))
    True
    """
    if model is not None:
        module = model.transformer if isinstance(model, CogVideoX) else model
        if options or not isinstance(module, nn.Module):
            came = f"{type(model).__name__} and {', '.join(options)}".removesuffix(" and ")
            raise TypeError(
                "param_count: model must be a torch module or a CogVideoX, alone; or else give "
                f"options of build_transformer, such as num_layers=2; got {came}"
            )
        return sum(parameter.numel() for parameter in module.parameters())
    with torch.device("meta"):
        built = build_transformer(**_options_of(build_transformer, options))
    return param_count(built)


def recommended_defaults() -> dict[str, Any]:
    """Default options of `build`."""
    return {
        "in_channels": 3,
        "latent_channels": 16,
        "num_frames": 49,
        "spatial_downsample": 8,
        "temporal_downsample": 4,
        "base_channels": 128,
        "patch_size": (1, 2, 2),
        "hidden_size": 1920,
        "num_heads": 48,
        "num_layers": 42,
        "text_hidden_size": 4096,
        "mlp_ratio": 4.0,
        "num_text_experts": 1,
        "num_video_experts": 1,
    }


def _vae_config(
    in_channels: int,
    latent_channels: int,
    spatial_downsample: int,
    temporal_downsample: int,
    base_channels: int,
) -> VAEConfig:
    for name, ratio in (("spatial", spatial_downsample), ("temporal", temporal_downsample)):
        if ratio < 1 or ratio & (ratio - 1):
            raise ValueError(f"build_vae: {name}_downsample must be a power of two; got {ratio}")
    if temporal_downsample > spatial_downsample:
        raise ValueError(
            f"build_vae: temporal_downsample must be at most spatial_downsample, "
            f"{spatial_downsample}; got {temporal_downsample}"
        )
    levels = spatial_downsample.bit_length()
    return VAEConfig(
        factorized=True,
        in_channels=in_channels,
        out_channels=in_channels,
        latent_channels=latent_channels,
        block_out_channels=tuple(
            base_channels * 2 ** ((level + 1) // 2) for level in range(levels)
        ),
        norm_num_groups=gcd(32, base_channels),
        temporal_compression_ratio=temporal_downsample,
        num_sample_frames_batch_size=temporal_downsample,
        num_latent_frames_batch_size=1,
    )


def _options_of(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Select the options that `function` takes."""
    known = {name for part in (build_vae, build_transformer) for name in _names(part)}
    for name in options:
        if name not in known:
            raise TypeError(f"build: unknown option {name!r}; it takes {', '.join(sorted(known))}")
    return {name: value for name, value in options.items() if name in _names(function)}


def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)
