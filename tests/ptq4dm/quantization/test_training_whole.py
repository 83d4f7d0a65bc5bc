"""Training leaves the float model as it was, whatever happens; nothing of a block stays behind it."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import ptq4dm
import trained
from helpers import normal, same
from ptq4dm.calibration.measure import store_of
from ptq4dm.errors import UserError
from ptq4dm.layers.base import is_quantized
from ptq4dm.quantization.packing import PackingOptions, pack_plan
from ptq4dm.quantization.planning import make_plan
from ptq4dm.reconstruction import block, items, soft, steps
from states import interrupted_at, lines_of, state_of
from trained import FEW, Experts, calls_of, gain, model_of

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = ptq4dm.GradPTQConfig(**FEW | {"steps": 3}, loss="fisher", prediction=1.0)


@pytest.fixture(scope="module")
def dit():
    """(model in training mode, some of it frozen and some with a gradient, its calls)."""
    model = model_of("small")
    calls = calls_of(model, 3)
    model.train()
    parameters = list(model.parameters())
    for parameter in parameters[::2]:
        parameter.requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    own = model.transformer_blocks[0].attn1.to_q
    own.forward = own.forward  # as hooks of accelerate set one
    return model, calls


def packed(model, calls, config=CONFIG):
    store = store_of(model, calls)
    plan = make_plan(model, config, store)
    return pack_plan(model, plan, store, PackingOptions(config.num_tuples, config.seed, config.prefix))[0]


def test_packing_leaves_the_model_as_it_was(dit):
    model, calls = dit
    before, gradients = state_of(model), [parameter.grad for parameter in model.parameters()]
    layers = packed(model, calls)
    assert state_of(model) == before
    assert all(a is b for a, b in zip([p.grad for p in model.parameters()], gradients, strict=True))
    assert not model._forward_hooks and not any(len(one._forward_pre_hooks) for one in model.modules())
    for name, layer in layers.items():
        assert layer.training and not any(one.requires_grad or one.grad is not None for one in layer.parameters())
        assert layer.training == model.get_submodule(name).training
    model.eval()
    try:
        assert not any(layer.training for layer in packed(model, calls).values())
    finally:
        model.train()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["backward", "forward", "packing", "measuring"])
def test_an_error_in_the_middle_leaves_it_too(dit, monkeypatch, place, error):
    model, calls = dit
    before, gradients = state_of(model), torch.is_grad_enabled()
    owner, name = {
        "backward": (steps, "move"),
        "forward": (soft.SoftLayer, "forward"),
        "packing": (soft.SoftLayer, "packed"),
        "measuring": (block.BlockTraining, "_measured"),
    }[place]
    own, count = getattr(owner, name), []

    def fail(*args):
        count.append(1)
        if len(count) == 5:
            raise error("in the middle")
        return own(*args)

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(error, match="in the middle"):
        packed(model, calls)
    assert state_of(model) == before and torch.is_grad_enabled() == gradients


def test_ctrl_c_at_any_line_leaves_the_model_or_ends_the_work():
    torch.manual_seed(0)
    model = Experts().eval()
    with ptq4dm.record(model) as calls, torch.no_grad():
        for seed in range(2):
            model(normal(8, 8, seed=seed), timestep=torch.tensor(seed))
    config = ptq4dm.GradPTQConfig(**FEW | {"steps": 3}, loss="fisher", prediction=1.0)

    def work(one):
        ptq4dm.quantize(one, config, calls)

    work(copy.deepcopy(model))
    lines = lines_of(lambda: work(copy.deepcopy(model)))
    before, interrupted = state_of(one := copy.deepcopy(model)), 0
    for number in torch.linspace(lines * 0.2, lines - 1, 20).long().tolist():
        interrupted += interrupted_at(number, lambda one=one: work(one))
        if any(map(is_quantized, one.modules())):
            one = copy.deepcopy(model)
            before = state_of(one)
        assert state_of(one) == before
    assert interrupted >= 19


def test_nothing_of_a_block_stays_alive_after_it(monkeypatch):
    """Without a collection of garbage: what a block took is free before the next one is trained."""
    model = model_of("small")
    calls = calls_of(model, 3)
    run, alive, seen = block.BlockTraining.run, [], []

    def watched(self):
        assert [one() for one in alive if one() is not None] == []
        found = run(self)
        seen.append(len(alive))
        return found

    def noting(make):
        def note(*args, **kwargs):
            found = make(*args, **kwargs)
            for one in found if isinstance(found, list) else [found]:
                alive.append(weakref.ref(one))
                tensors = one.targets if isinstance(one, items.Item) else [one.codes.value, one.matrix]
                alive.extend(weakref.ref(tensor) for tensor in tensors)
            return found

        return note

    monkeypatch.setattr(block.BlockTraining, "run", watched)
    monkeypatch.setattr(block, "items_of", noting(block.items_of))
    monkeypatch.setattr(block, "SoftLayer", noting(block.SoftLayer))
    gc.collect()
    gc.disable()
    try:
        layers = packed(model, calls)
    finally:
        gc.enable()
    assert len(seen) >= 3 and seen[-1] > 20 and len(layers) > 10
    assert all(one() is None for one in alive)


def test_in_inference_mode_and_without_gradients():
    """Whoever asks under such a mode gets the same codes."""
    model = model_of("small")
    with torch.inference_mode():
        calls = calls_of(model, 3)
    found = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        one = copy.deepcopy(model)
        with mode():
            _, codes = trained.trained(one, calls, steps=3, loss="fisher", prediction=1.0)
        found.append(codes)
    assert same(found[0], found[1]) and same(found[0], found[2])


@pytest.mark.parametrize("reached", [True, False])
def test_experts_that_few_or_no_calls_reach(reached):
    torch.manual_seed(0)
    model = Experts().eval()
    with torch.no_grad():
        model.before.weight.copy_(torch.eye(8))
    with ptq4dm.record(model) as calls, torch.no_grad():
        for seed in range(4):
            x = normal(32, 8, seed=seed)
            x[:6] += 100 if reached and seed == 2 else 0
            model(x, timestep=torch.tensor(seed))
    report, codes = trained.trained(model, calls)
    rows = {row["layer"]: row for row in report.layers}
    assert ("flips" in rows["experts.1.0"]) == reached and "flips" in rows["experts.0.0"]
    assert model.experts[1][0].plan.static == reached and model(normal(4, 8)).isfinite().all()


class Broken(nn.Module):
    """A block whose layers are fed finite numbers, and whose output overflows."""

    config = {}

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.down(self.up(x)) * 1e38 * 1e10

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.Block()])

    def forward(self, x, timestep=None):
        return self.blocks[0](x)


@pytest.mark.parametrize("start", ["nearest", "gptq"])
def test_a_block_that_overflows_is_a_sentence(start):
    torch.manual_seed(0)
    model = Broken().eval()
    with ptq4dm.record(model) as calls, torch.no_grad():
        model(normal(16, 8), timestep=torch.tensor(1))
    before = state_of(model)
    with pytest.raises(UserError, match="'blocks.0' gives NaN or infinity on the calibration data") as error:
        trained.trained(model, calls, start=start)
    assert "\n" not in str(error.value) and state_of(model) == before


def test_a_block_that_works_in_place_is_trained_on_what_it_is_fed():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.down(torch.relu(self.up(x.mul_(1.5))))

    class InPlace(nn.Module):
        config = {}

        def __init__(self):
            super().__init__()
            self.first, self.blocks = nn.Linear(8, 8), nn.ModuleList([Block(), Block()])

        def forward(self, x, timestep=None):
            x = self.first(x)
            for one in self.blocks:
                x = one(x)
            return x

    torch.manual_seed(0)
    model = InPlace().eval()
    with ptq4dm.record(model) as calls, torch.no_grad():
        for seed in range(4):
            model(normal(32, 8, seed=seed), timestep=torch.tensor(seed))
    report, _ = trained.trained(model, calls, steps=30)
    assert gain(report) < 0.95
