"""Sweeps are over constants of the kernels, whose present values are among the choices."""

import importlib

import pytest

from benchmarks import tune
from cogvx_kernels.testing import OPS


@pytest.mark.parametrize("op", tune.SWEEPS)
def test_present_constants_are_among_the_choices(op):
    sweep = tune.SWEEPS[op]
    module = importlib.import_module(sweep.module)
    for values in (sweep.forward, sweep.backward):
        now = {name: getattr(module, name) for name in values}
        assert now in [choice for choice in tune.choices(values) if sweep.fits(choice)]


def test_every_op_with_a_kernel_has_a_sweep():
    """Launch settings of Triton's kernels; the extension has no choices to make."""
    assert tune.SWEEPS.keys() == {name for name, info in OPS.items() if info.launch is not None}


def test_choice_is_undone():
    module = importlib.import_module("cogvx_kernels.expert_adaln.kernel")
    before = module.TOKENS
    with pytest.raises(ZeroDivisionError), tune.chosen(module, {"TOKENS": before + 1}):
        assert module.TOKENS == before + 1
        raise ZeroDivisionError
    assert before == module.TOKENS


def test_choices_must_fit():
    fits = tune.SWEEPS["expert_ffn"].fits
    choice = {"BLOCK_ROWS": 128, "BLOCK_COLS": 256, "BLOCK_INNER": 64, "WARPS": 8, "STAGES": 4}
    assert fits(choice)  # 192 KiB, 128 registers of sums
    assert not fits({**choice, "BLOCK_INNER": 128})  # 384 KiB
    assert not fits({**choice, "WARPS": 4})  # 256 registers of sums
