"""Detect hooks and overridden `forward` on a module.

The weights of such a module must not be read without calling it, nor its output be overwritten: a
hook may load the weights for the call alone, and may keep the result.
"""

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """True if the module has hooks or another `forward` than its class's. A removed hook may have
    left the class's own `forward` in the instance."""
    own = module.__dict__.get("forward")
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        return True
    return _hooked(module)


def is_unmodified(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True if the module is of exactly that class, without hooks or a `forward` of its own."""
    return type(module) is kind and "forward" not in module.__dict__ and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in HOOKS)
