"""Which tests run, and where: kernels on a GPU if there is one, else in Triton's interpreter."""

import functools
import gc
import os
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

# The garbage collector takes a quarter of a collection's time to find that what is imported stays.
gc.disable()
STARTED = time.monotonic()

import torch  # noqa: E402

from tests.harness import selection  # noqa: E402

# Triton decides when a kernel is decorated: before cogvx_kernels or triton is imported.
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from cogvx_kernels import _backend  # noqa: E402

if _backend.HAS_TRITON and _backend.INTERPRETED:
    from cogvx_kernels.tools import interpreter

    interpreter.install()

ON_GPU = HAS_GPU and not _backend.INTERPRETED

REPORTED = ("passed", "failed", "skipped", "xfailed", "xpassed", "error")

# One order of sums, run after run; and `tests.harness.workers` forks.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=2000, metavar="N", help="random cases in all")
    parser.addoption(
        "--seed", type=int, metavar="S", help="of all that is random; a new one if not given"
    )
    selection.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        drawn = getattr(config, "workerinput", {})  # by the controller, in a worker of pytest-xdist
        config.option.seed = drawn.get("seed", random.SystemRandom().randrange(2**31))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """pytest-xdist: hand the seed to a worker."""
    node.workerinput["seed"] = node.config.option.seed


def pytest_report_header(config: pytest.Config) -> str:
    return (
        f"cogvx: {_where()}; {_speed()}; "
        f"repeat with --fuzz {config.option.fuzz} --seed {config.option.seed}"
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = (r for name in REPORTED for r in terminalreporter.getreports(name))
    if tests := len({report.nodeid for report in reports}):
        minutes, seconds = divmod(round(time.monotonic() - STARTED), 60)
        terminalreporter.write_line(f"{tests} tests in {minutes} min {seconds} s; {_speed()}")


@functools.cache
def _speed() -> str:
    """Speed of this machine, to compare times by: a Python loop that adds."""
    started = time.process_time()
    exec("total = 0\nfor i in range(2_000_000):\n    total += i", {})
    seconds = 10 * (time.process_time() - started)
    return f"this machine adds 20 million integers in {seconds:.1f} CPU s"


def _where() -> str:
    if not _backend.HAS_TRITON:
        return f"torch {torch.__version__}, no Triton"
    import triton

    place = f"on {torch.cuda.get_device_name()}" if ON_GPU else "interpreted"
    return f"torch {torch.__version__}, kernels of Triton {triton.__version__} {place}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Iterator[None]:
    config.stash[selection.COLLECTED] = list(items)
    yield  # to -k and -m
    selection.apply(config, items)
    if ON_GPU:
        return
    reason = "TRITON_INTERPRET is set: kernels do not run on the GPU" if HAS_GPU else "no CUDA GPU"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def device() -> str:
    """Device that kernels run on."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    """Seed of all that is random in this run: --seed, or the one in the header."""
    return pytestconfig.option.seed


@pytest.fixture(scope="session")
def fuzz(pytestconfig: pytest.Config) -> int:
    """Number of random cases to try: --fuzz."""
    return pytestconfig.option.fuzz


@pytest.fixture(autouse=True)
def _seeded(seed: int) -> None:
    torch.manual_seed(seed)
