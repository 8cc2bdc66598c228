"""`python -m benchmarks.experts`: quality of experts for text and video, at equal training.

The transformer of a finished training, or of the packaged model, is trained from nothing with the
same VAE, steps, clips and seeds: with one feed-forward for both modalities (shared), with one for
each (modality), and with several for video and a router (routed). Printed are losses and scores of
every seed, their mean and spread; `held_out` is the loss over clips of the test split, with the
same noise and times for all. For the time of a step: `python -m benchmarks --op expert_ffn`.
"""

import argparse
import csv
import dataclasses
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cogvx import CogVideoX
from cogvx.assets import located
from cogvx.schedulers import NoiseSchedule
from cogvx.shapes import ProceduralClips
from cogvx.shapes.scoring import NAMES, score_model
from cogvx.training import Recipe, train
from cogvx.training.losses import VelocityLoss
from cogvx.training.recipe import PRECISIONS, TransformerTraining

from .conditions import conditions

KINDS = {
    "shared": {"num_text_experts": 0, "num_video_experts": 0},
    "modality": {"num_text_experts": 1, "num_video_experts": 1},
    "routed": {"num_text_experts": 1, "num_video_experts": 4},
}
NUMBERS = ("loss", "held_out", *NAMES)
AT_ONCE = 20  # held-out clips


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=__doc__)
    add = parser.add_argument
    add("--run", type=located, default="tiny", help="of procedural clips; by default tiny")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add("--seeds", type=int, default=3)
    add("--steps", type=int, help="by default the recipe's")
    add("--clips", type=int, help="by default the recipe's, and the run's latents")
    add("--precision", choices=PRECISIONS, help="by default the recipe's")
    add("--prompts", type=int, default=100)
    add("--held-out", type=int, default=400, help="clips; default 400")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("out"))
    options = parser.parse_args(arguments)
    command = " ".join(["benchmarks.experts", *sys.argv[1:]])
    found, rows = conditions(torch.device(options.device), command), []
    for kind in options.kinds:
        for seed in range(options.seeds):
            rows.append(one(options, kind, seed))
            print(line(f"{kind} {seed}", rows[-1]), flush=True)
    for kind in options.kinds:
        print(summary(kind, [row for row in rows if row["kind"] == kind]))
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "experts.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *found], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **found} for row in rows)
    return 0


def one(options: argparse.Namespace, kind: str, seed: int) -> dict[str, Any]:
    """The row of a training of that kind, which continues where it was stopped."""
    folder = options.out / f"experts-{kind}-{seed}"
    recipe = override_recipe(options, kind, seed)
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        shutil.copytree(options.run / "vae", part / "vae")
        (part / "latents").symlink_to(latents(options).resolve())  # gigabytes
        (part / "recipe.json").write_text(json.dumps(recipe.to_dict()))
        part.rename(folder)
    training = recipe.transformer_training
    assert training is not None  # or override_recipe had raised
    points = train(recipe, folder, stages=["transformer"], device=options.device)["transformer"]
    pipe = CogVideoX.from_pretrained(folder, torch.float32, options.device)
    scores, _ = score_model(pipe, options.prompts)
    tail = points[-max(1, len(points) // 10) :]
    return {
        "kind": kind,
        "seed": seed,
        "steps": training.steps,
        "clips": recipe.data.clips,
        "precision": training.precision,
        "parameters": sum(p.numel() for p in pipe.transformer.parameters()),
        "loss": statistics.mean(point.get("velocity", point["loss"]) for point in tail),
        "held_out": held_out(pipe, recipe, options.held_out),
        **scores.to_dict(),
    }


@torch.no_grad()
def held_out(pipe: CogVideoX, recipe: Recipe, count: int) -> float:
    """The squared error of v over `count` clips of the test split."""
    data, words, weight = recipe.data, pipe.text_encoder, next(pipe.vae.parameters())
    assert words is not None  # of procedural clips
    text_len = pipe.transformer.config.max_text_seq_length
    clips = ProceduralClips("test", count, data.frames, data.height, data.width)
    loss = VelocityLoss(pipe.transformer, NoiseSchedule(pipe.scheduler), TransformerTraining())
    torch.manual_seed(0)
    errors = []
    for first in range(0, count, AT_ONCE):
        batch = [clips[index] for index in range(first, min(first + AT_ONCE, count))]
        video = torch.stack([clip.video for clip in batch]).to(weight)
        latents = pipe.vae.encode(video).mode() * pipe.vae.config.scaling_factor
        text = words.encode([clip.caption for clip in batch], text_len).to(latents)
        found = loss(latents, text)
        errors.append(float(found.get("velocity", found["loss"])))
    return statistics.mean(errors)


def latents(options: argparse.Namespace) -> Path:
    """Latents of the run; or, if it has none of so many clips, a folder for all trainings."""
    known: Path = options.run / "latents"
    if options.clips is None and known.is_dir():
        return known
    shared: Path = options.out / "latents"  # filled by the first training
    shared.mkdir(exist_ok=True)
    return shared


def override_recipe(options: argparse.Namespace, kind: str, seed: int) -> Recipe:
    """The recipe of a run, of another kind and seed."""
    path = options.run / "recipe.json"
    if path.exists():
        recipe = Recipe.from_dict(json.loads(path.read_text()))
    else:
        recipe = Recipe.read(options.run / "recipe.toml")  # of a model that was packaged
    training = recipe.transformer_training
    if recipe.transformer is None or training is None:
        raise ValueError(f"{options.run}: must be a training with a transformer of its own")
    given = {name: getattr(options, name) for name in ("steps", "precision")}
    given = {name: value for name, value in given.items() if value is not None}
    training = dataclasses.replace(training, **given)
    data = recipe.data
    if options.clips is not None:
        data = dataclasses.replace(data, clips=options.clips)
    transformer = dataclasses.replace(recipe.transformer, **KINDS[kind])
    return dataclasses.replace(
        recipe, seed=seed, data=data, transformer=transformer, transformer_training=training
    )


def line(name: str, row: dict[str, Any]) -> str:
    numbers = "  ".join(f"{number} {row[number]:.4f}" for number in NUMBERS)
    return f"{name:12} {row['parameters']:>12,} parameters  {numbers}"


def summary(kind: str, rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds."""
    parts = []
    for number in NUMBERS:
        values = [row[number] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        parts.append(f"{number} {statistics.mean(values):.4f} ± {spread:.4f}")
    return f"{kind:12} {len(rows)} seeds  {'  '.join(parts)}"


if __name__ == "__main__":
    sys.exit(main())
