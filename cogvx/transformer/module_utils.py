"""Detect linear layers that are unmodified, so that kernels may read their weights; shards.

peft wraps linear layers, torchao replaces their weights by tensor subclasses, accelerate replaces
`forward`, others add hooks: those layers must be called.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from cogvx_kernels.module_utils import is_unmodified


def is_plain_linear(module: nn.Module) -> bool:
    """True if calling the module is just `F.linear(x, module.weight, module.bias)`."""
    return (
        is_unmodified(module, nn.Linear)
        and type(module.weight) is nn.Parameter
        and type(module.bias) is nn.Parameter
        and module.weight.is_floating_point()
    )


def is_sharded(tensor: Tensor) -> bool:
    """Return True for a DTensor, without importing its class, which takes most of a second."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """This rank's shard of a DTensor, in the same memory; any other tensor itself."""
    shard: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return shard


@contextmanager
def gathered(*modules: nn.Module | None) -> Iterator[None]:
    """Whole weights of sharded modules inside the context, for calls beside FSDP2's own forward.

    Every rank must enter it.
    """
    sharded = [
        (module, name, weight)
        for root in modules
        if root is not None
        for module in root.modules()
        for name, weight in module.named_parameters(recurse=False)
        if is_sharded(weight)
    ]
    for module, name, weight in sharded:
        whole: Any = weight.detach()
        module.register_parameter(name, nn.Parameter(whole.full_tensor(), False))
    try:
        yield
    finally:
        for module, name, weight in sharded:
            module.register_parameter(name, weight)
