"""Dynamic guidance scale."""

import math


def dynamic_guidance(guidance: float, timestep: int, num_steps: int) -> float:
    """Guidance scale of one step under "dynamic CFG", between 1 and 1 + guidance.

    1 + guidance·(1 - cos(π·((num_steps - timestep)/num_steps)⁵))/2, where timestep is the training
    timestep, 999 at the start, not the step index: the guidance oscillates until about timestep 100
    and ends near 1. It looks like a bug, but the models were published with it, in SAT and in
    diffusers, and the authors kept it.

    guidance   the requested scale, 6 by default
    timestep   0 to 999
    num_steps  of this run; fewer than requested if `strength` < 1

    >>> round(dynamic_guidance(6, 999, 50), 4)
    2.2915

    Source: `docs/model.md`, section 5.5; CogVideo issue 267.
    """
    phase = math.pi * ((num_steps - timestep) / num_steps) ** 5.0
    return 1 + guidance * ((1 - math.cos(phase)) / 2)
