"""What the ops do about gradients, torch.compile and fake tensors."""

from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import ptq4dm  # noqa: F401
from ptq4dm.kernels.runtime import ops, replay
from ptq4dm.kernels.w8a8.layer import w8a8_linear

pytestmark = pytest.mark.usefixtures("one_thread")


def operands():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (8, 32), generator=generator, dtype=torch.int8)
    return torch.randn(5, 32, generator=generator), codes, torch.rand(8, generator=generator), None, None, None, 8


def test_the_op_passes_opcheck():
    torch.library.opcheck(torch.ops.ptq4dm.w8a8_linear.default, operands())


def test_a_gradient_is_refused_in_the_backward_pass_and_not_before():
    x, *rest = operands()
    y = w8a8_linear(x, *rest)
    assert not y.requires_grad
    wanted = x.clone().requires_grad_()
    for function in (w8a8_linear, torch.ops.ptq4dm.w8a8_linear.default):
        again = function(wanted, *rest)
        assert torch.equal(again, y)
        with pytest.raises(RuntimeError, match="w8a8_linear.default has no autograd formula"):
            (again.sum() + wanted.sum()).backward()  # not even a part of the gradient
        assert wanted.grad is None
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert not function(wanted, *rest).requires_grad


def test_a_layer_in_a_chain_that_is_trained_elsewhere():
    x, *rest = operands()
    first = torch.nn.Linear(32, 32)
    trained = torch.nn.Linear(8, 1)
    trained(w8a8_linear(x, *rest)).sum().backward()
    assert trained.weight.grad is not None
    with pytest.raises(RuntimeError, match="no autograd formula"):
        trained(w8a8_linear(first(x), *rest)).sum().backward()


def test_compiled():
    x, *rest = operands()
    compiled = torch.compile(lambda x: w8a8_linear(x + 1, *rest) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), w8a8_linear(x + 1, *rest) * 2)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        compiled(x.clone().requires_grad_()).sum().backward()


def test_shapes_of_fake_tensors():
    x, *rest = (v.to("meta") if isinstance(v, torch.Tensor) else v for v in operands())
    assert w8a8_linear(x, *rest).shape == (5, 8)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        w8a8_linear(x.requires_grad_(), *rest).sum().backward()


def observers():
    """name -> what is active while an op is called, or its arguments."""
    x, *rest = operands()
    return {
        "fake": (FakeTensorMode(), (x, *rest)),
        "dispatch": (FlopCounterMode(display=False), (x, *rest)),
        "profiler": (torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), (x, *rest)),
        "gradient": (nullcontext(), (x.clone().requires_grad_(), *rest)),
        "subclass": (nullcontext(), (x.as_subclass(Own), *rest)),
        "function": (torch.device("cpu"), (x, *rest)),
    }


class Own(torch.Tensor):
    pass


@pytest.mark.parametrize("name", ["fake", "dispatch", "profiler", "gradient", "subclass", "function"])
def test_whoever_looks_sees_the_op(monkeypatch, name):
    monkeypatch.setattr(replay, "on_gpu", lambda x: True)

    def seen(args):
        return replay.form_of(args) is None or ops.observed(args)

    with torch.no_grad():
        assert not seen(operands())
    context, args = observers()[name]
    with context:
        assert seen(args)
    assert not seen(operands())


def test_a_transform_sees_the_op():
    seen = []
    torch.vmap(lambda x: (seen.append(ops.observed((x,))), x)[1])(torch.ones(3, 2))
    assert seen == [True] and not ops.observed(operands()) and replay.form_of(operands()) is None


def test_compiled_graphs_call_the_op_without_autograd():
    x, *rest = operands()
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    with torch.no_grad():
        compiled = torch.compile(lambda x: w8a8_linear(x, *rest), backend=aot_autograd(fw_compiler=backend))
        assert torch.equal(compiled(x), w8a8_linear(x, *rest))
    assert graphs == [["ptq4dm._w8a8_linear.default"]]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_gpu_that_is_not_the_current_one():
    x, *rest = [t.cuda(1) if isinstance(t, torch.Tensor) else t for t in operands()]
    assert torch.cuda.current_device() == 0
    first = [t.cuda(0) if isinstance(t, torch.Tensor) else t for t in (x, *rest)]
    assert torch.equal(w8a8_linear(x, *rest).cpu(), w8a8_linear(*first).cpu())
