"""Where the tests run: kernels on a GPU if there is one, else in Triton's interpreter."""

import os
import random
from typing import Any

import pytest
import torch

# Triton decides when a kernel is decorated: before cogvx_kernels or triton is imported.
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from cogvx_kernels import _backend  # noqa: E402

if _backend.HAS_TRITON and _backend.INTERPRETED:
    from cogvx_kernels.tools import interpreter

    interpreter.install()

ON_GPU = HAS_GPU and not _backend.INTERPRETED

# One order of sums, run after run; and `tests.harness.workers` forks.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=2000, metavar="N", help="random cases in all")
    parser.addoption(
        "--seed", type=int, metavar="S", help="of all that is random; a new one if not given"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        drawn = getattr(config, "workerinput", {})  # by the controller, in a worker of pytest-xdist
        config.option.seed = drawn.get("seed", random.SystemRandom().randrange(2**31))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """pytest-xdist: hand the seed to a worker."""
    node.workerinput["seed"] = node.config.option.seed


def pytest_report_header(config: pytest.Config) -> str:
    return f"cogvx: {_where()}; repeat with --fuzz {config.option.fuzz} --seed {config.option.seed}"


def _where() -> str:
    if not _backend.HAS_TRITON:
        return f"torch {torch.__version__}, no Triton"
    import triton

    place = f"on {torch.cuda.get_device_name()}" if ON_GPU else "interpreted"
    return f"torch {torch.__version__}, kernels of Triton {triton.__version__} {place}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ON_GPU:
        return
    reason = "TRITON_INTERPRET is set: kernels do not run on the GPU" if HAS_GPU else "no CUDA GPU"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    """Of all that is random in this run: --seed, or the one in the header."""
    return pytestconfig.option.seed


@pytest.fixture(scope="session")
def fuzz(pytestconfig: pytest.Config) -> int:
    """How many random cases to try: --fuzz."""
    return pytestconfig.option.fuzz


@pytest.fixture(autouse=True)
def _seeded(seed: int) -> None:
    torch.manual_seed(seed)
