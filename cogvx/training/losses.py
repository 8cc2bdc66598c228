"""Training losses of the VAE and the transformer, as modules, and augmentations."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..schedulers import NoiseSchedule
from ..transformer import ExpertTransformer, load_balancing_loss
from ..transformer.experts import Routing
from ..vae import CausalVAE, DiagonalGaussian
from .recipe import TransformerTraining
from .sampler import Draws
from .sharding import mean_over_ranks
from .timestep_sampling import UncertaintyWeighting, quantile_timesteps, stratified_quantiles

Losses = dict[str, Tensor]


class ReconstructionLoss(nn.Module):
    """VAE loss: |error| + 8 · error² + kl_weight · KL.

    The error is averaged over pixel values, the KL divergence from the standard normal, in nats,
    over latent values. A clip is one chunk, so it must not be longer than the VAE's chunks.
    """

    def __init__(self, vae: CausalVAE, kl_weight: float) -> None:
        super().__init__()
        self.encoder, self.decoder = vae.encoder, vae.decoder
        self.kl_weight = kl_weight

    def forward(self, video: Tensor, noise: Tensor | None = None) -> Losses:
        """Compute "loss" and its parts of (batch, frames, channels, height, width) in [-1, 1].

        noise  of the posterior, of the latents' shape; None: from torch's generator
        """
        posterior = DiagonalGaussian(self.encoder(video))
        latents = posterior.sample() if noise is None else posterior.mean + posterior.std * noise
        error = self.decoder(latents).float() - video
        reconstruction = error.abs().mean() + 8 * error.square().mean()
        kl = posterior.kl().sum() / posterior.mean.numel()
        loss = reconstruction + self.kl_weight * kl
        return {"loss": loss, "reconstruction": reconstruction.detach(), "kl": kl.detach()}


class VelocityLoss(nn.Module):
    """Transformer loss: squared error of v, averaged over latent values.

    options  `logit_mean`, `logit_std` and `weighting` of timesteps; `balance_weight` times
             `load_balancing_loss` is added for routed experts

    Source: docs/model.md, section 5; at uniform timesteps it is SAT's loss.
    """

    def __init__(
        self, transformer: ExpertTransformer, schedule: NoiseSchedule, options: TransformerTraining
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.schedule = schedule
        self.options = options
        self.levels = UncertaintyWeighting() if options.weighting == "uncertainty" else None

    def forward(
        self,
        latents: Tensor,
        text: Tensor,
        quantiles: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Losses:
        """Compute "loss" of (batch, frames, channels, height, width), scaled, at random timesteps.

        text              (batch, text_len, dim)
        quantiles, noise  of the timesteps, (batch,), and of `pad_frames` of the latents; None: from
                          torch's generator

        Returns the unweighted "velocity" error too, where it differs from the loss.
        """
        options = self.options
        latents = pad_frames(latents, self.transformer)
        if quantiles is None:
            quantiles = stratified_quantiles(len(latents), latents.device)
        num_timesteps = self.schedule.config.num_train_timesteps
        timestep = quantile_timesteps(
            quantiles, num_timesteps, options.logit_mean, options.logit_std
        )
        noise = torch.randn_like(latents) if noise is None else noise
        routing: list[Routing] = []
        v = self.transformer(
            self.schedule.add_noise(latents, noise, timestep), text, timestep, routing=routing
        )
        target = self.schedule.velocity(latents, noise, timestep)
        errors = (v.float() - target).square().flatten(1).mean(1)
        parts: Losses = {}
        loss = (errors if self.levels is None else self.levels(errors, quantiles)).mean()
        if routing:
            balance = load_balancing_loss(over_ranks(routing))
            loss = loss + options.balance_weight * balance
            parts["balance"] = balance.detach()
        if routing or self.levels is not None:
            parts["velocity"] = errors.mean().detach()
        return {"loss": loss, **parts}


def pad_frames(latents: Tensor, transformer: ExpertTransformer) -> Tensor:
    """Repeat the first frame to a multiple of `patch_size_t`, as CogVideoX 1.5 was trained."""
    missing = -latents.shape[1] % transformer.patch[0]
    return torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], 1)


def over_ranks(routing: Sequence[Routing]) -> list[Routing]:
    """Statistics of the clips of all ranks.

    Their gradient is that of this rank's: the mean over ranks, which an optimizer gets, is that of
    all clips.
    """
    own = torch.cat([values for one in routing for values in one])
    mean = own + (mean_over_ranks(own.detach()) - own.detach())
    values = iter(mean.split([len(values) for one in routing for values in one]))
    return [Routing(next(values), next(values)) for _ in routing]


def drop_text(text: Tensor, empty: Tensor, part: float, draws: Draws) -> Tensor:
    """Replace each text by the empty one with probability `part`."""
    return torch.where(draws.rand(1, 1) >= part, text, empty)


def recolor(video: Tensor, part: float, draws: Draws) -> Tensor:
    """Map the colours of each clip, with probability `part`, by a random affine map.

    video  (batch, frames, 3, height, width) in [-1, 1], to which the result is clamped
    """
    if part == 0:
        return video
    changed = draws.rand(1, 1, 1, 1) < part
    turned, moved = 0.6 * draws.randn(1, 3, 3), 0.35 * draws.randn(1, 3, 1)
    other = (turned @ video.flatten(3) + moved).view_as(video).clamp(-1, 1)
    return torch.where(changed, other, video)


def mean_losses(losses: Sequence[Losses]) -> Losses:
    """Average the losses of several batches."""
    return {name: torch.stack([one[name] for one in losses]).mean() for name in losses[0]}
