"""Argument names of diffusers, taken by `CogVideoX.generate` beside its own."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

# diffusers' name: ours. Names that both have (num_frames, height, generator, …) mean the same.
DIFFUSERS = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "use_dynamic_cfg": "dynamic_guidance",
    "max_sequence_length": "text_length",
    "output_type": "output",
    "callback_on_step_end": "callback",
}
WITHOUT_COUNTERPART = (
    "timesteps",
    "eta",
    "return_dict",
    "attention_kwargs",
    "callback_on_step_end_tensor_inputs",
)


def takes_diffusers_names(function: F) -> F:
    """A method that also takes its arguments by the names of `DIFFUSERS`.

    Raises TypeError if both names of an argument are given, and for an unknown name, with those
    that are like it.
    """
    own = list(inspect.signature(function).parameters)[1:]
    where = function.__qualname__

    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **given: Any) -> Any:
        taken = {}
        for name, value in given.items():
            if name not in own and name not in DIFFUSERS:
                raise TypeError(f"{where}: {_unknown(name, own)}")
            ours = DIFFUSERS.get(name, name)
            if ours != name and (ours in given or ours in own[: len(args)]):
                raise TypeError(
                    f"{where}: {name} of diffusers and {ours} are one argument; got both"
                )
            taken[ours] = value if ours == name else _translated(self, where, name, value)
        return function(self, *args, **taken)

    return cast(F, wrapper)


def _unknown(name: str, own: list[str]) -> str:
    if name in WITHOUT_COUNTERPART:
        return f"{name} of diffusers has no counterpart here; leave it out"
    like = difflib.get_close_matches(name, [*own, *DIFFUSERS], n=2)
    hint = f"; did you mean {' or '.join(like)}?" if like else ""
    return f"unknown argument {name}{hint}"


def _translated(pipe: Any, where: str, name: str, value: Any) -> Any:
    """The value of an argument of diffusers as ours has it."""
    if name == "output_type":
        if value == "latent":
            return "latents"
        raise ValueError(
            f'{where}: output_type must be "latent", which is output="latents"; got {value!r}. A '
            "video comes as a tensor (batch, frames, 3, height, width) in [-1, 1]: "
            "cogvx.video.write_video(path, video, fps) writes it to a file, and (video + 1) / 2 "
            'is diffusers\' "pt"'
        )
    if name == "callback_on_step_end" and value is not None:

        def callback(step: int, timestep: int, latents: Tensor) -> Tensor | None:
            changed = value(pipe, step, timestep, {"latents": latents})
            return (changed or {}).get("latents")

        return callback
    return value
