"""`cogvx train`: a recipe to a model."""

import argparse
from pathlib import Path
from typing import Any

import torch

from ..training import STAGES, Recipe, train
from . import arguments
from .console import Console


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "train", parents=[shared], help="a recipe to a model; goes on where it was stopped"
    )
    parser.add_argument("recipe", help="a TOML file; or tiny, the recipe of the model tiny")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the model's folder")
    parser.add_argument("--stage", choices=STAGES, help="only this one; by default all")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="over what the recipe says: transformer_training.steps=100",
    )  # fmt: skip
    parser.add_argument("--tensorboard", action="store_true", help="also write its files")
    parser.add_argument("--device", help="cpu, cuda, …; a GPU if there is one")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> None:
    recipe = Recipe.read(options.recipe, options.settings)
    if options.stage is not None and getattr(recipe, f"{options.stage}_training") is None:
        raise ValueError(f"{options.recipe}: has no {options.stage}_training")
    with torch.enable_grad():
        curves = train(
            recipe,
            options.out,
            stages=STAGES if options.stage is None else (options.stage,),
            device=arguments.device_of(options),
            tensorboard=options.tensorboard,
            tell=console.progress,
        )
    last = {f"{stage}_{k}": v for stage, points in curves.items() for k, v in points[-1].items()}
    if curves:  # else this process is one beside the main one
        console.say({**last, "seconds": console.seconds, "out": str(options.out)})
