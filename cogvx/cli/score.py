"""`cogvx score`: what a model of the procedural clips can do, read off what it makes."""

import argparse
from functools import partial

import torch

from ..data.scoring import NAMES, Scores, score_model, score_vae
from ..pipeline import CogVideoX
from . import loading
from .console import Console


@torch.no_grad()
def score(options: argparse.Namespace, console: Console) -> None:
    device, folder = loading.device_of(options), loading.model_of(options)
    transformer, _ = loading.read_configs(folder)
    console.progress("load weights")
    dtype = loading.dtype_of(options, transformer)
    pipe = CogVideoX.from_pretrained(folder, dtype, device, variant=options.variant)
    console.progress("VAE")
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
    console.print_summary({**facts, "seconds": console.seconds}, table(scores, control, decibels))


def table(scores: Scores, control: Scores, decibels: float) -> str:
    """The scores as people read them."""
    lines = [f"{'of ' + str(scores.prompts) + ' clips':16}{'own':>8}{'another':>9}  sentence's"]
    for name in NAMES:
        own, other = getattr(scores, name), getattr(control, name)
        lines.append(f"{name:16}{own:8.1%}{other:9.1%}")
    return "\n".join([*lines, "", f"held-out clips through the VAE: {decibels:.2f} dB"])
