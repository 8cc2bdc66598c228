"""Counted cost of a part of a model: launches, bytes, bytes kept for the backward, waits."""

import contextlib
from collections import Counter
from unittest import mock

import torch
from torch._library.custom_ops import OPDEFS
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from tests.harness.observe import observe

# They allocate or make views: no kernel runs.
NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_",
             "_unsafe_view", "detach", "alias", "lift_fresh", "set_", "promote_types"}  # fmt: skip
# Bound by arithmetic: products of matrices, and attention.
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "expert_ffn", "_addmm_activation"}
ATTENTION = "_scaled_dot_product"
# The host must see the device's numbers before it can go on.
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "bincount", "masked_select",
         "unique_consecutive", "_unique2", "unique_dim", "repeat_interleave"}  # fmt: skip
QUESTIONS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"}


def name_of(func):
    return func._schema.name.partition("::")[2]


def launches(func):
    return not func.is_view and name_of(func) not in NO_LAUNCH


def programs_left_out():
    """Kernels are launched, and write nothing: for what hangs on shapes alone."""
    return mock.patch.object(GridExecutor, "__call__", lambda self, *args, **kwargs: None)


@contextlib.contextmanager
def _unseen_interpreter():
    """Triton's interpreter copies the tensors of a launch to and fro, which a GPU would not."""
    launch = GridExecutor.__call__

    def unseen(*args, **kwargs):
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return launch(*args, **kwargs)

    with mock.patch.object(GridExecutor, "__call__", unseen):
        yield


class _Bodies(TorchDispatchMode):
    """Sees the ops of torch, and what the bodies of ours are made of."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace != "cogvx":
            self.see(func)
            return func(*args, **kwargs)
        if func._schema.name not in OPDEFS:  # of the extension: one kernel
            out = func(*args, **kwargs)
            self.launched(func, 1)
            return out
        with observe() as seen, _unseen_interpreter(), self:
            out = OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        self.launched(func, len(seen.launches))
        return out

    def see(self, func):
        raise NotImplementedError

    def launched(self, func, count):
        pass


class Launches(_Bodies):
    """Kernels launched, by name: each op of torch that computes is one, ours are what they are
    seen to launch in Triton's interpreter and what torch computes beside it.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def see(self, func):
        self.counts[name_of(func)] += launches(func)

    def launched(self, func, count):
        self.counts[name_of(func)] += count


class NoWait(_Bodies):
    """Raises where the host would wait for the device."""

    def __enter__(self):
        self.predicates = _NoQuestion()
        self.predicates.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.predicates.__exit__(*error)

    def see(self, func):
        assert name_of(func) not in WAITS, f"{func} waits for the device"


class _NoQuestion(TorchFunctionMode):
    """The same of methods that are no ops where the tensor is on a CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        assert name not in QUESTIONS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


class Moved(TorchDispatchMode):
    """Bytes that ops bound by memory read and write: their tensors, each once."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = name_of(func)
        if launches(func) and name not in PRODUCTS and not name.startswith(ATTENTION):
            written = [
                value
                for argument, value in zip(func._schema.arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            touched = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.bytes[name] += sum(x.nbytes for x in [*touched, *written])
        return out


@contextlib.contextmanager
def kept(module):
    """A list that, when the context is left, holds the bytes of each storage that what was computed
    in it keeps for the backward, parameters of the module aside.
    """
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    storages, sizes = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage  # held, so that no other takes its place
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
    sizes.extend(storage.nbytes() for storage in storages.values())
