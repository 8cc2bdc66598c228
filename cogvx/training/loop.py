"""The loop of a training: batches to losses to weights, with checkpoints on the way.

Everything random in a step is drawn after seeding with the recipe's seed, the step and the process.
So where a training stands is the number of its step, and one that was killed goes on with the same
bits. accelerate brings what several processes and GPUs need, and saves and loads their parts.
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
from .averages import MovingAverage, is_sharded
from .batches import Batches, mixed
from .curves import board, draw_curve
from .losses import Losses, mean
from .optimizers import make_optimizers
from .recipe import Training, learning_rate, part_of_rate
from .run import Point, Stage

Tell = Callable[[str, int, int], None]


def make_accelerator(device: torch.device) -> Any:
    """accelerate's Accelerator: of the process that it launched, or of this one alone.

    Raises ModuleNotFoundError if accelerate is not installed.
    """
    accelerate = extra("accelerate", "train", "cogvx[train]")
    return accelerate.Accelerator(cpu=device.type == "cpu", mixed_precision="no")


def warn_of_emulation(precision: str, device: torch.device) -> None:
    """Warns of bfloat16 on a CPU that has no instructions for it."""
    emulated = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    if precision == "bfloat16" and emulated:
        warnings.warn(
            "train: this CPU has no instructions for bfloat16 and may take a hundred times as "
            "long with it; precision float32 is faster here",
            stacklevel=2,
        )


class Loop:
    """One model's training, from its newest checkpoint on.

    stage    its part of the run's folder, which also has its name
    loss     a module; called with what `prepare` makes of some clips it gives "loss" and its parts.
             Those of its parameters that require gradients are trained
    data     the clips
    prepare  a list of them, and the number of the step -> the arguments of `loss`, on the
             accelerator's device
    sample   draws what the model can do, now and then, and in the end, when the averages are in it
    """

    def __init__(
        self,
        stage: Stage,
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
        warn_of_emulation(options.precision, accelerator.device)
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
        self.average = MovingAverage(self.trained, options.ema_decay)
        self.board = board(stage.folder) if tensorboard and self.main else None

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and tells."""
        return bool(self.accelerator.is_main_process)

    @property
    def sharded(self) -> bool:
        """Whether no process has the whole model, so that none can run it alone."""
        return any(map(is_sharded, self.trained))

    def run(self, tell: Tell) -> list[Point]:
        """Trains what is left, puts the averages in the place of the weights, returns the curve.

        Raises FloatingPointError, naming the step, for a gradient that is not finite; what comes
        after the newest checkpoint can be done again.
        """
        options, window = self.options, list[Losses]()
        done, newest = self.stage.newest()
        points = self.stage.points(done, rewrite=self.main)
        if newest is not None:
            self._load(newest)
        for step, clips in enumerate(self._batches(done), done):
            tell(self.stage.name, step, options.steps)
            window.append(self._step(step, clips))
            end = step + 1 == options.steps
            if (step + 1) % options.log_every == 0 or end:
                points.append(self._point(step + 1, window))
                window.clear()
            if (step + 1) % options.save_every == 0 or end:
                self.stage.save(step + 1, self._save, self.main, self.accelerator.wait_for_everyone)
            if (step + 1) % options.sample_every == 0 and not end:
                with self.average.applied():
                    self._show(points)
        tell(self.stage.name, options.steps, options.steps)
        self.average.put()
        self._show(points)
        return points

    def weights(self) -> dict[str, Tensor]:
        """The state of the loss, whole: on the process that is `main`, though all must ask."""
        return dict(self.accelerator.get_state_dict(self.loss))

    def _step(self, step: int, clips: list[Any]) -> Losses:
        """One step of the optimizer, over `accumulate` parts of a batch."""
        options, accelerator = self.options, self.accelerator
        torch.manual_seed(mixed(self.seed, step, accelerator.process_index))
        for optimizer, rate in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * part_of_rate(options, step)
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
        self.average.update()
        return {**mean(found), "gradient": norm.detach()}

    def _save(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))
        write_tensors(folder / self._averages, self.average.state())

    def _load(self, folder: Path) -> None:
        self.accelerator.load_state(str(folder))
        self.average.load(read_tensors(folder / self._averages)[0])

    @property
    def _averages(self) -> str:
        return f"averages-{self.accelerator.process_index}.safetensors"

    def _precision(self) -> AbstractContextManager[Any]:
        if self.options.precision == "float32":
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, torch.bfloat16)

    def _batches(self, done: int) -> DataLoader[Any]:
        """The clips of every step that is left, as lists."""
        return DataLoader(
            self.data,
            batch_sampler=Batches(
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
            generator=torch.Generator(),  # of its own, or it would draw from the training's
        )

    def _point(self, step: int, window: list[Losses]) -> Point:
        """Of the curve: the mean since the last one, over all processes."""
        own = mean(window)
        values = torch.stack([value.float() for value in own.values()])
        means = self.accelerator.reduce(values, "mean").tolist()
        rate = learning_rate(self.options, step - 1)
        point = {"step": step, **dict(zip(own, means, strict=True)), "learning_rate": rate}
        if self.main:
            self.stage.add(point)
        if self.board is not None:
            for name in own:
                self.board.add_scalar(f"{self.stage.name}/{name}", point[name], step)
        return point

    def _show(self, points: list[Point]) -> None:
        """Draws the curve, and what the model can do with the weights that are in it."""
        if self.main:
            draw_curve(self.stage.folder / "losses.png", self.stage.name, points)
        if self.main and not self.sharded:
            self.loss.eval()
            with torch.no_grad(), torch.random.fork_rng():
                self.sample()
            self.loss.train()
        self.accelerator.wait_for_everyone()
