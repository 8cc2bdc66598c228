"""Trainings without plots, which take half of the time of small ones; `plots` keeps them."""

import pytest

from cogvx.training import loop, plotting


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(loop, "plot_losses", lambda *_: None)


@pytest.fixture
def plots(no_plots, monkeypatch):
    monkeypatch.setattr(loop, "plot_losses", plotting.plot_losses)
