"""Context parallelism of a patched CogVideoX transformer: ours, and the plan for diffusers'."""

import inspect
from typing import Any

from torch import Tensor, nn

from ..context_parallel import Context, Part
from . import forward_swap
from .common import joint

PART = "cogvx_part"  # key of this rank's `Part` in `attention_kwargs`, which reach each attention


class ContextHooks:
    """Hooks by which a transformer works on this rank's part of its joint sequence.

    Before the model rotary tables are cut, before the first block tokens; after the last layer the
    video tokens of all ranks are gathered: each rank returns the whole prediction.
    """

    def __init__(self, model: Any, context: Context) -> None:
        first = model.transformer_blocks[0]
        self.context = context
        self.part: Part | None = None  # of the forward that runs
        self.sizes: list[int] = []  # video tokens of each rank
        self.names = _names(model), _names(first)
        self.handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            first.register_forward_pre_hook(self._cut, with_kwargs=True),
            model.proj_out.register_forward_hook(self._gather),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _begin(self, model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self.part = None
        if model._cogvx_patch is None:  # loaded from a pickle, which is of the model alone
            return None
        kwargs = {**dict(zip(self.names[0], args, strict=False)), **kwargs}
        _, frames, _, height, width = kwargs["hidden_states"].shape
        patch, patch_t = model.config.patch_size, model.config.patch_size_t or 1
        text_len = kwargs["encoder_hidden_states"].shape[1]
        video_len = -(-frames // patch_t) * (height // patch) * (width // patch)
        self.part = self.context.part(text_len + video_len)
        self.sizes = self.part.video_sizes(text_len)
        if kwargs.get("image_rotary_emb") is not None:
            kwargs["image_rotary_emb"] = tuple(self.part.tables(*kwargs["image_rotary_emb"]))
        kwargs["attention_kwargs"] = {**(kwargs.get("attention_kwargs") or {}), PART: self.part}
        return (), kwargs

    def _cut(self, block: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = {**dict(zip(self.names[1], args, strict=False)), **kwargs}
        part: Part | None = (kwargs.get("attention_kwargs") or {}).get(PART)
        if part is None:
            return None
        text, video = kwargs["encoder_hidden_states"], kwargs["hidden_states"]
        own = part.text_len(text.shape[1])
        text, video = part.narrow(joint(text, video), 1).split([own, part.length - own], dim=1)
        return (), {**kwargs, "encoder_hidden_states": text, "hidden_states": video}

    def _gather(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        part, self.part = self.part, None  # also for calls of the layer alone, later
        return output if part is None else self.context.gather(output, self.sizes)


def _names(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a module's forward."""
    return tuple(inspect.signature(forward_swap.own(module)).parameters)[1:]


def has_diffusers_parallelism(model: Any) -> bool:
    return getattr(model, "_parallel_config", None) is not None


def add_diffusers_plan(model: Any) -> None:
    """Give a CogVideoX transformer the plan that diffusers' `enable_parallelism` needs: text and
    video tokens are each cut, video is gathered after the last layer."""
    theirs = _diffusers()
    if theirs is None:
        return
    tokens = theirs.ContextParallelInput(split_dim=1, expected_dims=3)
    rows = theirs.ContextParallelInput(split_dim=0, expected_dims=2)
    plan: dict[str, Any] = {
        "transformer_blocks.0": {"hidden_states": tokens, "encoder_hidden_states": tokens},
        "transformer_blocks.*": {"image_rotary_emb": [rows, rows]},
        "proj_out": theirs.ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
    model._cp_plan = plan


def remove_diffusers_plan(model: Any) -> None:
    """Take the plan back, and end the parallelism that was enabled by it."""
    plan = model.__dict__.pop("_cp_plan", None)
    if plan is None or not has_diffusers_parallelism(model):
        return
    _diffusers().remove_context_parallel(model, plan)
    model._parallel_config = None


def _diffusers() -> Any:
    """diffusers' module of context parallelism; None before diffusers 0.36, which has none."""
    try:
        from diffusers.hooks import context_parallel
    except ImportError:
        return None
    return context_parallel
