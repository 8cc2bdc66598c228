"""Replace and restore the innermost `forward` of a module, beneath all hooks.

accelerate and diffusers wrap the forward of an instance in their hooks (offloading, caching, casts)
and keep the one they found. Ours replaces the innermost, so that hooks stay around it whether they
came before or after, and restoring leaves each of them in place.
"""

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import nn

Forward = Callable[..., Any]


def own(module: nn.Module) -> Forward:
    """The `forward` of the module's class."""
    return type(module).forward


def obstacle(module: nn.Module) -> str | None:
    """Reason why the module's forward cannot be replaced, or None."""
    found = _innermost(module)
    return found if isinstance(found, str) else None


def replace(module: nn.Module, forward: Forward) -> None:
    """Replace the module's innermost forward by the function `forward`. Needs no `obstacle`."""
    found = _innermost(module)
    assert not isinstance(found, str), found
    setattr(*found, MethodType(forward, module))


def restore(module: nn.Module) -> None:
    """Put the class's own forward back where ours is."""
    found = _innermost(module)
    if isinstance(found, str):
        return
    holder, name = found
    if holder is module and name == "forward":
        module.__dict__.pop("forward", None)
    else:
        setattr(holder, name, MethodType(own(module), module))


def _innermost(module: nn.Module) -> tuple[Any, str] | str:
    """(holder, attribute) of the innermost forward; or the reason why it is unknown."""
    if "forward" not in module.__dict__:
        return module, "forward"
    for holder, name in _places(module):
        value = getattr(holder, name, None)
        if isinstance(value, MethodType) and value.__self__ is module and _known(value, module):
            return holder, name
    return f"its forward was replaced by {module.__dict__['forward']!r}, which is not a known hook"


def _known(method: MethodType, module: nn.Module) -> bool:
    """True for the class's own forward and for those of this package."""
    function: Any = method.__func__
    return function is own(module) or function.__module__.startswith(f"{__package__}.")


def _places(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """(holder, attribute) of all forwards that hooks may keep, the inner ones first."""
    registry = module.__dict__.get("_diffusers_hook")
    for reference in getattr(registry, "_fn_refs", ()):
        yield reference, "original_forward"
        yield reference, "forward"
    if "_old_forward" in module.__dict__:
        yield module, "_old_forward"
    yield module, "forward"
