"""How much the text weighs, step by step."""

import math


def dynamic_guidance(guidance: float, timestep: int, num_steps: int) -> float:
    """The guidance of one step under "dynamic CFG", between 1 and 1 + guidance.

    1 + guidance·(1 - cos(π·((num_steps - timestep)/num_steps)⁵))/2, where timestep is that of the
    *training*, 999 at the start, and not the number of the step. So the guidance jumps up and down
    until timestep 100 or so, and ends near 1. It looks like a slip, but the models were published
    with it, in both stacks, and their authors kept it.

    guidance   the scale that generation was asked for, 6 by default
    timestep   0 to 999
    num_steps  of this run: fewer than asked where `strength` left some out

    >>> round(dynamic_guidance(6, 999, 50), 4)
    2.2915

    Source: fact sheet section 5.5; CogVideo issue 267.
    """
    phase = math.pi * ((num_steps - timestep) / num_steps) ** 5.0
    return 1 + guidance * ((1 - math.cos(phase)) / 2)
