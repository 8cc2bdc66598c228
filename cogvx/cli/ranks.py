"""The ranks of a command that torchrun started."""

import argparse
import shlex
import warnings

import torch.distributed as dist

from .. import parallel
from ..parallel import Ranks
from .console import Console
from .loading import device_of


def start(
    options: argparse.Namespace, console: Console, guided: bool, many: bool = False
) -> Ranks | None:
    """Ranks of `--context-parallel` and `--cfg-parallel`; None in a single process.

    Under torchrun without these options guidance takes two groups, if there is guidance and the
    number of processes is even, and the context the rest; with `many` videos each process makes its
    own. Only the first rank prints. Raises ValueError if there is no torchrun, with the command to
    type.
    """
    requested = options.context_parallel is not None or options.cfg_parallel
    if not parallel.launched():
        if requested:
            size = (options.context_parallel or 1) * (1 + options.cfg_parallel)
            typed = shlex.join(["torchrun", "--nproc-per-node", str(size), "-m", "cogvx"])
            raise ValueError(
                "--context-parallel and --cfg-parallel need processes of torchrun. Type "
                f"{typed} {shlex.join(options.typed)}"
            )
        return None
    device = device_of(options)
    if device.index is not None:
        raise ValueError(
            f"--device must be cpu or cuda under torchrun, where a process takes the GPU of its "
            f"number; got {device}"
        )
    world = parallel.world_size()
    pair = options.cfg_parallel if requested or many else guided and world % 2 == 0
    guidance, context, data = 1 + pair, options.context_parallel, 1
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
