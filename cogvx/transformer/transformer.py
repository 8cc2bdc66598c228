"""The expert transformer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cogvx_kernels import OpModule, gated_residual, modality
from cogvx_kernels.context_parallel import Context, Part

from ..config import TransformerConfig
from .attention import check_attention
from .block import ExpertBlock
from .embedding import JointEmbedding, ProjectedText, TimestepEmbedding
from .experts import ExpertFeedForward, Routing, gather_routing
from .modulation import AdaLayerNorm, Branch, ExpertAdaLayerNorm, Modulation, Modulations, stacked
from .module_utils import gathered
from .patch import unpatchify
from .positions import Tables, sincos_positions, token_grid
from .validation import check_arguments, check_run, check_text


class ExpertTransformer(OpModule):
    """CogVideoX's transformer, released or with experts; see `TransformerConfig`.

    State-dict keys are diffusers' for a model with one feed-forward for text and video. With
    experts they are `transformer_blocks.{i}.ff.text.{e}.…`, `ff.video.{e}.…` and, for several
    of a modality, `ff.text_router.weight`, `ff.video_router.weight`.

    config     of the model
    attention  one of `ATTENTION_BACKENDS`

    The ops run on the backend of `cogvx_kernels.module_backend` at construction.

    `gradient_checkpointing = True` keeps only the inputs of the blocks for the backward pass, which
    recomputes each block. `context` is a `Context` of ranks that share each sequence, or None; see
    `cogvx.parallel.context_parallel`.

    A new model is initialised for training: modulations are zero, so that each block is the
    identity; patch embedding and last layer are Xavier uniform, routers small. Raises ValueError
    for an unknown attention. Source: `docs/model.md`, sections 2 and 3.
    """

    def __init__(self, config: TransformerConfig, attention: str = "auto") -> None:
        super().__init__()
        check_attention("ExpertTransformer", attention)
        dim, time_embed_dim = config.hidden_size, config.time_embed_dim
        self.config = config
        self.attention = attention
        self.gradient_checkpointing = False
        self.context: Context | None = None
        self.patch = (config.patch_size_t or 1, config.patch_size, config.patch_size)
        self.tables = Tables(config)
        self.patch_embed = JointEmbedding(
            config.in_channels,
            config.text_embed_dim,
            dim,
            self.patch,
            linear=config.patch_size_t is not None,
            # 1.5 says patch_bias=false, but has a bias: `docs/model.md`, section 2.2.
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
                attention,
            )
            for _ in range(config.num_layers)
        )
        self.norm_final = nn.LayerNorm(dim, config.norm_eps)
        self.norm_out = AdaLayerNorm(dim, time_embed_dim, config.norm_eps)
        values = config.out_channels * self.patch[0] * self.patch[1] * self.patch[2]
        self.proj_out = nn.Linear(dim, values)
        self._initialise()

    def forward(
        self,
        latents: Tensor,
        text: Tensor | ProjectedText,
        timestep: Tensor | None = None,
        ofs: Tensor | None = None,
        routing: list[Routing] | None = None,
        modulations: Modulations | None = None,
    ) -> Tensor:
        """Predict v.

        Args:
            latents: (batch, frames, in_channels, height, width), scaled, noisy; in an
                image-to-video model the image's latents are its last channels. Height and width
                are multiples of patch_size, frames of patch_size_t (1.5).
            text: (batch, text_len, text_embed_dim), or the result of `project_text`. Exactly
                max_text_seq_length tokens if positions are added to the sequence (2B, 5B-I2V), else
                any number.
            timestep: a scalar or (batch,), any real dtype; training steps, 0 (clean) to 999.
            ofs: a scalar, (1,) or (batch,), for a model with ofs_embed_dim: 2.0 as released.
            routing: a list, to which each router appends statistics for `load_balancing_loss`.
            modulations: of one step for all items, or of one for each (see `modulations`); then
                timestep and ofs are None.

        Returns:
            (batch, frames, out_channels, height, width).

        Raises:
            TypeError, ValueError: an argument is not as above.

        A model with learned positions (5B-I2V) takes one height and width. At another number of
        frames than the trained one it adds the sin-cos table instead, as in diffusers.
        """
        dtype = self.norm_final.weight.dtype
        check_arguments(self.config, dtype, latents, text, timestep, ofs, routing, modulations)
        batch, frames, _, height, width = latents.shape
        cos, sin = self.tables.rope(frames, height, width, latents.device).unbind(0)
        x = self.patch_embed(text, latents, self._positions(latents))
        block_modulations: Sequence[Tensor | tuple[Modulation, Modulation]]
        last_modulation: Tensor | tuple[Tensor, Tensor]
        if modulations is not None:
            block_modulations, last_modulation = modulations.block_modulations(batch, x.dtype)
        else:
            assert timestep is not None  # checked above
            last_modulation = self._time(timestep, ofs, batch, latents.device, latents.dtype)
            block_modulations = [last_modulation] * len(self.transformer_blocks)
        text_len = (text.tokens if isinstance(text, ProjectedText) else text).shape[1]
        part = None if self.context is None else self.context.part(x.shape[1])
        if part is not None:
            x, (cos, sin) = part.narrow(x, 1), part.tables(cos, sin)
        video, routed = self._run_blocks(x, block_modulations, cos, sin, text_len, part)
        if routing is not None:
            routing.extend(routed if part is None else self._all_routing(routed, part, text_len))
        video = self.proj_out(self.norm_out(self.norm_final(video), last_modulation))
        if part is not None:
            video = part.context.gather(video, part.video_sizes(text_len))
        return unpatchify(video, token_grid(self.config, frames, height, width), self.patch)

    def project_text(self, text: Tensor) -> ProjectedText:
        """Project a text, (batch, text_len, text_embed_dim), once for all steps.

        Raises TypeError or ValueError for another shape or dtype.
        """
        check_text(self.config, self.norm_final.weight.dtype, text)
        with gathered(self.patch_embed.text_proj):
            return ProjectedText(self.patch_embed.text_proj(text))

    def modulations(self, timesteps: Tensor, ofs: Tensor | None = None) -> Modulations:
        """Compute all shifts, scales and gates for many timesteps, in few matrix products.

        They depend only on the timestep and the weights: a run computes them before its first step
        and passes those of each step to `forward` (`Modulations.at`). They take
        (12 · num_layers + 2) · hidden_size values a step: for 5B in bfloat16 3.1 MB, 155 MB for 50.
        Meanwhile up to `modulation.STACK_BYTES` of weights are copied.

        timesteps  (steps,), any real dtype
        ofs        a scalar, (1,) or (steps,), as in `forward`

        Raises TypeError or ValueError for other shapes.
        """
        check_run(self.config, timesteps, ofs)
        weight = self.norm_final.weight
        norms = [m for m in self.modules() if isinstance(m, (ExpertAdaLayerNorm, AdaLayerNorm))]
        linears = [norm.linear for norm in norms]
        with gathered(self.time_embedding, self.ofs_embedding, *linears):
            temb = self._time(timesteps, ofs, len(timesteps), weight.device, weight.dtype)
            rows = stacked(linears, temb)
        return Modulations(rows.unflatten(1, (-1, self.config.hidden_size)))

    def _run_blocks(
        self,
        x: Tensor,
        block_modulations: Sequence[Tensor | tuple[Modulation, Modulation]],
        cos: Tensor,
        sin: Tensor,
        text_len: int,
        part: Part | None,
    ) -> tuple[Tensor, list[Routing]]:
        """Run the joint sequence, or a rank's part of it, through all blocks.

        text_len is that of the whole sequence. Each block leaves its last residual sum to the next;
        not with gradient checkpointing, so that one tensor per block is kept, not two.

        Returns video tokens, (batch, video_len, dim), and a `Routing` of each router.
        """
        branch: Branch | None = None
        routing: list[Routing] = []
        if part is not None:
            text_len = part.text_len(text_len)
        for block, time in zip(self.transformer_blocks, block_modulations, strict=True):
            inputs = time, cos, sin, text_len, part
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, routed = checkpoint(block.whole, x, *inputs, use_reentrant=False)
            else:
                x, branch, routed = block(x, branch, *inputs)
            routing.extend(routed)
        video = modality.split(x, text_len)[1]
        if branch is None:
            return video, routing
        y = modality.split(branch.y, text_len)[1].to(x.dtype)
        return gated_residual(video, y, branch.gate, None, backend=self.backend), routing

    def _all_routing(self, routing: list[Routing], part: Part, text_len: int) -> list[Routing]:
        """Routing of the tokens of all ranks; text_len is that of the whole sequence."""
        if not routing:
            return []
        own, config = part.text_len(text_len), self.config
        shares = []
        if config.num_text_experts > 1:
            shares.append(own / max(1, text_len))
        if config.num_video_experts > 1:
            shares.append((part.length - own) / (sum(part.sizes) - text_len))
        return gather_routing(routing, part, shares * config.num_layers)

    def _time(
        self,
        timestep: Tensor,
        ofs: Tensor | None,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        """Embedding of timestep and ofs, after a SiLU: (batch, time_embed_dim)."""
        temb = self.time_embedding(timestep.to(device).expand(batch), dtype)
        if self.ofs_embedding is not None and ofs is not None:
            temb = temb + self.ofs_embedding(ofs.to(device).expand(batch), dtype)
        return F.silu(temb)

    def _positions(self, latents: Tensor) -> Tensor | None:
        """Positions to add to the joint sequence, (text_len + video_len, dim), or None."""
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
        """Initialise for training. Source: `docs/model.md`, section 2.4; else torch's default."""
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
    """Initial learned table (sin-cos), (1, seqlen, dim); None without one."""
    if not config.use_learned_positional_embeddings:
        return None
    size = config.sample_latent_frames, config.sample_height, config.sample_width
    return sincos_positions(config, *size)[None].to(torch.get_default_dtype())
