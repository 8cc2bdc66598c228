"""What the two models are trained to make small: modules, so that they can be wrapped."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..schedulers import NoiseSchedule
from ..transformer import ExpertTransformer, load_balancing_loss
from ..transformer.experts import Routing
from ..vae import CausalVAE, DiagonalGaussian
from .recipe import TransformerTraining
from .times import Levels, spread_ranks, timesteps

Losses = dict[str, Tensor]


class ReconstructionLoss(nn.Module):
    """Of a VAE: |error| + 8 · error², averaged over pixel values, and kl_weight times the
    divergence from the standard normal in nats, averaged over latent values.

    The clips are whole chunks here: of the released VAE they must be no longer than one.
    """

    def __init__(self, vae: CausalVAE, kl_weight: float) -> None:
        super().__init__()
        self.encoder, self.decoder = vae.encoder, vae.decoder
        self.kl_weight = kl_weight

    def forward(self, video: Tensor) -> Losses:
        """video: (batch, frames, channels, height, width) in [-1, 1]. "loss", and its parts."""
        known = DiagonalGaussian(self.encoder(video))
        error = self.decoder(known.sample()).float() - video
        reconstruction = error.abs().mean() + 8 * error.square().mean()
        kl = known.kl().sum() / known.mean.numel()
        loss = reconstruction + self.kl_weight * kl
        return {"loss": loss, "reconstruction": reconstruction.detach(), "kl": kl.detach()}


class VelocityLoss(nn.Module):
    """Of a transformer: the squared error of v, averaged over latent values.

    options  `logit_mean` and `logit_std` say at which times, `weighting` what each time weighs;
             where routers choose, `balance_weight` times `load_balancing_loss` is added

    Source: fact sheet, section 5, where it is shown to be SAT's loss, at uniform times.
    """

    def __init__(
        self, transformer: ExpertTransformer, schedule: NoiseSchedule, options: TransformerTraining
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.schedule = schedule
        self.options = options
        self.levels = Levels() if options.weighting == "uncertainty" else None

    def forward(self, latents: Tensor, text: Tensor) -> Losses:
        """latents: (batch, frames, channels, height, width), scaled; text: (batch, text_len, dim).

        "loss", and where it is another the "velocity" error of all clips alike. Frames that are
        no multiple of `patch_size_t` get copies of the first before them, as in the training of
        CogVideoX 1.5.
        """
        options, config = self.options, self.transformer.config
        missing = -latents.shape[1] % (config.patch_size_t or 1)
        latents = torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], 1)
        ranks = spread_ranks(len(latents), latents.device)
        times = self.schedule.config.num_train_timesteps
        timestep = timesteps(ranks, times, options.logit_mean, options.logit_std)
        noise = torch.randn_like(latents)
        routing: list[Routing] = []
        v = self.transformer(
            self.schedule.add_noise(latents, noise, timestep), text, timestep, routing=routing
        )
        wanted = self.schedule.velocity(latents, noise, timestep)
        errors = (v.float() - wanted).square().flatten(1).mean(1)
        parts: Losses = {}
        loss = (errors if self.levels is None else self.levels(errors, ranks)).mean()
        if routing:
            balance = load_balancing_loss(routing)
            loss = loss + options.balance_weight * balance
            parts["balance"] = balance.detach()
        if routing or self.levels is not None:
            parts["velocity"] = errors.mean().detach()
        return {"loss": loss, **parts}


def dropped(text: Tensor, empty: Tensor, part: float) -> Tensor:
    """The texts, each of them replaced by the empty one with a chance of `part`."""
    keep = torch.rand(len(text), 1, 1, device=text.device) >= part
    return torch.where(keep, text, empty)


def recolored(video: Tensor, part: float) -> Tensor:
    """(batch, frames, 3, height, width) in [-1, 1]; clips, each with a chance of `part`, in other
    colours: those of a random affine map, the same for all frames, cut to [-1, 1]."""
    if part == 0:
        return video
    batch = len(video)
    changed = torch.rand(batch, 1, 1, 1, 1, device=video.device) < part
    turned = 0.6 * torch.randn(batch, 1, 3, 3, device=video.device)
    moved = 0.35 * torch.randn(batch, 1, 3, 1, device=video.device)
    other = (turned @ video.flatten(3) + moved).view_as(video).clamp(-1, 1)
    return torch.where(changed, other, video)


def mean(losses: Sequence[Losses]) -> Losses:
    """Of several batches."""
    return {name: torch.stack([one[name] for one in losses]).mean() for name in losses[0]}
