"""Training losses of the VAE and the transformer, as modules, and augmentations."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..schedulers import NoiseSchedule
from ..transformer import ExpertTransformer, load_balancing_loss
from ..transformer.experts import Routing
from ..vae import CausalVAE, DiagonalGaussian
from .recipe import TransformerTraining
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

    def forward(self, video: Tensor) -> Losses:
        """Compute "loss" and its parts of (batch, frames, channels, height, width) in [-1, 1]."""
        posterior = DiagonalGaussian(self.encoder(video))
        error = self.decoder(posterior.sample()).float() - video
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

    def forward(self, latents: Tensor, text: Tensor) -> Losses:
        """Compute "loss" of (batch, frames, channels, height, width), scaled, at random timesteps.

        text  (batch, text_len, dim)

        Returns the unweighted "velocity" error too, where it differs from the loss. The first frame
        is repeated to a multiple of `patch_size_t`, as in the training of CogVideoX 1.5.
        """
        options, config = self.options, self.transformer.config
        missing = -latents.shape[1] % (config.patch_size_t or 1)
        latents = torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], 1)
        quantiles = stratified_quantiles(len(latents), latents.device)
        num_timesteps = self.schedule.config.num_train_timesteps
        timestep = quantile_timesteps(
            quantiles, num_timesteps, options.logit_mean, options.logit_std
        )
        noise = torch.randn_like(latents)
        routing: list[Routing] = []
        v = self.transformer(
            self.schedule.add_noise(latents, noise, timestep), text, timestep, routing=routing
        )
        target = self.schedule.velocity(latents, noise, timestep)
        errors = (v.float() - target).square().flatten(1).mean(1)
        parts: Losses = {}
        loss = (errors if self.levels is None else self.levels(errors, quantiles)).mean()
        if routing:
            balance = load_balancing_loss(routing)
            loss = loss + options.balance_weight * balance
            parts["balance"] = balance.detach()
        if routing or self.levels is not None:
            parts["velocity"] = errors.mean().detach()
        return {"loss": loss, **parts}


def drop_text(text: Tensor, empty: Tensor, part: float) -> Tensor:
    """Replace each text by the empty one with probability `part`."""
    keep = torch.rand(len(text), 1, 1, device=text.device) >= part
    return torch.where(keep, text, empty)


def recolor(video: Tensor, part: float) -> Tensor:
    """Map the colours of each clip, with probability `part`, by a random affine map.

    video  (batch, frames, 3, height, width) in [-1, 1], to which the result is clamped
    """
    if part == 0:
        return video
    batch = len(video)
    changed = torch.rand(batch, 1, 1, 1, 1, device=video.device) < part
    turned = 0.6 * torch.randn(batch, 1, 3, 3, device=video.device)
    moved = 0.35 * torch.randn(batch, 1, 3, 1, device=video.device)
    other = (turned @ video.flatten(3) + moved).view_as(video).clamp(-1, 1)
    return torch.where(changed, other, video)


def mean_losses(losses: Sequence[Losses]) -> Losses:
    """Average the losses of several batches."""
    return {name: torch.stack([one[name] for one in losses]).mean() for name in losses[0]}
