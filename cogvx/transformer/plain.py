"""Whether a module is as torch has it, so that its weights may be read in place of calling it.

peft wraps a linear layer in a module of its own, torchao puts a tensor of another type in the place
of its weight, accelerate replaces `forward`, others hang hooks on it. All of that is seen where the
module is called, and nowhere else. The same holds of autocast, which casts what enters a layer.
"""

import torch
from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is of that very class, with no hook and no `forward` of its own."""
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    return not any(getattr(module, name) for name in HOOKS)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `F.linear(x, module.weight, module.bias)` is all that calling it would do."""
    return (
        is_untouched(module, nn.Linear)
        and type(module.weight) is nn.Parameter
        and type(module.bias) is nn.Parameter
        and module.weight.is_floating_point()
    )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What a layer computes in there under autocast; None outside it."""
    # Of the meta device torch has no autocast to ask about.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
