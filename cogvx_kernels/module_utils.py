"""Whether others have laid hands on a module: hooks on it, or a `forward` in place of its class's.

If so its weights may not be read past its forward, nor what it gives be written over: a hook may
bring the weights for the call alone, and may keep the result.
"""

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether something acts before or after the module's forward: its tensors may be elsewhere
    until it is called. A hook that is gone may have left the class's own `forward` behind."""
    held = module.__dict__.get("forward")
    if held is not None and getattr(held, "__func__", None) is not type(module).forward:
        return True
    return _hooked(module)


def is_unmodified(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is of that very class, with no hook and no `forward` of its own."""
    return type(module) is kind and "forward" not in module.__dict__ and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in HOOKS)
