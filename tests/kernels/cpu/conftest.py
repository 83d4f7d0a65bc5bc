"""What tests of the compiled kernels share."""

import pytest

from ptq4dm.kernels.cpu import library


@pytest.fixture
def compiled():
    """Skips where the kernels cannot be built, and says why."""
    if not library.available():
        pytest.skip(f"no compiled kernels: {library.status()}")


@pytest.fixture(params=list(library.FLAGS))
def instructions(request, monkeypatch, compiled):
    """Kernels for these instructions, which this CPU has."""
    monkeypatch.setattr(library, "_found", library.found())  # put back after the test
    try:
        library.use(request.param)
    except ValueError as error:
        pytest.skip(str(error))
