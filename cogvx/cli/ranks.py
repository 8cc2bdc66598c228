"""The ranks of a command that torchrun started."""

import argparse
import shlex
import warnings

import torch
import torch.distributed as dist

from .. import parallel
from ..parallel import Ranks
from ..vae import CausalVAE, Decoder, Tiling
from .console import Console
from .loading import device_of


def device_of_rank(options: argparse.Namespace) -> torch.device:
    """Device of `--device`. Raises ValueError under torchrun if it names one GPU for all."""
    device = device_of(options)
    if device.index is not None and parallel.launched():
        raise ValueError(
            f"--device must be cpu or cuda under torchrun, where a process takes the GPU of its "
            f"number; got {device}"
        )
    return device


def start(
    options: argparse.Namespace, console: Console, guided: bool = False, many: bool = False
) -> Ranks | None:
    """Ranks of `--context-parallel` and `--cfg-parallel`; None in a single process.

    Under torchrun without these options guidance takes two groups, if there is guidance and the
    number of processes is even, and the context the rest; with `many` videos each process makes its
    own. Only the first rank prints. Raises ValueError if there is no torchrun, with the command to
    type, or no guidance for `--cfg-parallel`.
    """
    context = getattr(options, "context_parallel", None)  # a VAE's commands have no such options
    cfg = getattr(options, "cfg_parallel", False)
    requested = context is not None or cfg
    if cfg and not (guided or many):
        raise ValueError(
            "--cfg-parallel must come with a --guidance above 1, whose two predictions it shares; "
            f"got {options.guidance:g}"
        )
    if not parallel.launched():
        if requested:
            size = (context or 1) * (1 + cfg)
            typed = shlex.join(["torchrun", "--nproc-per-node", str(size), "-m", "cogvx"])
            raise ValueError(
                "--context-parallel and --cfg-parallel need processes of torchrun. Type "
                f"{typed} {shlex.join(options.typed)}"
            )
        return None
    device = device_of_rank(options)
    world = parallel.world_size()
    pair = cfg if requested or many else guided and world % 2 == 0
    guidance, data = 1 + pair, 1
    unit = guidance * (context or 1)
    free = many or context is None
    if world % unit if free else world != unit:
        given = " and ".join(
            name
            for name, on in (("--cfg-parallel", cfg), (f"--context-parallel {context}", context))
            if on
        )
        raise ValueError(
            f"{given} must have {'a multiple of ' if free else ''}{unit} processes; got {world}: "
            f"type torchrun --nproc-per-node {max(1, world // unit) * unit if free else unit}"
        )
    if many:
        context = context or 1
        data = max(1, world // (guidance * context))
    ranks = Ranks(parallel.start(guidance, context, data, device.type))
    if dist.get_rank():
        console.quiet, console.as_json = True, False
        warnings.simplefilter("ignore")  # the first rank has the same; `cogvx.cli` restores it
    mesh = ranks.mesh
    console.note(
        f"{mesh.size()} processes: {f'data {data} x ' if many else ''}guidance "
        f"{mesh['guidance'].size()} x context {mesh['context'].size()}"
    )
    return ranks


def share(vae: CausalVAE | Decoder, ranks: Ranks | None, tiling: Tiling | None) -> None:
    """Run a VAE's chunks in relay on the ranks, or its tiles, if there are."""
    if ranks is not None:
        method = "relay" if tiling is None else "tiles"
        parallel.vae_parallel(vae, ranks.mesh, method=method)


def end(ranks: Ranks | None) -> None:
    """Leave the process group once all ranks are done."""
    if ranks is not None:
        dist.barrier()
        parallel.stop()
