"""Keyword arguments of `CogVideoX.generate`: `GenerationParams`, and diffusers' names."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from ..generation import WHERE, GenerationParams
from ..validation import did_you_mean

F = TypeVar("F", bound=Callable[..., Any])

FIELDS = inspect.signature(GenerationParams).parameters
# diffusers' name: ours. Names that both have (num_frames, height, generator, …) mean the same.
DIFFUSERS = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "use_dynamic_cfg": "dynamic_guidance",
    "max_sequence_length": "text_length",
    "output_type": "output",
    "callback_on_step_end": "callback",
}
DEPRECATED = {"scheduler": "solver"}
RENAMED = {**DIFFUSERS, **DEPRECATED}
WITHOUT_COUNTERPART = (
    "timesteps",
    "eta",
    "return_dict",
    "attention_kwargs",
    "callback_on_step_end_tensor_inputs",
)


def merge_options(
    pipe: Any, prompt: Any, params: GenerationParams | None, options: Mapping[str, Any]
) -> GenerationParams:
    """Replace fields of `params` (by default, of the defaults) by the options that are given.

    Raises TypeError for an unknown name, with similar ones, and for two names of one option.
    """
    if params is not None and not isinstance(params, GenerationParams):
        raise TypeError(f"{WHERE}: params must be GenerationParams; got {type(params).__name__}")
    given = {} if prompt is None else {"prompt": prompt}
    for name, value in options.items():
        if name not in FIELDS and name not in RENAMED:
            raise TypeError(f"{WHERE}: {_unknown(name)}")
        ours = RENAMED.get(name, name)
        if ours != name and ours in options:
            origin = " of diffusers" if name in DIFFUSERS else ""
            raise TypeError(f"{WHERE}: {name}{origin} and {ours} are one argument; got both")
        if name in DEPRECATED:
            message = f"{WHERE}: {name} is deprecated; use {ours}"
            warnings.warn(message, DeprecationWarning, stacklevel=4)
        given[ours] = _translated(pipe, name, value)
    return replace(params or GenerationParams(), **given)


def documents_options(function: F) -> F:
    """Show the fields of `GenerationParams` in `help()` of a method that takes **options."""
    parameters = list(inspect.signature(function).parameters.values())[:-1]
    keywords = [p.replace(kind=p.KEYWORD_ONLY) for name, p in FIELDS.items() if name != "prompt"]
    returns = inspect.signature(function).return_annotation
    signature = inspect.Signature([*parameters, *keywords], return_annotation=returns)
    vars(function)["__signature__"] = signature
    if function.__doc__ and GenerationParams.__doc__:  # None under python -OO
        fields = inspect.cleandoc(GenerationParams.__doc__).partition("Args:")[2]
        function.__doc__ = f"{inspect.cleandoc(function.__doc__)}\n\nOptions:{fields}"
    return function


def _unknown(name: str) -> str:
    if name in WITHOUT_COUNTERPART:
        return f"{name} of diffusers has no counterpart here; leave it out"
    return f"unknown argument {name}{did_you_mean(name, [*FIELDS, *DIFFUSERS], most=2)}"


def _translated(pipe: Any, name: str, value: Any) -> Any:
    """Our value of an argument of diffusers; other values unchanged."""
    if name == "output_type":
        if value == "latent":
            return "latents"
        raise ValueError(
            f'{WHERE}: output_type must be "latent", which is output="latents"; got {value!r}. A '
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
