"""Generation on several ranks: compare their inputs, share the state before the first step."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from cogvx_kernels.context_parallel import Context

from ..checkpoint.record import Record
from ..generation import WHERE
from ..schedulers import Generators
from ..validation import invalid
from .denoise import each
from .params import Request
from .resume import Saved

if TYPE_CHECKING:
    from ..parallel import Ranks


def guides_of(ranks: "Ranks | None", request: Request) -> Context | None:
    """The two groups of ranks that compute a prediction of guidance each; None without them.

    Raises ValueError if there is nothing for the second group.
    """
    guides = None if ranks is None else ranks.along("guidance")
    if guides is not None and not request.guided:
        wanted = "above 1 on two groups of ranks, one for each prediction"
        raise invalid(WHERE, "guidance", wanted, request.guidance)
    return guides


def begin_together(
    ranks: "Ranks",
    record: Record,
    begin: Callable[[], Saved],
    generator: Generators,
    device: torch.device,
) -> Saved:
    """The first rank's state before the first step, on each rank's device.

    So only the first needs a text encoder, or the file of a resumed run. Generators get the first
    rank's state. Raises ValueError, on each rank, if their records differ, with the number among
    all processes of one that does.
    """
    records = ranks.gather(record)
    for rank, other in zip(ranks.numbers, records, strict=True):
        names = [name for name, value in records[0].items() if other.get(name) != value]
        if names:
            first, here = (f"{r.get(names[0])!r:.60}" for r in (records[0], other))
            got = f"{names[0]} {first} on the first and {here} on rank {rank}"
            raise invalid(WHERE, " and ".join(names), "the same on each rank", got)
    saved = ranks.shared(lambda: begin().to(torch.device("cpu"))).to(device)
    saved.restore(each(generator))
    return saved
