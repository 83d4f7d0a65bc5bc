"""Times of layers in place, by a clock that is not the machine's; the file that keeps them."""

import json

import pytest
import torch
from torch import nn

from fake_clock import FLOAT, INT4, INT8, OUTSIDE, FakeClock
from helpers import normal, same
from ptq4dm import RTNConfig, UserError
from ptq4dm.budgets import costs as kept
from ptq4dm.budgets.clocks import Figure, Times, between, dealt, kinds_of, pooled, time_in_place
from ptq4dm.budgets.costs import costs, file_of
from ptq4dm.budgets.graphs import with_times_on
from ptq4dm.calibration.calls import Call
from ptq4dm.quantization.planning import make_plan

pytestmark = pytest.mark.usefixtures("one_thread")


class Twice(nn.Module):
    """Two layers of one kind, one of them called twice, a convolution, and one that is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.spare = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.conv = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.two(self.one(self.one(self.norm(self.conv(x)))))


CALL = Call((normal(2, 4, 8, 8),), {})
NAMES = ["one", "two", "spare", "conv"]


def formats(model, **more):
    found = {"keep": {}}
    for label, options in {"w8": {}, "w4": {"weight_bits": 4}, **more}.items():
        config = RTNConfig(activations="dynamic", **options)
        found[label], _ = config.pack(model, make_plan(model, config), None)
    return found


@pytest.fixture
def clock(monkeypatch):
    return FakeClock().install(monkeypatch)


def test_every_format_is_timed_in_place_and_the_model_stays(clock):
    model = Twice()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    times = time_in_place(model, CALL, formats(model), NAMES, 3, clock)
    assert same(before, model) and "forward" not in vars(model.one)
    for label, price in {"keep": FLOAT, "w8": INT8, "w4": INT4}.items():
        expected = {"one": 2 * 64 * price, "two": 64 * price, "spare": 0.0, "conv": 144 * price}
        for name, seconds in expected.items():
            assert times.layers[label][name] == pytest.approx([seconds] * 3, abs=1e-15)
        step = sum(expected.values()) + OUTSIDE
        assert times.steps[label] == pytest.approx([step] * 3)


def test_layers_of_one_kind_share_a_measurement():
    kinds = {"a": "Linear [4, 4]", "b": "Linear [4, 4]", "c": "Linear [8, 4]"}
    times = Times({"keep": {"a": [1.0, 2.0], "b": [3.0, 10.0], "c": [5.0, 5.0], "d": [7.0]}})
    found = pooled(times, kinds, {"keep": dict.fromkeys(kinds, "keep")})
    assert found["Linear [4, 4] | keep"] == Figure(4e6, pytest.approx(3e6), pytest.approx(5e6), 4)
    assert found["Linear [8, 4] | keep"].median == 5e6 and len(found) == 2


def test_mixtures_deal_each_format_to_each_layer_once():
    labels, names = ["keep", "w8", "w4"], [str(number) for number in range(20)]
    mixtures = dealt(labels, names)
    assert len(mixtures) == 3 and mixtures == dealt(labels, names)
    for name in names:
        assert sorted(given[name] for given in mixtures.values()) == sorted(labels)
    for given in mixtures.values():
        assert set(given.values()) == set(labels)


def test_a_format_has_the_mean_of_both_surroundings():
    alike, among = {"a": Figure(2.0, 1.0, 3.0, 4), "b": Figure(1.0, 1.0, 1.0, 4)}, {"a": Figure(4.0, 2.0, 5.0, 4)}
    assert between(alike, among) == {"a": Figure(3.0, 1.5, 4.0, 8), "b": alike["b"]}


def test_a_layer_is_timed_in_uniform_models_and_in_mixtures(monkeypatch):
    """Here it takes twice as long where its neighbour has another format."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    some = formats(model, w4={"weight_bits": 4, "first_last": "same"}, w8={"first_last": "same"})

    def timed(model, call, given, names, rounds, clock):
        times = Times(steps={label: [1.0] for label in given})
        for label, layers in given.items():
            row = [layers[n].plan.weight_bits if n in layers else 32 for n in names]
            times.layers[label] = {n: [1e-6 * row[i] * (1 + (len(set(row)) > 1))] for i, n in enumerate(names)}
        return times

    monkeypatch.setattr(kept, "time_in_place", timed)
    found = costs(model, Call((normal(2, 8),), {}), some, 1, "")
    assert set(found.steps) == set(some) == {"keep", "w8", "w4"}
    for label, bits in (("keep", 32), ("w8", 8), ("w4", 4)):
        assert [one.median for one in found.layers[label].values()] == pytest.approx([1.5 * bits] * 6)


def test_kinds_tell_shapes_inputs_and_how_often_a_layer_is_called():
    kinds = kinds_of(Twice(), NAMES, CALL)
    assert "spare" not in kinds and kinds["one"] != kinds["two"]
    assert kinds["two"] == "Linear [8, 8] with bias on [2, 4, 8, 8] float32"
    assert kinds["one"].count("[2, 4, 8, 8]") == 2
    assert "padding (1, 1)" in kinds["conv"]


def test_outside_is_the_step_minus_the_sum_of_the_layers(clock):
    model = Twice()
    found = costs(model, CALL, formats(model), 2, "", clock)
    assert found.fresh and found.outside == pytest.approx(OUTSIDE * 1e6)
    assert found.layers["w8"]["conv"].median == pytest.approx(144 * INT8 * 1e6)
    assert found.steps["w4"].median == pytest.approx((3 * 64 + 144) * INT4 * 1e6 + OUTSIDE * 1e6)


def test_measurements_are_kept_for_this_device_and_used_again(clock, tmp_path):
    model = Twice()
    first = costs(model, CALL, formats(model), 2, tmp_path, clock)
    path = file_of(torch.device("cpu"), tmp_path)
    written = json.loads(path.read_text())
    assert f"{torch.get_num_threads()}_threads" in path.name and torch.__version__ in path.name
    assert written["device"].endswith("1 threads") and len(written["steps"]) == 3

    def stopped():
        raise AssertionError("nothing is to be timed")

    again = costs(model, CALL, formats(model), 2, tmp_path, stopped)
    assert not again.fresh and (again.layers, again.steps) == (first.layers, first.steps)
    grouped = formats(Twice(), g64={"weight_bits": 4, "affine": True})
    assert costs(model, CALL, grouped, 2, tmp_path, clock).fresh  # a format that was not measured


@pytest.mark.parametrize("layers", ["[]", '{"a": [1, 2]}', '{"a": [1, 2, NaN, 4]}', '{"a": [1, 2, true, 4]}'])
def test_a_file_that_holds_no_measurements_is_told(tmp_path, layers):
    path = tmp_path / "costs.json"
    path.write_text(f'{{"layers": {layers}, "steps": {{}}}}')
    with pytest.raises(UserError, match="costs.json cannot be read .* remove it: it is measured again"):
        kept.load(path)


def test_times_that_are_numbers_become_tensors_for_a_graph():
    """A CUDA graph copies no number to the GPU."""

    class Net(nn.Module):
        config = {}

        def forward(self, sample, timestep, class_labels=None):
            return sample * timestep

    x = normal(2, 3)
    found = with_times_on(torch.device("cpu"), Net(), Call((x, 220), {"class_labels": 3}))
    assert found.args[0] is x and torch.equal(found.args[1], torch.tensor(220)) and found.kwargs["class_labels"] == 3
