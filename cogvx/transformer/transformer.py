"""The expert transformer: from noisy latents, a text and a time to v."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cogvx_kernels import BACKENDS, modality

from ..config import TransformerConfig
from .arguments import check_arguments
from .attention import JointAttention, check_attention, check_choice
from .block import ExpertBlock
from .embedding import JointEmbedding, TimestepEmbedding
from .experts import ExpertFeedForward, Routing
from .modulation import AdaLayerNorm, ExpertAdaLayerNorm
from .patch import unpatchify
from .positions import Tables, sincos_positions, token_grid


class ExpertTransformer(nn.Module):
    """CogVideoX's transformer, released or with experts; see `TransformerConfig`.

    The keys of its state dict are diffusers' where a model has one feed-forward for text and video.
    With experts they are `transformer_blocks.{i}.ff.text.{e}.…`, `ff.video.{e}.…` and, for several
    of a modality, `ff.text_router.weight`, `ff.video_router.weight`.

    config     what model
    backend    of the kernels: "auto", "kernel" or "reference"
    attention  one of `ATTENTION_BACKENDS`

    `gradient_checkpointing = True` makes a training step keep only what goes from block to block,
    and compute each block again on the way back.

    A new one is ready to train: modulations are zero, so that each block passes its input on; patch
    and last layer are Xavier's, routers small. Raises ValueError for an unknown backend. Source:
    fact sheet sections 2 and 3.
    """

    def __init__(
        self, config: TransformerConfig, backend: str = "auto", attention: str = "auto"
    ) -> None:
        super().__init__()
        check_choice("ExpertTransformer", "backend", backend, BACKENDS)
        check_attention("ExpertTransformer", attention)
        dim, time_embed_dim = config.hidden_size, config.time_embed_dim
        self.config = config
        self.backend = backend
        self.attention = attention
        self.gradient_checkpointing = False
        self.patch = (config.patch_size_t or 1, config.patch_size, config.patch_size)
        self.tables = Tables(config)
        self.patch_embed = JointEmbedding(
            config.in_channels,
            config.text_embed_dim,
            dim,
            self.patch,
            linear=config.patch_size_t is not None,
            # 1.5 says patch_bias=false and has the bias all the same: fact sheet section 2.2.
            bias=config.patch_bias or config.patch_size_t is not None,
            pos_embedding=_learned_positions(config),
        )
        self.time_embedding = TimestepEmbedding(dim, time_embed_dim)
        self.ofs_embedding: TimestepEmbedding | None = None
        if config.ofs_embed_dim is not None:
            self.ofs_embedding = TimestepEmbedding(config.ofs_embed_dim, config.ofs_embed_dim)
        self.transformer_blocks = nn.ModuleList(
            ExpertBlock(
                dim,
                config.num_attention_heads,
                config.ffn_dim,
                time_embed_dim,
                config.norm_eps,
                config.num_text_experts,
                config.num_video_experts,
                config.expert_top_k,
                backend,
                attention,
            )
            for _ in range(config.num_layers)
        )
        self.norm_final = nn.LayerNorm(dim, config.norm_eps)
        self.norm_out = AdaLayerNorm(dim, time_embed_dim, config.norm_eps, backend)
        values = config.out_channels * self.patch[0] * self.patch[1] * self.patch[2]
        self.proj_out = nn.Linear(dim, values)
        self._initialise()

    def forward(
        self,
        latents: Tensor,
        text: Tensor,
        timestep: Tensor,
        ofs: Tensor | None = None,
        routing: list[Routing] | None = None,
    ) -> Tensor:
        """The prediction of v, (batch, frames, out_channels, height, width).

        Args:
            latents: (batch, frames, in_channels, height, width), scaled, noisy; in an
                image-to-video model the image's latents are its last channels. Height and width
                are multiples of patch_size, frames of patch_size_t (1.5).
            text: (batch, text_len, text_embed_dim). Exactly max_text_seq_length tokens where
                positions are added to the sequence (2B, 5B-I2V), else any number.
            timestep: a scalar or (batch,), any real dtype; training steps, 0 (clean) to 999.
            ofs: a scalar, (1,) or (batch,), for a model with ofs_embed_dim: 2.0 as released.
            routing: a list; each router appends what it did, for `load_balancing_loss`.

        Raises TypeError or ValueError for an argument that is not as above.

        A model with learned positions (5B-I2V) knows one height and width, and one number of
        frames: at another number it adds the table of sines and cosines instead, as diffusers does.
        """
        check_arguments(
            self.config, self.norm_final.weight.dtype, latents, text, timestep, ofs, routing
        )
        batch, frames, _, height, width = latents.shape
        text_len = text.shape[1]
        temb = self._time(timestep, ofs, batch, latents)
        cos, sin = self.tables.rope(frames, height, width, latents.device).unbind(0)
        x = self.patch_embed(text, latents, self._positions(latents))
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, routed = checkpoint(block, x, temb, cos, sin, text_len, use_reentrant=False)
            else:
                x, routed = block(x, temb, cos, sin, text_len)
            if routing is not None:
                routing.extend(routed)
        _, video = modality.split(x, text_len)
        video = self.proj_out(self.norm_out(self.norm_final(video), temb))
        return unpatchify(video, token_grid(self.config, frames, height, width), self.patch)

    def set_backend(self, backend: str) -> None:
        """Which way the ops of cogvx_kernels go from now on: "auto", "kernel" or "reference"."""
        check_choice("ExpertTransformer.set_backend", "backend", backend, BACKENDS)
        self.backend = backend
        for module in self.modules():
            if isinstance(module, (JointAttention, ExpertAdaLayerNorm, AdaLayerNorm)):
                module.backend = backend

    def _time(self, timestep: Tensor, ofs: Tensor | None, batch: int, like: Tensor) -> Tensor:
        """The SiLU, which every modulation takes, of time and ofs: (batch, time_embed_dim)."""
        temb = self.time_embedding(timestep.to(like.device).expand(batch), like.dtype)
        if self.ofs_embedding is not None and ofs is not None:
            temb = temb + self.ofs_embedding(ofs.to(like.device).expand(batch), like.dtype)
        return F.silu(temb)

    def _positions(self, latents: Tensor) -> Tensor | None:
        """What is added to the joint sequence, (text_len + video_len, dim), or None."""
        config = self.config
        _, frames, _, height, width = latents.shape
        learned = self.patch_embed.pos_embedding
        if learned is not None:
            if (frames - 1) * config.temporal_compression_ratio + 1 == config.sample_frames:
                return learned[0]
        elif config.use_rotary_positional_embeddings:
            return None
        return self.tables.sincos(frames, height, width, latents.device, latents.dtype)

    def _initialise(self) -> None:
        """Source: fact sheet section 2.4; everything else is as torch makes it."""
        for module in self.modules():
            if isinstance(module, (ExpertAdaLayerNorm, AdaLayerNorm)):
                nn.init.zeros_(module.linear.weight)
                nn.init.zeros_(module.linear.bias)
            elif isinstance(module, ExpertFeedForward):
                module.reset_routers()
        for layer in (self.patch_embed.proj, self.proj_out):
            nn.init.xavier_uniform_(layer.weight.flatten(1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _learned_positions(config: TransformerConfig) -> Tensor | None:
    """The learned table as it begins: sines and cosines."""
    if not config.use_learned_positional_embeddings:
        return None
    size = config.sample_latent_frames, config.sample_height, config.sample_width
    return sincos_positions(config, *size)[None].to(torch.get_default_dtype())
