"""Seeded bugs still apply to the sources."""

from . import mutants


def test_old_texts_are_in_their_files_once():
    assert mutants.misplaced() == []
