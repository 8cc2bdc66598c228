"""What makes the steps of a training."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .recipe import Training

# A transformer's hidden matrices: not a router, nor what makes scales and shifts of the time.
HIDDEN = re.compile(r"(^|\.)transformer_blocks\.\d+\.(attn1\.to_|ff\..*\.net\.).*weight$")


def make_optimizers(loss: nn.Module, options: Training) -> dict[torch.optim.Optimizer, float]:
    """AdamW of all that is trained; or Muon of the hidden matrices, and AdamW of the rest.

    Each with its highest learning rate. Muon makes the singular values of a matrix's momentum all
    about one, and steps along that.
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
    """torch's, which iterates in bfloat16; on a CPU in float32.

    A CPU without instructions for bfloat16 takes some twenty times as long over such matrices,
    and one with them would take other steps.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
        with _KeepsFloat32() if on_cpu else nullcontext():
            return super().step(closure)


class _KeepsFloat32(TorchFunctionMode):
    """`x.bfloat16()` is a copy of x."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.bfloat16:
            return args[0].float().clone()
        return func(*args, **(kwargs or {}))
