"""A walk from block to block: what blocks are fed is what they are fed from the model's start, to the bit."""

import pytest
import torch
from torch import nn

import denoisers
from helpers import normal, same
from ptq4dm.calibration.evidence import Evidence
from ptq4dm.calibration.record import record
from ptq4dm.calibration.trace import block_of
from ptq4dm.hooks import hooked
from ptq4dm.layers.plan import LayerPlan
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.layers.view import find_layers
from ptq4dm.reconstruction.blocks import call_order
from ptq4dm.walk import walk as room
from ptq4dm.walk.finished import size_of
from ptq4dm.walk.walk import Walks
from trained import calls_of, model_of

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks_of(model, calls):
    blocks = {}
    for name in call_order(model, [view.name for view in find_layers(model)], calls):
        blocks.setdefault(block_of(name), []).append(name)
    return list(blocks.values())


def fed(model, calls, *, quantized, size=2, walking=True, seen=lambda walk: None):
    """Layer -> (rows, peaks) that it is fed, block by block; behind the blocks before, in 3 bits, if `quantized`."""
    batches, blocks, packed, found = list(calls.batches(size)), blocks_of(model, calls), {}, {}
    walk = Walks(model).over(batches)
    for place, names in enumerate(blocks):
        if walking:
            walk.on({name for later in blocks[place:] for name in later}, packed)
            seen(walk)
        evidence = Evidence(model, names, [], batches, 0, packed, walk.resumed)
        found |= {f"{name}.rows": rows for name, rows in evidence.captured.rows.items()}
        found |= {f"{name}.peaks": peaks for name, peaks in evidence.captured.peaks.items()}
        if quantized:
            plan = LayerPlan(weight_bits=3)
            packed |= {name: quantized_copy(model.get_submodule(name), plan, name) for name in names}
    return found


def made(kind):
    if kind in denoisers.KINDS:
        model, store = denoisers.pair(kind)
        return model, store.recorded()
    model = model_of({"unet": "unet", "conditional": "sd"}[kind])
    return model, calls_of(model, 4)


@pytest.mark.parametrize("quantized", [False, True], ids=["exact", "behind quantized blocks"])
@pytest.mark.parametrize("kind", [*denoisers.KINDS, "unet", "conditional"])
def test_blocks_are_fed_what_they_are_fed_from_the_start(kind, quantized):
    model, calls = made(kind)
    plain = fed(model, calls, quantized=quantized, walking=False)
    assert same(fed(model, calls, quantized=quantized), plain) and len(plain) > 20
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


class Chain(nn.Module):
    """Blocks one after the other, and a skip over all of them."""

    config = {}

    def __init__(self, count):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)) for _ in range(count)
        )
        self.last = nn.Linear(64, 64)

    def forward(self, x, timestep=None):
        first = x = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = block(x)
        return self.last(x + first)


class Stream(Chain):
    """The sum of all blocks is made outside of them: what each of them gave is needed to make it again."""

    def forward(self, x, timestep=None):
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def chain(count, tuples=4, kind=Chain):
    model = kind(count).eval()
    with record(model) as calls, torch.no_grad():
        for seed in range(tuples):
            model(normal(32, 64, seed=seed), timestep=torch.tensor(seed))
    return model, calls


@pytest.mark.parametrize("count", [4, 16])
@pytest.mark.parametrize("quantized", [False, True])
def test_calls_of_blocks_grow_with_their_number(quantized, count):
    model, calls = chain(count)
    ran = []
    with hooked(model, {f"blocks.{i}.2": lambda *_: ran.append(1) for i in range(count)}):
        fed(model, calls, quantized=quantized)
    # A look at the order of calls, one at what is read; then each batch is fed to the block, and passes it.
    assert len(blocks_of(model, calls)) == count + 1 and len(ran) <= count * (1 + 1 + 2 * len(calls))


def test_what_is_kept_does_not_grow_with_the_number_of_blocks():
    output, most = 32 * 64 * 4, []
    for count in (4, 16):
        model, calls = chain(count)
        fed(model, calls, quantized=True, seen=lambda walk: most.append(max(size_of(done) for done in walk.done)))
    assert max(most) == 2 * output  # the last one, and the skip


ONE = 4 * 32 * 64 * 4  # bytes of what four blocks gave in a batch


@pytest.mark.parametrize("bytes_kept, least, last", [(0, 0, 0), (ONE + 100, 1, 1), (4 * ONE, 4, 4)])
def test_where_there_is_no_room_batches_run_from_their_start(bytes_kept, least, last, monkeypatch):
    model, calls = chain(4, kind=Stream)
    plain = fed(model, calls, quantized=True, walking=False)
    monkeypatch.setattr(room, "HOST_BYTES", bytes_kept)
    kept = []
    got = fed(model, calls, quantized=True, seen=lambda walk: kept.append(sum(d is not None for d in walk.done)))
    assert same(got, plain) and min(kept) == least and kept[-1] == last


class Routed(nn.Module):
    """Sends a call to one of two experts, by what it holds."""

    config = {}

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    def forward(self, x, timestep=None):
        y = self.first(x)
        return self.last(self.experts[int(x.sum() > 0)](y)) + y


class Early(Routed):
    """Decides at its start what is read at its end."""

    def forward(self, x, timestep=None):
        skips = bool(timestep > 2)
        y = self.first(x)
        z = self.experts[1](self.experts[0](y))
        return self.last(z + y if skips else z)


class Late(Routed):
    """Decides by what a layer gave whether another value is read."""

    def forward(self, x, timestep=None):
        y = self.first(x)
        z = self.experts[1](self.experts[0](y))
        return self.last(z + y if z.sum() > 0 else z)


@pytest.mark.parametrize("kind", [Routed, Early, Late])
@pytest.mark.parametrize("quantized", [False, True])
def test_batches_that_go_another_way_are_fed_the_same(quantized, kind):
    model = kind().eval()
    with record(model) as calls, torch.no_grad():
        for seed in range(6):
            model(normal(4, 64, seed=seed), timestep=torch.tensor(seed))
    plain = fed(model, calls, quantized=quantized, walking=False)
    assert {"experts.0.rows", "experts.1.rows"} <= set(plain)  # both are seen
    assert same(fed(model, calls, quantized=quantized), plain)


def test_a_layer_that_two_blocks_call_is_passed_when_it_is_quantized():
    class Shared(Chain):
        def forward(self, x, timestep=None):
            for block in self.blocks:
                x = self.last(x) + block(x)
            return x

    torch.manual_seed(0)
    model = Shared(3).eval()
    with record(model) as calls, torch.no_grad():
        model(normal(32, 64), timestep=torch.tensor(0))
    assert blocks_of(model, calls)[0] == ["last"]
    plain = fed(model, calls, quantized=True, walking=False)
    assert same(fed(model, calls, quantized=True), plain)


def test_signatures_are_looked_at_once_each(monkeypatch):
    model = model_of("small")
    calls = calls_of(model, 4)
    walks, looks = Walks(model), []
    look = room.dataflow_of
    monkeypatch.setattr(room, "dataflow_of", lambda *given: [looks.append(given), look(*given)][1])
    for _ in range(2):
        walks.over(list(calls.batches(2))).on({"transformer_blocks.0.ff.net.2"}, {})
    assert len(looks) == len({calls.groups[int(place)].key for place, _ in calls.places})
