"""The training loop: steps, logging, checkpoints and samples, on accelerate.

Random numbers of a step are seeded with the recipe's seed, the step and the process, so that a
training resumed from a checkpoint gives the bits of one that was not interrupted.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..checkpoint.tensors import read_tensors, write_tensors
from ..extras import extra
from .checkpointing import Point, StageFolder
from .ema import EMA, is_sharded
from .losses import Losses, mean_losses
from .optimizers import make_optimizers
from .plotting import plot_losses, tensorboard_writer
from .recipe import Training, learning_rate, learning_rate_factor
from .sampler import ResumableBatchSampler, mix_seed

Progress = Callable[[str, int, int], None]


def make_accelerator(device: torch.device) -> Any:
    """Make accelerate's Accelerator, for launched processes or for this one alone.

    Raises ModuleNotFoundError if accelerate is not installed.
    """
    accelerate = extra("accelerate", "train", "cogvx[train]")
    return accelerate.Accelerator(cpu=device.type == "cpu", mixed_precision="no")


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
    prepare  list of clips, step -> arguments of `loss` on the accelerator's device
    sample   writes samples of the model; called while the EMA is in the weights
    """

    def __init__(
        self,
        stage: StageFolder,
        options: Training,
        seed: int,
        accelerator: Any,
        loss: nn.Module,
        data: Dataset[Any],
        prepare: Callable[[list[Any], int], tuple[Any, ...]],
        sample: Callable[[], None],
        workers: int = 0,
        tensorboard: bool = False,
    ) -> None:
        self.stage, self.options, self.seed = stage, options, seed
        self.accelerator, self.workers = accelerator, workers
        self.data, self.prepare, self.sample = data, prepare, sample
        warn_if_bfloat16_is_emulated(options.precision, accelerator.device)
        made = make_optimizers(loss, options)
        if options.compile:
            loss.compile(dynamic=False)
        self.loss, *optimizers = accelerator.prepare(loss, *made)
        self.optimizers = list(zip(optimizers, made.values(), strict=True))
        self.trained = [p for p in self.loss.parameters() if p.requires_grad]
        if self.sharded and options.optimizer == "muon":
            raise ValueError(
                f"{stage.name}_training: optimizer must be adamw where no process has whole "
                "matrices, as with FSDP; got muon"
            )
        self.ema = EMA(self.trained, options.ema_decay)
        self.board = tensorboard_writer(stage.folder) if tensorboard and self.main else None

    @property
    def main(self) -> bool:
        """True in the process that writes files and reports progress."""
        return bool(self.accelerator.is_main_process)

    @property
    def sharded(self) -> bool:
        """True if weights are sharded, so that no process can run the model alone."""
        return any(map(is_sharded, self.trained))

    def run(self, progress: Progress) -> list[Point]:
        """Run the remaining steps, replace the weights by their EMA, return the logged losses.

        Raises FloatingPointError, naming the step, for a gradient that is not finite; the training
        can be resumed from the latest checkpoint.
        """
        options, window = self.options, list[Losses]()
        done, latest = self.stage.latest()
        points = self.stage.read_points(done, rewrite=self.main)
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
                self.stage.save(step + 1, self._save, self.main, self.accelerator.wait_for_everyone)
            if (step + 1) % options.sample_every == 0 and not end:
                with self.ema.applied():
                    self._report(points)
        progress(self.stage.name, options.steps, options.steps)
        self.ema.copy_to_parameters()
        self._report(points)
        return points

    def weights(self) -> dict[str, Tensor]:
        """Whole state dict of the loss, in the main process; every process must call this."""
        return dict(self.accelerator.get_state_dict(self.loss))

    def _step(self, step: int, clips: list[Any]) -> Losses:
        """Run one optimizer step over `accumulate` parts of a batch."""
        options, accelerator = self.options, self.accelerator
        torch.manual_seed(mix_seed(self.seed, step, accelerator.process_index))
        for optimizer, rate in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate_factor(options, step)
        size = len(clips) // options.accumulate
        found = []
        for start in range(0, len(clips), size):
            last = start + size >= len(clips)
            arguments = self.prepare(clips[start : start + size], step)
            with nullcontext() if last else accelerator.no_sync(self.loss):
                with self._precision():
                    losses = self.loss(*arguments)
                accelerator.backward(losses["loss"] / options.accumulate)
            found.append({name: value.detach() for name, value in losses.items()})
        norm = accelerator.clip_grad_norm_(self.trained, options.max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"{self.stage.name}: step {step} has a gradient that is not finite; a lower "
                "learning_rate, or precision float32, may help"
            )
        for optimizer, _ in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.ema.update()
        return {**mean_losses(found), "gradient": norm.detach()}

    def _save(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))
        write_tensors(folder / self._ema_file, self.ema.state_dict())

    def _load(self, folder: Path) -> None:
        self.accelerator.load_state(str(folder))
        self.ema.load_state_dict(read_tensors(folder / self._ema_file)[0])

    @property
    def _ema_file(self) -> str:
        return f"averages-{self.accelerator.process_index}.safetensors"

    def _precision(self) -> AbstractContextManager[Any]:
        if self.options.precision == "float32":
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, torch.bfloat16)

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
                self.accelerator.process_index,
                self.accelerator.num_processes,
            ),
            collate_fn=list,
            num_workers=self.workers,
            generator=torch.Generator(),  # else it draws from the global one
        )

    def _point(self, step: int, window: list[Losses]) -> Point:
        """Log the mean losses since the last point, over all processes."""
        own = mean_losses(window)
        values = torch.stack([value.float() for value in own.values()])
        means = self.accelerator.reduce(values, "mean").tolist()
        rate = learning_rate(self.options, step - 1)
        point = {"step": step, **dict(zip(own, means, strict=True)), "learning_rate": rate}
        if self.main:
            self.stage.append(point)
        if self.board is not None:
            for name in own:
                self.board.add_scalar(f"{self.stage.name}/{name}", point[name], step)
        return point

    def _report(self, points: list[Point]) -> None:
        """Plot the losses and write samples of the current weights."""
        if self.main:
            plot_losses(self.stage.folder / "losses.png", self.stage.name, points)
        if self.main and not self.sharded:
            self.loss.eval()
            with torch.no_grad(), torch.random.fork_rng():
                self.sample()
            self.loss.train()
        self.accelerator.wait_for_everyone()
