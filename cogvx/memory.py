"""Count the bytes of live tensors, on any device.

`LiveBytes` sees every tensor that torch operations create, through the dispatcher, on the meta
device, too: `cogvx.plan` uses that. It does not see memory allocated inside one operation (a
convolution's workspace), nor an allocator's rounding and fragmentation.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Count the bytes of tensors created inside it: `now` and, since the last `reset`, `peak`.

    Existing tensors are not counted unless passed to `count`.

    >>> with LiveBytes() as live:
    ...     x = torch.zeros(1000).exp().sum()
    >>> live.peak, live.now
    (8000, 4)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._seen.update(_storages(args, kwargs))  # a view of one of these is not new
        out = func(*args, **kwargs)
        self.count(out)
        return out

    def count(self, *tensors: Any) -> None:
        """Count the storages of tensors (in any nesting) until they are freed."""
        for storage in _storages(tensors):
            if storage not in self._seen:
                self._seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def _freed(self, nbytes: int) -> None:
        self.now -= nbytes

    def reset(self) -> None:
        """Reset the peak to `now`."""
        self.peak = self.now


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, each storage once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({storage._cdata: storage.nbytes() for storage in _storages(tensors)}.values())


_SCALARS = {int, float, bool, str, type(None), torch.dtype, torch.device}


def _storages(*tensors: Any) -> list[torch.UntypedStorage]:
    # Without torch's pytree: this runs twice for every operation, and takes half the time.
    found, left = [], [*tensors]
    while left:
        x = left.pop()
        if type(x) in _SCALARS:  # most arguments, in a fifth of the time
            continue
        if isinstance(x, Tensor):
            if hasattr(x, "__tensor_flatten__"):  # a wrapper, such as DTensor, has no storage
                left.extend(getattr(x, name) for name in x.__tensor_flatten__()[0])
            elif x.layout is torch.strided:
                found.append(x.untyped_storage())
        elif isinstance(x, list | tuple | set):
            left.extend(x)
        elif isinstance(x, Mapping):
            left.extend(x.values())
    return found
