"""`cogvx train`: train a model by a recipe."""

import argparse

import torch

from .. import parallel, training
from ..training import STAGES, Recipe
from . import loading
from .console import Console
from .outputs import claimed


def train(options: argparse.Namespace, console: Console) -> None:
    recipe = Recipe.read(options.recipe, options.settings)
    if options.stage is not None and getattr(recipe, f"{options.stage}_training") is None:
        raise ValueError(f"{options.recipe}: has no {options.stage}_training")
    device = loading.device_of(options)
    if not torch.distributed.is_torchelastic_launched():  # else processes share the folder
        console.hold(claimed(options.out))
    losses = training.train(
        recipe,
        options.out,
        stages=STAGES if options.stage is None else (options.stage,),
        device=device,
        tensorboard=options.tensorboard,
        progress=console.progress,
    )
    parallel.stop()
    last = {f"{stage}_{k}": v for stage, points in losses.items() for k, v in points[-1].items()}
    if losses:  # else this process is one beside the main one
        console.print_summary({**last, "seconds": console.seconds, "out": str(options.out)})
