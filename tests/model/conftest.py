"""diffusers and transformers, imported once, with the warnings of their own house left there."""

import os
import warnings

import pytest

from cogvx_kernels import _backend

os.environ.setdefault("HF_HUB_OFFLINE", "1")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    import transformers

diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """A folder in the layout of the released models (`tiny_pipeline.save_released`); not to be
    changed."""
    from .tiny_pipeline import save_released

    folder = tmp_path_factory.mktemp("released") / "model"
    folder.mkdir()
    save_released(folder)
    return folder


@pytest.fixture(autouse=True)
def auto_is_what_a_cpu_has(monkeypatch):
    """On a CPU "auto" is plain torch, as for whoever runs a model there. Triton's interpreter is
    for tests of kernels: what a test asks for as "kernel"."""
    choose = _backend.choose

    def without_interpreter(backend, op, reason, x):
        if backend == "auto" and x.device.type == "cpu":
            reason = reason or "the model's tests run as on a CPU"
        return choose(backend, op, reason, x)

    monkeypatch.setattr(_backend, "choose", without_interpreter)
