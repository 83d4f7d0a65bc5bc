"""That memory.py notices what it is there for."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="watches Triton's interpreter")


@triton.jit
def _copy(x_ptr, y_ptr, start, N, BLOCK: tl.constexpr):
    i = start + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < N, other=0.0), mask=i < N)


@pytest.mark.parametrize(
    "start, n, wrong", [(0, 5, None), (0, 6, "load of 1"), (-1, 5, "load of 1"), (0, 9, "load of 3")]
)
def test_addresses_outside(start, n, wrong):
    room = torch.arange(30.0)
    x, y = room[8:13], room[20:28]
    if wrong is None:
        _copy[(1,)](x, y, start, n, BLOCK=8)
        assert torch.equal(y[:5], x)
    else:
        with pytest.raises(Exception, match=wrong):
            _copy[(1,)](x, y, start, n, BLOCK=8)


def test_stores_and_rows_of_a_larger_tensor():
    room = torch.zeros(4, 10)
    with pytest.raises(Exception, match="store of 2"):
        _copy[(1,)](torch.ones(8), room[1, :6], 0, 8, BLOCK=8)
    _copy[(1,)](torch.ones(8), room[1, :8], 0, 8, BLOCK=8)
    assert room.sum() == 8
