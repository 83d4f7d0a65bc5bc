"""What tests of the compiled kernels share."""

import pytest

from ptq4dm.kernels.cpu import library


@pytest.fixture
def compiled():
    """Skips where the kernels cannot be built, and says why."""
    if not library.available():
        pytest.skip(f"no compiled kernels: {library.status()}")
