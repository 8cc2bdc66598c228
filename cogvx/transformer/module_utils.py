"""Whether a module is as torch has it, so that its weights may be read in place of calling it.

peft wraps a linear layer in a module of its own, torchao puts a tensor of another type in the place
of its weight, accelerate replaces `forward`, others hang hooks on it. All of that is seen where the
module is called, and nowhere else.
"""

from torch import nn

from cogvx_kernels.module_utils import is_unmodified


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `F.linear(x, module.weight, module.bias)` is all that calling it would do."""
    return (
        is_unmodified(module, nn.Linear)
        and type(module.weight) is nn.Parameter
        and type(module.bias) is nn.Parameter
        and module.weight.is_floating_point()
    )
