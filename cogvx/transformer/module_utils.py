"""Detect linear layers that are unmodified, so that kernels may read their weights directly.

peft wraps linear layers, torchao replaces their weights by tensor subclasses, accelerate replaces
`forward`, others add hooks: those layers must be called.
"""

from torch import nn

from cogvx_kernels.module_utils import is_unmodified


def is_plain_linear(module: nn.Module) -> bool:
    """True if calling the module is just `F.linear(x, module.weight, module.bias)`."""
    return (
        is_unmodified(module, nn.Linear)
        and type(module.weight) is nn.Parameter
        and type(module.bias) is nn.Parameter
        and module.weight.is_floating_point()
    )
