"""The training loop: steps, logging, checkpoints and samples, on one rank or several.

Random numbers of a step are of the recipe's seed, the step and the place of a clip in the batch, so
that a training resumed from a checkpoint gives the bits of one that was not interrupted.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..transformer.module_utils import is_sharded
from ..video import write_sheet
from .checkpointing import Point, StageFolder
from .ema import EMA
from .losses import Losses, mean_losses
from .optimizers import make_optimizers
from .plotting import plot_losses, tensorboard_writer
from .recipe import Training, learning_rate, learning_rate_factor
from .sampler import Draws, ResumableBatchSampler, shares
from .sharding import (
    World,
    load_state,
    mean_over_ranks,
    no_sync,
    replicate,
    save_state,
    training_state,
    whole_weights,
)

Progress = Callable[[str, int, int], None]


def warn_if_bfloat16_is_emulated(precision: str, device: torch.device) -> None:
    """Warn of bfloat16 on a CPU that has no instructions for it."""
    emulated = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    if precision == "bfloat16" and emulated:
        warnings.warn(
            "train: this CPU has no instructions for bfloat16 and may take a hundred times as "
            "long with it; precision float32 is faster here",
            stacklevel=2,
        )


class Loop:
    """Training of one model, resumed from its latest checkpoint.

    stage    its folder and name
    loss     a module that returns "loss" and its parts; its parameters that require gradients are
             trained
    data     the clips
    prepare  list of clips, step, their random numbers -> arguments of `loss` on the ranks' device
    sample   frames of some clips by the model, (clips, frames, channels, height, width), while the
             EMA is in the weights
    """

    def __init__(
        self,
        stage: StageFolder,
        options: Training,
        seed: int,
        world: World,
        loss: nn.Module,
        data: Dataset[Any],
        prepare: Callable[[list[Any], int, Draws], tuple[Any, ...]],
        sample: Callable[[], Tensor],
        workers: int = 0,
        tensorboard: bool = False,
    ) -> None:
        self.stage, self.options, self.seed = stage, options, seed
        self.world, self.workers = world, workers
        self.data, self.prepare, self.sample = data, prepare, sample
        warn_if_bfloat16_is_emulated(options.precision, world.device)
        self.loss = loss.to(world.device)
        self.trained = [p for p in loss.parameters() if p.requires_grad]
        self.sharded = any(map(is_sharded, self.trained))
        self.optimizers = make_optimizers(loss, options)
        if options.compile and not self.sharded:
            loss.compile(dynamic=False)
        self.model = replicate(loss, world)
        self.ema = EMA(self.trained, options.ema_decay)
        self.board = tensorboard_writer(stage.folder) if tensorboard and world.main else None

    def run(self, progress: Progress) -> list[Point]:
        """Run the remaining steps, replace the weights by their EMA, return the logged losses.

        Raises FloatingPointError, naming the step, for a gradient that is not finite; the training
        can be resumed from the latest checkpoint.
        """
        options, window = self.options, list[Losses]()
        done, latest = self.stage.latest()
        points = self.stage.read_points(done, rewrite=self.world.main)
        if latest is not None:
            self._load(latest)
        for step, clips in enumerate(self._batches(done), done):
            progress(self.stage.name, step, options.steps)
            window.append(self._step(step, clips))
            end = step + 1 == options.steps
            if (step + 1) % options.log_every == 0 or end:
                points.append(self._point(step + 1, window))
                window.clear()
            if (step + 1) % options.save_every == 0 or end:
                self.stage.save(step + 1, self._save, self.world.main, self.world.wait)
            if (step + 1) % options.sample_every == 0 and not end:
                with self.ema.applied():
                    self._report(points)
        progress(self.stage.name, options.steps, options.steps)
        self.ema.copy_to_parameters()
        self._report(points)
        return points

    def weights(self) -> dict[str, Tensor]:
        """Trained weights and buffers of the loss, on rank 0; every rank must call this."""
        return whole_weights(self.loss)

    def _step(self, step: int, clips: list[Any]) -> Losses:
        """Run one optimizer step over `accumulate` parts of a batch."""
        options, batch = self.options, self.options.batch_at(step)
        for optimizer, rate in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate_factor(options, step)
        parts = shares(batch, options.accumulate, *self.world.data)
        found = []
        for number, positions in enumerate(parts):
            draws = Draws(self.seed, step, positions, batch, self.world.device)
            first, last = number * len(positions), number + 1 == len(parts)
            arguments = self.prepare(clips[first : first + len(positions)], step, draws)
            with nullcontext() if last else no_sync(self.model):
                with self._precision():
                    losses = self.model(*arguments)
                (losses["loss"] / len(parts)).backward()
            found.append({name: value.detach() for name, value in losses.items()})
        norm: Any = nn.utils.clip_grad_norm_(self.trained, options.max_grad_norm)
        if self.sharded:
            norm = norm.full_tensor()
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"{self.stage.name}: step {step} has a gradient that is not finite; a lower "
                "learning_rate, or precision float32, may help"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.ema.update()
        return {**mean_losses(found), "gradient": norm.detach()}

    def _state(self) -> dict[str, Any]:
        state = training_state(self.loss, list(self.optimizers))
        return {**state, "ema": self.ema.state_dict()}

    def _save(self, folder: Path) -> None:
        save_state(self._state(), folder)

    def _load(self, folder: Path) -> None:
        state = self._state()
        load_state(state, folder)
        self.ema.load_state_dict(state["ema"])

    def _precision(self) -> AbstractContextManager[Any]:
        if self.options.precision == "float32":
            return nullcontext()
        return torch.autocast(self.world.device.type, torch.bfloat16)

    def _batches(self, done: int) -> DataLoader[Any]:
        """Lists of clips of the remaining steps."""
        return DataLoader(
            self.data,
            batch_sampler=ResumableBatchSampler(
                len(self.data),  # type: ignore[arg-type]
                self.options.batch_at,
                self.seed,
                done,
                self.options.steps,
                self.options.accumulate,
                *self.world.data,
            ),
            collate_fn=list,
            num_workers=self.workers,
            generator=torch.Generator(),  # else it draws from the global one
        )

    def _point(self, step: int, window: list[Losses]) -> Point:
        """Log the mean losses since the last point, over all ranks."""
        own = mean_losses(window)
        values = torch.stack([value.float() for value in own.values()])
        means = mean_over_ranks(values).tolist()
        rate = learning_rate(self.options, step - 1)
        point = {"step": step, **dict(zip(own, means, strict=True)), "learning_rate": rate}
        if self.world.main:
            self.stage.append(point)
        if self.board is not None:
            for name in own:
                self.board.add_scalar(f"{self.stage.name}/{name}", point[name], step)
        return point

    def _report(self, points: list[Point]) -> None:
        """Plot the losses and write samples of the current weights."""
        if self.world.main:
            plot_losses(self.stage.folder / "losses.png", self.stage.name, points)
        if self.world.main or self.sharded or self.world.context > 1:
            self.loss.eval()
            # Sharded weights are gathered in the dtype of `precision`.
            precision = self._precision() if self.sharded else nullcontext()
            with torch.no_grad(), torch.random.fork_rng(devices=[]), precision:
                frames = self.sample()
            self.loss.train()
            if self.world.main:
                write_sheet(self.stage.folder / "samples.png", frames)
        self.world.wait()
