"""Timesteps of a run ("trailing" spacing)."""

from dataclasses import dataclass

from .noise_schedule import FINAL


@dataclass(frozen=True)
class TimestepSchedule:
    """Timesteps of a run, descending.

    timesteps       where the model is evaluated
    next_timesteps  where each step leads (diffusers' `prev_timestep`); `FINAL` for the last
    """

    timesteps: tuple[int, ...]
    next_timesteps: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.timesteps)


def timestep_schedule(
    num_steps: int, num_train_timesteps: int = 1000, strength: float = 1.0, compat: bool = False
) -> TimestepSchedule:
    """The last int(num_steps·strength) of `num_steps` evenly spaced timesteps.

    "Trailing" spacing: round(1000 - i·1000/n) - 1; for 50 steps 999, 979, …, 19. Each step leads to
    the next timestep and the last one to no noise, for every number of steps.

    compat  each step leads from t to t - 1000 // n, as in diffusers, which is the same if n divides
            1000. Otherwise x is then at a timestep other than the one passed to the model next, and
            with 60 steps the last one stops at timestep 0 and leaves noise.

    For 62 numbers of steps, 61 the smallest, diffusers lists one more timestep, -1, which indexes
    the noisiest entry of its tables. That step is left out here, with compat too.

    Raises ValueError unless num_steps is in [1, num_train_timesteps] and strength, in (0, 1],
    leaves a step. Source: `docs/model.md`, section 5.1.
    """
    integer = isinstance(num_steps, int) and not isinstance(num_steps, bool)
    if not integer or not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(
            f"timestep_schedule: num_steps must be an integer in [1, {num_train_timesteps}]; "
            f"got {num_steps!r}"
        )
    if not 0 < strength <= 1 or int(num_steps * strength) < 1:
        raise ValueError(
            f"timestep_schedule: strength must be at most 1 and leave one of {num_steps} steps: at "
            f"least 1/{num_steps}; got {strength}"
        )
    # The stride as in numpy.arange: its rounding error decides ties, as for 48 steps.
    stride = num_train_timesteps - (num_train_timesteps - num_train_timesteps / num_steps)
    timesteps = tuple(round(num_train_timesteps - i * stride) - 1 for i in range(num_steps))
    if compat:
        jump = num_train_timesteps // num_steps
        next_timesteps = tuple(max(t - jump, FINAL) for t in timesteps)
    else:
        next_timesteps = (*timesteps[1:], FINAL)
    kept = num_steps - int(num_steps * strength)
    return TimestepSchedule(timesteps[kept:], next_timesteps[kept:])
