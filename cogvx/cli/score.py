"""`cogvx score`: what a model of the procedural clips can do, read off what it makes."""

import argparse
from functools import partial
from typing import Any

from ..data.scoring import NAMES, Scores, score_model, score_vae
from ..pipeline import CogVideoX
from . import arguments
from .console import Console


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "score", parents=[shared], help="how often clips show what held-out sentences say"
    )
    arguments.add_model(parser, default="tiny")
    parser.add_argument("--prompts", type=arguments.count, default=200)
    parser.add_argument("--skip", type=arguments.whole, default=0, help="leave out so many first")
    arguments.add_sampling(parser)
    arguments.add_machine(parser, tiles=False)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> None:
    pipe = CogVideoX.from_pretrained(
        options.model, arguments.dtype_of(options), arguments.device_of(options)
    )
    decibels = score_vae(pipe.vae)
    scores, control = score_model(
        pipe,
        options.prompts,
        skip=options.skip,
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed,
        progress=partial(console.progress, "clips"),
    )
    facts = {"psnr_db": round(decibels, 2), **scores.to_dict(), "control": control.to_dict()}
    console.say({**facts, "seconds": console.seconds}, table(scores, control, decibels))


def table(scores: Scores, control: Scores, decibels: float) -> str:
    """The scores as people read them."""
    lines = [f"{'of ' + str(scores.prompts) + ' clips':16}{'own':>8}{'another':>9}  sentence's"]
    for name in NAMES:
        own, other = getattr(scores, name), getattr(control, name)
        lines.append(f"{name:16}{own:8.1%}{other:9.1%}")
    return "\n".join([*lines, "", f"held-out clips through the VAE: {decibels:.2f} dB"])
