"""A kernel of the CPU's memory for calls that are repeated from a recording."""

import pytest


@pytest.fixture
def kernel(monkeypatch):
    """A kernel, and all that stands between a call and a GPU on a machine without one."""
    from tests.support import repeated  # needs Triton, which these tests ask for themselves

    return repeated.stand_in(monkeypatch)
