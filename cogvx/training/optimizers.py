"""AdamW and Muon, and which parameters each of them trains."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .recipe import Training

# The hidden matrices of a transformer, without routers and modulation.
HIDDEN = re.compile(r"(^|\.)transformer_blocks\.\d+\.(attn1\.to_|ff\..*\.net\.).*weight$")


def make_optimizers(loss: nn.Module, options: Training) -> dict[torch.optim.Optimizer, float]:
    """Make AdamW for all parameters, or Muon for hidden matrices and AdamW for the rest.

    Returns each optimizer with its highest learning rate. Muon steps along the momentum with all
    singular values set to about one.
    """
    rest, hidden = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in loss.named_parameters():
        if parameter.requires_grad:
            orthogonal = options.optimizer == "muon" and HIDDEN.search(name)
            (hidden if orthogonal else rest).append(parameter)
    decay = options.weight_decay
    adamw = torch.optim.AdamW(rest, betas=(options.beta1, options.beta2), weight_decay=decay)
    made: dict[torch.optim.Optimizer, float] = {adamw: options.learning_rate}
    if hidden:
        made[Muon(hidden, weight_decay=decay)] = options.muon_learning_rate
    return made


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, whose iteration in bfloat16 runs in float32 on a CPU.

    A CPU without bfloat16 instructions takes some twenty times as long in it, and one with them
    would give other bits.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
        with _KeepsFloat32() if on_cpu else nullcontext():
            return super().step(closure)


class _KeepsFloat32(TorchFunctionMode):
    """Make `x.bfloat16()` a copy of x in float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.bfloat16:
            return args[0].float().clone()
        return func(*args, **(kwargs or {}))
