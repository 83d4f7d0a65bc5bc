"""What several tests of samplers use."""

import importlib
from pathlib import Path

import pytest

SWEEP = Path(__file__).resolve().parents[2] / "scripts" / "sweep"


@pytest.fixture
def catalogue(monkeypatch):
    """Tiny pipelines of diffusers' own classes, by name; `run` takes three steps."""
    monkeypatch.syspath_prepend(str(SWEEP))
    found = importlib.import_module("pipelines")
    monkeypatch.setattr(found, "STEPS", 3)
    return found
