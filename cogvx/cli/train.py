"""`cogvx train`: train a model by a recipe."""

import argparse

from .. import parallel, training
from ..parallel import launch
from ..training import STAGES, Recipe
from .console import Console
from .outputs import claimed
from .ranks import device_of_rank


def train(options: argparse.Namespace, console: Console) -> None:
    recipe = Recipe.read(options.recipe, options.settings)
    if options.stage is not None and getattr(recipe, f"{options.stage}_training") is None:
        raise ValueError(f"{options.recipe}: has no {options.stage}_training")
    device = device_of_rank(options)
    if launch.rank() == 0:  # the other ranks share its folder
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
