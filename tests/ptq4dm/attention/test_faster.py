"""Attention in 8 bits or in 16, whichever was measured to be faster: what is measured, chosen, said and undone."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import ptq4dm
from ptq4dm.attention import faster as verb
from ptq4dm.errors import UserError
from ptq4dm.kernels.attention import layer8
from ptq4dm.layers.attention import faster
from ptq4dm.layers.attention.faster import Times, attention_faster
from tests.support import models

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = 2, 3, 40, 16
CUDA = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch):
    monkeypatch.setattr(faster, "MEASURED", {})


@pytest.fixture
def timed(monkeypatch):
    """A kernel that serves this device (it computes the formula), faster than 16 bits from 40 keys on.

    With codes in e4m3 it is as fast, and faster with 56 keys: a little, and with 64 clearly.
    """
    asked = []

    def times_of(name, q, k, v, scale, rotary):
        asked.append((name, k.shape[2]))
        int8 = 1.0 if k.shape[2] >= 40 else 3.0
        return Times(name, {"int8": int8, "e4m3": int8 * {56: 0.96, 64: 0.94}.get(k.shape[2], 1.0)}, 2.0)

    def through(name, *args):
        assert name == "a kernel"
        return plain(layer8.REFERENCE, *args)

    plain = layer8.through
    monkeypatch.setattr(faster, "times_of", times_of)
    monkeypatch.setattr(faster, "through", through)
    monkeypatch.setattr(faster, "known_name", lambda *_: "a kernel")
    monkeypatch.setattr(verb, "kernel_name", lambda *_: "a kernel")
    return asked


def operands(tokens=40):
    generator = torch.Generator().manual_seed(tokens)
    batch, heads, _, width = SHAPE
    return tuple(torch.randn(batch, tokens, heads, width, generator=generator).transpose(1, 2) for _ in range(3))


@pytest.mark.parametrize("tokens, kind", [(40, "int8"), (24, None), (56, "int8"), (64, "e4m3")])
def test_each_size_is_measured_once_and_served_by_what_is_faster(timed, tokens, kind):
    given = operands(tokens)
    y = attention_faster(*given, 0.3, "int8")
    sixteen = scaled_dot_product_attention(*given, scale=0.3)
    assert torch.equal(y, sixteen if kind is None else layer8.attention8(*given, 0.3, kind))
    assert y.transpose(1, 2).is_contiguous()
    attention_faster(*operands(tokens), 0.3, "e4m3")
    assert timed == [("a kernel", tokens)]
    (said,) = faster.lines_of(given[0].device, "int8")
    start = (
        f"2 x 3 heads of 16, {tokens} queries, {tokens} keys: in {'16 bits' if kind is None else f'8 bits, {kind}'} "
    )
    assert said.startswith(start + f"(a kernel int8 {'3.000' if kind is None else '1.000'} ms, e4m3 ")
    assert said.endswith(" ms, 16 bits 2.000 ms)")


def test_where_no_kernel_serves_nothing_is_measured():
    given = operands()
    assert torch.equal(attention_faster(*given, 0.3, "int8"), scaled_dot_product_attention(*given, scale=0.3))
    assert not faster.MEASURED


def test_the_verb_says_what_was_measured_and_takes_it_back(timed):
    model = models.dit()
    x, labels = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 7])

    def run():
        with torch.no_grad():
            return model(x, torch.full((2,), 400), class_labels=labels).sample

    right, before = run(), [one.processor for one in model.modules() if hasattr(one, "processor")]
    report = ptq4dm.optimize(model, compiled=False, attention="auto")
    assert "attention of 2 layers in 8 bits where that is faster; nothing was measured yet" in str(report)
    y = run()  # 16 tokens: 16 bits
    assert torch.allclose(y, right, atol=1e-6) and len(timed) == 1
    assert "heads of 8, 16 queries, 16 keys: in 16 bits" in str(report)
    faster.MEASURED.update({size: Times("a kernel", {"int8": 1.0, "e4m3": 1.0}, 2.0) for size in faster.MEASURED})
    assert 0 < ((run() - right).norm() / right.norm()).item() < 0.01
    report.undo()
    assert [one.processor for one in model.modules() if hasattr(one, "processor")] == before
    assert torch.equal(run(), right)


def test_compiled_code_chooses_too(timed):
    given = operands()
    made = torch.compile(
        lambda q, k, v: attention_faster(q, k, v, 0.3, "int8") + 1, backend="aot_eager", fullgraph=True
    )
    assert torch.allclose(made(*given), layer8.attention8(*given, 0.3, "int8") + 1)
    assert timed == [("a kernel", 40)]


@pytest.mark.skipif(CUDA, reason="of a device without kernels")
def test_what_is_left_and_why():
    model = models.dit()
    assert "attention: left, for no kernel of 8-bit attention serves cpu" in str(
        ptq4dm.optimize(model, compiled=False, attention="auto")
    )
    with ptq4dm.attention_in_8_bits(model):
        assert "attention: left, for its plan, or a block around this" in str(
            ptq4dm.optimize(model, compiled=False, attention="auto")
        )
    with pytest.raises(UserError, match='attention is "auto", or None'):
        ptq4dm.optimize(model, attention="int8")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU that knows e4m3")
def test_on_a_gpu_times_are_measured():
    q, k, v = (x.to("cuda", torch.bfloat16) for x in operands(700))
    y = attention_faster(q, k, v, 0.25, "int8")
    (times,) = faster.MEASURED.values()
    assert times.kernel != layer8.REFERENCE and list(times.eight) == ["int8", "e4m3"]
    assert all(0 < ms < 50 for ms in (*times.eight.values(), times.sixteen))
    right = scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.25)
    assert ((y.double() - right).norm() / right.norm()).item() < {None: 0.01, "int8": 0.06, "e4m3": 0.1}[
        times.kind("int8")
    ]
    graph = torch.cuda.CUDAGraph()
    faster.MEASURED.clear()
    with torch.cuda.graph(graph):
        attention_faster(q, k, v, 0.25, "int8")
    assert not faster.MEASURED  # under a capture nothing is timed
