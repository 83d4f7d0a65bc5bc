"""What a block is trained on: inputs from full precision and from behind quantized layers, targets, and weights."""

import pytest
import torch
from torch import nn

import denoisers
from helpers import normal
from ptq4dm.calibration.record import answers, record, samples_of
from ptq4dm.errors import UserError
from ptq4dm.hooks import hooked
from ptq4dm.layers.plan import LayerPlan
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.reconstruction.items import fed, items_of, outputs_of, predictions_of
from ptq4dm.reconstruction.tuples import Tuples
from ptq4dm.rounding.learned import Learning
from ptq4dm.walk.walk import Walks

pytestmark = pytest.mark.usefixtures("one_thread")

LAST = {"dit": "transformer_blocks.1", "sd3": "transformer_blocks.0", "flux": "single_transformer_blocks.0"}


def made(model, block, batches, before=None, **learning):
    draw = torch.Generator().manual_seed(3)
    predictions = predictions_of(model, batches) if learning.get("prediction") else ()
    tuples = Tuples.of(Walks(model), batches, batches)
    return items_of(model, block, tuples, before or {}, Learning(**learning), draw, predictions)


def rough(model, *names):
    return {name: quantized_copy(model.get_submodule(name), LayerPlan(weight_bits=3), name) for name in names}


def two(calls):
    return list(calls.batches(4))[:2]


@pytest.mark.parametrize("kind", LAST)
def test_targets_are_what_the_block_gives_in_the_model(kind):
    """Also of blocks that give two tensors, or are fed them by name."""
    model, store = denoisers.pair(kind)
    batches, found = two(store.recorded()), []
    after = {LAST[kind]: lambda module, args, kwargs, output: found.append(output)}
    with torch.no_grad(), hooked(model, after=after):
        for batch in batches:
            answers(model, batch)
    items = made(model, LAST[kind], batches, prediction=1.0)
    for item, output, batch in zip(items, found, batches, strict=True):
        outputs = list(output) if isinstance(output, tuple) else [output]
        assert all(torch.equal(a, b) for a, b in zip(item.targets, outputs, strict=True))
        assert all(one is other for one, other in zip(item.exact, item.noisy, strict=True))  # nothing is before it
        with torch.no_grad():
            assert torch.equal(item.answer[0], samples_of(answers(model, batch)[0], batch))
    assert len(items[0].targets) == (1 if kind == "dit" else 2)


def test_inputs_behind_quantized_layers_differ_and_the_model_stays():
    model, store = denoisers.pair("dit")
    before = rough(model, "transformer_blocks.0.ff.net.2", "transformer_blocks.0.attn1.to_q")
    plain, behind = (made(model, LAST["dit"], two(store.recorded()), one)[0] for one in ({}, before))
    assert all(torch.equal(a, b) for a, b in zip(plain.targets, behind.targets, strict=True))
    differ = [
        not torch.equal(a, b) for a, b in zip(behind.exact, behind.noisy, strict=True) if isinstance(a, torch.Tensor)
    ]
    assert differ[0] and not all(differ)  # the features; classes and times do not pass any of these layers
    assert type(model.get_submodule("transformer_blocks.0.ff.net.2")) is nn.Linear


def test_augmentations_mix_what_they_should():
    model, store = denoisers.pair("dit")
    item = made(model, LAST["dit"], two(store.recorded()), rough(model, "transformer_blocks.0.ff.net.2"))[0]
    (exact, *_), (noisy, *_) = item.exact, item.noisy
    draw = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    assert fed(item, "none", draw()) is item.noisy
    mixed = fed(item, "qdrop", draw())[0]
    took = mixed == exact
    assert torch.equal(torch.where(took, exact, noisy), mixed) and 0.45 < took.float().mean() < 0.55
    assert torch.equal(mixed, fed(item, "qdrop", draw())[0])
    with_noise = fed(item, "noise", draw())[0]
    error = (noisy - exact).square().mean().sqrt()
    assert float((with_noise - exact).square().mean().sqrt() / error) == pytest.approx(1, rel=0.05)
    assert float(((with_noise - exact) * (noisy - exact)).mean() / error**2) < 0.05  # and not those errors
    for kind in ("qdrop", "noise"):  # what does not differ is the same object
        same = [a is b for a, b in zip(fed(item, kind, draw())[1:], item.noisy[1:], strict=True)]
        assert all(same)


class Linear2(nn.Module):
    """A linear model: the gradient of its answer in what `block` gives is a row of `head`."""

    config = {}

    def __init__(self):
        super().__init__()
        self.block, self.head = nn.Linear(5, 7), nn.Linear(7, 3, bias=False)

    def forward(self, x, timestep=None):
        return self.head(self.block(x))


def test_fisher_of_a_linear_model_is_its_closed_form():
    torch.manual_seed(0)
    model = Linear2().eval()
    with record(model) as calls:
        for t in (1, 2, 3):
            model(normal(4, 5, seed=t), timestep=torch.tensor(t))
    items = made(model, "block", list(calls.batches(1)), loss="fisher")
    draw = torch.Generator().manual_seed(3)
    expected = [(torch.randn(4, 3, generator=draw) @ model.head.weight).square().detach() for _ in items]
    mean = torch.stack([one.mean() for one in expected]).mean()
    for item, one in zip(items, expected, strict=True):
        assert torch.allclose(item.fisher[0], one / mean, rtol=1e-4, atol=1e-6)
    assert float(torch.stack([item.fisher[0].mean() for item in items]).mean()) == pytest.approx(1, rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert made(model, "block", list(calls.batches(1)))[0].fisher is None


def test_weights_come_by_time_and_a_block_never_called_is_named():
    model, store = denoisers.pair("dit")
    calls = store.recorded()
    items = made(model, LAST["dit"], list(calls.batches(3)), time_weights=(1.0, 3.0))
    assert torch.equal(torch.cat([one.weights for one in items]), 0.5 + (calls.time >= 0.5).float())
    model.register_module("spare", nn.Linear(3, 3))
    with pytest.raises(UserError, match="'spare' was not called during calibration"):
        made(model, "spare", two(calls))


class Routed(nn.Module):
    """Tokens above a threshold go to the expert: behind rough layers they are others, and of another number."""

    config = {}

    def __init__(self):
        super().__init__()
        self.before, self.expert = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, timestep=None):
        x = self.before(x)
        chosen = x[:, 0] > 0.3
        return x.masked_scatter(chosen[:, None].expand_as(x), self.expert(x[chosen]))


def test_an_expert_that_gets_other_tokens_is_fed_those_of_its_targets():
    torch.manual_seed(1)
    model = Routed().eval()
    with record(model) as calls, torch.no_grad():
        model(normal(400, 8), timestep=torch.tensor(1))
    before = {"before": quantized_copy(model.before, LayerPlan(weight_bits=2), "before")}
    item = made(model, "expert", list(calls.batches(1)), before)[0]
    with torch.no_grad():
        kept = int((model.before(calls.call().args[0])[:, 0] > 0.3).sum())
        assert kept != int((before["before"](calls.call().args[0])[:, 0] > 0.3).sum())
        assert len(item.targets[0]) == kept and len(outputs_of(model.expert, item.noisy, item)[0]) == kept
