"""Operations of torch inside of a call that is repeated: which are done again, copies too, and which end it."""

import contextlib

import pytest
import torch

pytest.importorskip("ptq4dm.kernels.runtime.launch", reason="needs Triton", exc_type=ImportError)
from tests.support.repeated import Op, expected, rand, why  # noqa: E402


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (lambda x, y: y[2:], "it returns what is not the whole"),
        (lambda x, y: x, "it returns what is not the whole"),
        (lambda x, y: (y, y), "it returns some memory twice"),
        (lambda x, y: (x.mul_(1), y)[1], "it calls aten.mul_.Tensor"),
        (lambda x, y: y.sort()[0], "it calls aten.sort"),
        (lambda x, y: torch.cat([x, y]), "it calls aten.cat"),
        (lambda x, y: y.view(torch.int32) + 0, "an operation of torch sees a tensor as one of another type"),
        (lambda x, y: torch.full_like(x, float(x[0])), "it calls aten._local_scalar_dense"),
    ],
)
def test_what_else_a_call_does_is_not_repeated(kernel, extra, said):
    op, given = Op(kernel, 8, extra=extra), rand(seed=9)
    for seed in range(6):
        x = rand(seed=seed)
        y = op.repeated(x, given, None)
        right = extra(x, expected(x, given, None))
        pairs = zip(y, right, strict=True) if isinstance(y, tuple) else [(y, right)]
        assert all(a.dtype == b.dtype and torch.allclose(a, b) for a, b in pairs)
    assert op.calls == 6
    ((text, forms),) = why(op).items()
    assert text.startswith(said) and forms == 1


WAYS = {
    "eager": contextlib.nullcontext,
    "compiled": torch._C._AutoDispatchBelowAutograd,  # where PyTorch's compiled code calls its ops
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize(
    "extra",
    [
        lambda x, y: y + 1,
        lambda x, y: y.mul_(2),
        lambda x, y: y.double(),
        lambda x, y: torch.nn.functional.linear(x.view(2, 4), y.view(4, 2).t(), x[2:4]),
        lambda x, y: (y.view(2, 4).t() * x[1]).addmm_(x.view(4, 2), y[:8].view(2, 4)[:, 2:]),
        lambda x, y: (y, y + x, x.exp()),
        lambda x, y: y + x.view(2, 4).t().reshape(-1),
        lambda x, y: (y.view(2, 4).t().contiguous(), x.to(torch.float16).contiguous(), x.view(2, 4).t().flatten()),
    ],
)
def test_operations_of_torch_are_repeated(kernel, extra, way):
    """What may be a view and is a copy, too: below autograd `reshape`, `to` and `contiguous` are seen whole."""
    op, given = Op(kernel, 8, extra=extra), rand(seed=9)
    with WAYS[way]():
        for seed in range(6):
            x = rand(seed=seed)
            y, right = op.repeated(x, given, None), extra(x, expected(x, given, None))
            pairs = zip(y, right, strict=True) if isinstance(y, tuple) else [(y, right)]
            assert all(a.stride() == b.stride() and torch.allclose(a, b) for a, b in pairs)
        assert op.calls == 2 and why(op) == {"repeated": 1}
        with torch.autocast("cpu", torch.bfloat16):  # which may change what they do
            op.repeated(rand(), given, None)
        assert op.calls == 3


@pytest.mark.parametrize("way", list(WAYS))
def test_a_kernel_reads_the_copy_of_the_tensor_at_hand(kernel, way):
    """Not what lies where the recorded copy did."""

    class Copying(Op):
        def written(self, x, given, more):
            return super().written(x.view(2, 4).t().reshape(-1), given, more.to(torch.float32))

    op, given = Copying(kernel, 8), rand(seed=9)
    with WAYS[way]():
        for seed in range(6):
            x, more = rand(seed=seed), rand(seed=seed + 20).double()
            right = expected(x.view(2, 4).t().reshape(-1), given, more.float())
            assert torch.allclose(op.repeated(x, given, more), right)
        assert op.calls == 2 and why(op) == {"repeated": 1}


def test_operations_under_autocast_are_not_recorded(kernel):
    op, given = Op(kernel, 8, extra=lambda x, y: y + 1), rand(seed=9)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(5):
            op.repeated(rand(), given, None)
    assert op.calls == 5 and why(op) == {"it calls operations of torch under autocast": 1}


def test_a_kernel_on_memory_of_its_own_is_not_repeated(kernel):
    held = rand(seed=7)
    op = Op(kernel, 8)
    op.extra = lambda x, y: (op.second(held, None, y), y)[1]
    for _ in range(4):
        assert torch.allclose(op.repeated(rand(), rand(seed=9), None), 3 * held)
    assert why(op) == {"a kernel reads what is neither given nor taken": 1}
