"""From noise to video in n steps: which timesteps, and where each step goes."""

from dataclasses import dataclass

from .noise_schedule import CLEAN


@dataclass(frozen=True)
class Trajectory:
    """The timesteps that a solver visits, falling, and the one that each step goes to.

    timesteps  where the model is asked
    targets    where its answer takes x: the next of the timesteps, at the end `CLEAN`
    """

    timesteps: tuple[int, ...]
    targets: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.timesteps)


def trajectory(
    num_steps: int, num_train_timesteps: int = 1000, strength: float = 1.0, compat: bool = False
) -> Trajectory:
    """`num_steps` timesteps spread evenly over the training's, the last int(num_steps·strength).

    "Trailing" spacing: 1000 - i·1000/n, rounded, less 1; of 50 steps they are 999, 979, …, 19.
    Each step goes to the next timestep and the last one to no noise, for every number of steps.

    compat  each step goes from t to t - 1000 // n, as in diffusers. It is the same where n divides
            1000. Elsewhere x is then taken to a timestep other than the one that the model is told
            next, and with 60 steps the last one stops at timestep 0 and leaves noise.

    For 62 numbers of steps, 61 the smallest, diffusers lists one more timestep, which is -1 and
    which its tables read as the noisiest of all. Such a step is left out here, with compat too.

    Raises ValueError unless num_steps is in [1, num_train_timesteps] and strength, in (0, 1],
    leaves a step. Source: fact sheet section 5.1.
    """
    integer = isinstance(num_steps, int) and not isinstance(num_steps, bool)
    if not integer or not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(
            f"trajectory: num_steps must be an integer in [1, {num_train_timesteps}]; "
            f"got {num_steps!r}"
        )
    if not 0 < strength <= 1 or int(num_steps * strength) < 1:
        raise ValueError(
            f"trajectory: strength must be at most 1 and leave one of {num_steps} steps: at least "
            f"1/{num_steps}; got {strength}"
        )
    # The stride as numpy.arange makes it: its error decides the ties, of which 48 steps have some.
    stride = num_train_timesteps - (num_train_timesteps - num_train_timesteps / num_steps)
    timesteps = tuple(round(num_train_timesteps - i * stride) - 1 for i in range(num_steps))
    if compat:
        jump = num_train_timesteps // num_steps
        targets = tuple(max(t - jump, CLEAN) for t in timesteps)
    else:
        targets = (*timesteps[1:], CLEAN)
    kept = num_steps - int(num_steps * strength)
    return Trajectory(timesteps[kept:], targets[kept:])
