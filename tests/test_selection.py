"""The choice of tests: nothing is lost, and the default leaves no function or value out."""

import argparse
import itertools
from types import SimpleNamespace

import pytest

from tests.harness import selection
from tests.harness.selection import COLLECTED, cover, select, values

PARTS = 6  # as in .ci/run


@pytest.fixture(scope="module")
def collected(pytestconfig):
    """All that this run found, whatever it takes of it."""
    return pytestconfig.stash[COLLECTED]


def functions(items):
    return {item.nodeid.partition("[")[0] for item in items}


def test_the_default_has_every_function(collected):
    assert functions(select(collected)) == functions(collected)


def test_the_default_has_every_value_of_every_parameter(collected):
    def all_values(items):
        return {(item.nodeid.partition("[")[0], *v) for item in items for v in values(item)}

    left_out = [item for item in collected if item.get_closest_marker("rest")]
    others = set(collected) - set(left_out)
    assert all_values(others) <= all_values(select(collected))


def test_the_default_and_all_parts_are_all_tests_and_no_two_parts_meet(collected):
    default = select(collected)
    parts = [select(collected, (k, PARTS)) for k in range(PARTS)]
    assert all(default <= part for part in parts)
    assert set().union(*parts) == set(collected) == select(collected, (0, 1))
    for one, two in itertools.combinations(parts, 2):
        assert one & two == default
    assert all(select(collected, (k, PARTS)) == part for k, part in enumerate(parts))


def test_few_cases_cover_a_matrix():
    matrix = [
        {("op", op), ("dtype", dtype), ("pass", direction)}
        for op, dtype, direction in itertools.product(range(10), range(3), range(2))
    ]
    chosen = cover(matrix)
    assert len(chosen) == 10
    for value in {value for case in matrix for value in case}:
        number = sum(value in matrix[i] for i in chosen)
        assert number >= {"op": 1, "dtype": 3, "pass": 5}[value[0]]
    assert cover([set()]) == {0} and cover([]) == set()


@pytest.mark.parametrize(("letter", "number"), [("a", 1), ("a", 2), ("b", 1), ("b", 2)])
@pytest.mark.parametrize("other", ["x", [2]])
def test_rows_are_taken_whole(request, collected, letter, number, other):
    """Each of the four, although two of them would have every letter and every number."""
    cases = {i for i in collected if i.originalname == request.node.originalname}
    rows = {tuple(i.callspec.params[name] for name in ("letter", "number")) for i in cases}
    taken = select(cases)
    assert len(taken) == len(rows)
    assert {tuple(i.callspec.params[name] for name in ("letter", "number")) for i in taken} == rows


def run_of(items, *arguments, part=(0, 0)):
    gone = []
    config = SimpleNamespace(
        args=arguments,
        option=SimpleNamespace(part=part),
        hook=SimpleNamespace(pytest_deselected=lambda items: gone.extend(items)),
    )
    kept = list(items)
    selection.apply(config, kept)
    return kept, gone


def test_a_run_takes_what_is_selected_in_order(collected):
    for part in ((0, 0), (3, PARTS), (0, 1)):
        kept, gone = run_of(collected, "tests", part=part)
        selected = select(collected, part)
        assert kept == [item for item in collected if item in selected]
        assert set(gone) == set(collected) - set(kept)


def test_a_test_that_is_named_runs(collected):
    assert run_of(collected, "tests/test_a.py::test_b[c]") == (collected, [])


def test_parts_are_counted_from_0():
    assert selection.as_part("0/6") == (0, 6) and selection.as_part("5/6") == (5, 6)
    for wrong in ("6/6", "-1/6", "1", "1/", "/6", "a/b", "0/0", "1.5/6"):
        with pytest.raises(argparse.ArgumentTypeError, match="K from 0 to N - 1; got"):
            selection.as_part(wrong)
