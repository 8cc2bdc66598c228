"""What the two models are trained to make small: modules, so that they can be wrapped."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..schedulers import NoiseSchedule
from ..transformer import ExpertTransformer, load_balancing_loss
from ..transformer.experts import Routing
from ..vae import CausalVAE, DiagonalGaussian

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
    """Of a transformer: the squared error of v, averaged over latent values, at `uniform_times`.

    Where routers choose, `balance_weight` times `load_balancing_loss` is added. Source: fact sheet,
    section 5, where it is shown to be SAT's loss.
    """

    def __init__(
        self, transformer: ExpertTransformer, schedule: NoiseSchedule, balance_weight: float
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.schedule = schedule
        self.balance_weight = balance_weight

    def forward(self, latents: Tensor, text: Tensor) -> Losses:
        """latents: (batch, frames, channels, height, width), scaled; text: (batch, text_len, dim).

        Frames that are no multiple of `patch_size_t` get copies of the first before them, as in the
        training of CogVideoX 1.5.
        """
        config = self.transformer.config
        missing = -latents.shape[1] % (config.patch_size_t or 1)
        latents = torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], 1)
        times = self.schedule.config.num_train_timesteps
        timestep = uniform_times(len(latents), times, latents.device)
        noise = torch.randn_like(latents)
        routing: list[Routing] = []
        v = self.transformer(
            self.schedule.add_noise(latents, noise, timestep), text, timestep, routing=routing
        )
        error = F.mse_loss(v.float(), self.schedule.velocity(latents, noise, timestep))
        if not routing:
            return {"loss": error}
        balance = load_balancing_loss(routing)
        loss = error + self.balance_weight * balance
        return {"loss": loss, "velocity": error.detach(), "balance": balance.detach()}


def uniform_times(batch: int, times: int, device: torch.device | None = None) -> Tensor:
    """(batch,) timesteps in [0, times), one in each of `batch` equal parts of it, in any order.

    Each is as likely to be one as another, and no batch is easy because all its clips were nearly
    clean. Source: the CogVideoX paper, "Explicit Uniform Sampling", there over the processes.
    """
    within = torch.randint(times, (batch,), device=device)
    return (torch.randperm(batch, device=device) * times + within) // batch


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
