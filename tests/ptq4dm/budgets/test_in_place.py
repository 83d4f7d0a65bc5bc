"""What formats add to a step of a GPU, from graphs that are none: their times follow from what is in place."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from helpers import normal
from ptq4dm import RTNConfig
from ptq4dm.budgets import costs as kept
from ptq4dm.budgets import graphs
from ptq4dm.budgets.clocks import Figure
from ptq4dm.budgets.costs import costs
from ptq4dm.calibration.calls import Call
from ptq4dm.kernels.tuning import stopwatch
from ptq4dm.layers.base import QuantizedLinear
from ptq4dm.quantization.planning import make_plan

pytestmark = pytest.mark.usefixtures("one_thread")
CALL = Call((normal(4, 8),), {})
OUTSIDE, WHOLE, BY_ITSELF = 100.0, 10.0, 14.0  # microseconds; by itself a layer takes longer than in a step
ADDED, PAIR = {8: 5.0, 4: -3.0}, 2.0  # of a format by its bits; of two neighbours that are both quantized
DRIFT = 0.25  # by which each reading of the clock takes longer than the one before


class Row(nn.Sequential):
    """Six layers of two kinds, in a row."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(*(nn.Linear(8, 8, bias=number < 4) for number in range(6)))


def formats(model):
    """Full precision, and the model's layers packed in 8 and in 4 bits."""
    found = {"keep": {}}
    for label, bits in (("w8", 8), ("w4", 4)):
        config = RTNConfig(activations="dynamic", weight_bits=bits, first_last="same")
        found[label], _ = config.pack(model, make_plan(model, config), None)
    return found


def step_of(model) -> float:
    bits = [layer.plan.weight_bits if isinstance(layer, QuantizedLinear) else 0 for layer in model]
    pairs = sum(bool(a and b) for a, b in zip(bits, bits[1:], strict=False))
    return OUTSIDE + 6 * WHOLE + sum(ADDED.get(one, 0.0) for one in bits) + PAIR * pairs


@pytest.fixture
def model(monkeypatch):
    """A model whose graphs take the time of the formula, and more with each replay, as on a GPU that grows warm."""
    model, replays = Row(), []

    class Graph:
        def __init__(self, calls):
            self.count = len(calls)
            self.time = step_of(model) if self.count == 1 else BY_ITSELF * self.count

        def pool(self):
            return "pool"

        def replay(self):
            replays.append(self)
            return self.time + DRIFT * len(replays) * (self.count == 1)

    monkeypatch.setattr(stopwatch, "graph_of", lambda calls, pool=None: (Graph(calls), [call() for call in calls]))
    monkeypatch.setattr(stopwatch, "elapsed", lambda replay: replay())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return model


def measured(model, some):
    """What `costs` gives where the model is on a GPU."""
    names = list(some["w8"])
    kinds = kept.kinds_of(model, names, CALL)
    words = {label: {name: kept.words_of(layers.get(name)) for name in kinds} for label, layers in some.items()}
    found, steps = graphs.time_in_graphs(model, CALL, some, kinds, words, 5)
    return kinds, words, found, steps


def test_a_format_costs_what_it_adds_first_and_last(model):
    """Layers 0 to 3 are of one kind, 4 and 5 of another: within them are 3 pairs and 1, between them one."""
    some = formats(model)
    kinds, words, found, _ = measured(model, some)
    four, two = kinds["0"], kinds["4"]
    assert four != two
    base = BY_ITSELF  # in full precision, by itself
    pairs = {four: (3 + 0.5) * PAIR / 4, two: (1 + 0.5) * PAIR / 2}
    for kind, own in pairs.items():
        name = next(name for name, one in kinds.items() if one == kind)
        assert found[f"{kind} | keep"].median == pytest.approx(base)
        # readings are DRIFT apart: "first" is read after "none", and "all" before "last", so that it falls out
        for label, bits in (("w8", 8), ("w4", 4)):
            cost = found[f"{kind} | {words[label][name]}"].median
            assert cost == pytest.approx(base + ADDED[bits] + own)


def test_uniform_plans_are_predicted_as_they_were_measured(model):
    some = formats(model)
    kinds, words, found, steps = measured(model, some)
    outside = steps["keep"].median - sum(found[f"{kind} | keep"].median for kind in kinds.values())
    for label in ("w8", "w4"):
        predicted = outside + sum(found[f"{kinds[name]} | {words[label][name]}"].median for name in kinds)
        with graphs.substituted(model, dict(some[label])):
            truth = step_of(model) - step_of(Row())
        assert predicted - steps["keep"].median == pytest.approx(truth)
        assert steps[label].median - steps["keep"].median == pytest.approx(truth, abs=2.1 * DRIFT)


def test_no_time_is_below_nothing_and_differences_stay():
    """A format that saves more than a layer takes by itself: full precision takes that much in the step."""
    whole, added = {"a": Figure(2.0, 1.5, 3.0, 5)}, {("a", "w8"): Figure(-6.0, -7.0, -5.0, 5)}
    found = graphs._together(whole, added)
    assert found["a | keep"] == Figure(6.0, 5.5, 7.0, 5)
    assert found["a | w8"] == Figure(0.0, 0.0, 1.0, 5)


@pytest.mark.parametrize(("rounds", "step", "turns"), [(15, 2.5e-3, 15), (15, 1e-2, 5), (15, 0.5, 3), (2, 1e-3, 3)])
def test_long_steps_have_fewer_turns(rounds, step, turns):
    assert graphs._turns_of(rounds, step) == turns


def test_one_kind_takes_the_graphs_that_are_there(model, monkeypatch):
    """All layers of one kind in a format are the step with all of them: no graph is made twice."""
    del model[4:]
    made = []
    graph_of = stopwatch.graph_of

    def counted(calls, pool=None):
        made.append((len(calls), pool))
        return graph_of(calls, pool)

    monkeypatch.setattr(stopwatch, "graph_of", counted)
    measured(model, formats(model))
    assert [pool for count, pool in made if count == 1] == [None, "pool", "pool"]


def test_figures_of_a_gpu_are_of_their_place_in_a_model(model, monkeypatch):
    """A cache of measurements holds those of each model beside those of others: layers cost what they do there."""
    seen = []

    def timed(model, call, some, kinds, words, rounds):
        seen.append(set(kinds.values()))
        one = Figure(1.0, 1.0, 1.0, 1)
        entries = {f"{kinds[n]} | {words[label][n]}": one for label in some for n in kinds}
        return entries, dict.fromkeys(some, one)

    class Cuda:
        type = "cuda"

    monkeypatch.setattr(kept, "time_in_graphs", timed)
    monkeypatch.setattr(kept, "device_words", lambda device: "a GPU")
    shorter = Row()
    del shorter[5]
    both = [(one, formats(one)) for one in (model, shorter)]
    monkeypatch.setattr(Row, "parameters", lambda self, recurse=True: iter([_on(Cuda())]))
    for one, some in both:
        costs(one, CALL, some, 1, "")
    first, second = seen
    assert not first & second and len(first) == len(second) == 2


def _on(device):
    """Something that lies on a device."""
    return type("Tensor", (), {"device": device})()
