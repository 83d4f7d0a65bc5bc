"""What several test files share."""

import os

import pytest
import torch

# Without a GPU, kernels run in Triton's interpreter; it must be told before Triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def one_thread():
    """Tiny networks are quicker on one thread, on a busy machine many times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
