"""What is still read of modules that are over: found in the dataflow of one call, whatever lies between modules."""

import numpy as np
import pytest
import torch
from torch import nn

from helpers import normal
from ptq4dm.calibration.record import answers, record
from ptq4dm.walk.finished import finished_before, skipping
from ptq4dm.walk.needed import needed_after
from ptq4dm.walk.watching import dataflow_of

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Three layers and what lies between them: glue(model, a, b) -> what `last` is fed."""

    def __init__(self, glue):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.last = (nn.Linear(8, 8) for _ in range(3))
        self.glue = glue

    def forward(self, x, timestep=None):
        a = self.a(x)
        return self.last(self.glue(self, a, self.b(x)))


def needed(model, stop="last"):
    """(keys of what is read after the stop, all that is needed), after a check that it is enough."""
    with record(model.eval()) as batch, torch.no_grad():
        model(normal(4, 8), timestep=torch.tensor(1))
    found = needed_after(dataflow_of(model, batch), [stop])
    done = finished_before(model, [stop], batch, (), found.reads, found.opened)
    assert [one.key for one in done] == found.keys
    (exact,) = answers(model, batch)
    with skipping(model, done):
        assert torch.equal(answers(model, batch)[0], exact)
    return sorted(key.strip("/").split("#")[0] for key, _ in found.reads or ()), found


def written_elsewhere(_, a, b):
    """As a kernel that PyTorch does not see."""
    out = torch.empty_like(a)
    out.numpy()[:] = a.numpy()
    return out


def masked(_, a, b):
    return torch.where(b > 1e9, a, b)


def changed(_, a, b):
    b.zero_()
    b[:2] += a[:2]
    return b


def filled(_, a, b):
    out = torch.empty(4, 8)
    out[:2] = b[:2]
    out[2:] = b[2:]
    return out


def overwritten(_, a, b):
    a.add_(1)
    return b


CASES = [
    (lambda _, a, b: b, "b"),
    (lambda _, a, b: a + 0 * b, "ab"),
    (masked, "ab"),  # also where the values at hand do not show it
    (changed, "ab"),
    (filled, "b"),
    (overwritten, "b"),
    (written_elsewhere, "ab"),
    (lambda _, a, b: torch.from_numpy(np.array(a.numpy())), "ab"),
    (lambda _, a, b: b[a.argsort(0)[:, 0]], "ab"),
    (lambda _, a, b: b.view(2, 16).t().reshape(8, 4).t(), "b"),
]


@pytest.mark.parametrize("glue, read", CASES)
def test_what_is_read_is_found_and_is_enough(glue, read):
    assert needed(Net(glue))[0] == list(read)


def test_where_python_looks_at_values_other_calls_may_read_something_else():
    by_output = needed(Net(lambda _, a, b: b if a.sum() > -1e9 else b + 1))[1]
    by_constant = needed(Net(lambda net, a, b: b if net.a.weight.sum() > -1e9 else a))[1]
    plain = needed(Net(lambda _, a, b: b))[1]
    assert by_output.reads is None and by_output.varies
    assert by_constant.reads == {("/b#0", 0)} and by_constant.varies
    assert plain.reads == {("/b#0", 0)} and not plain.varies


def test_a_skip_is_kept_until_it_is_read_and_no_longer():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

        def forward(self, x, timestep=None):
            first = x = self.layers[0](x)
            for layer in self.layers[1:4]:
                x = layer(x)
            return self.layers[5](self.layers[4](x + first))

    kept = {stop: needed(Skips(), f"layers.{stop}")[0] for stop in range(1, 6)}
    assert kept == {
        1: ["layers.0"], 2: ["layers.0", "layers.1"], 3: ["layers.0", "layers.2"], 4: ["layers.0", "layers.3"],
        5: ["layers.4"],
    }  # fmt: skip


class Remembers(nn.Module):
    """Leaves something for others than it gives."""

    def __init__(self):
        super().__init__()
        self.inner, self.seen = nn.Linear(8, 8), []

    def forward(self, x):
        inner = self.inner(x)
        self.seen[:] = [inner * 2]
        return inner + 1


def test_a_module_of_which_others_read_more_than_it_gave_is_not_kept_whole():
    model = Net(lambda net, a, b: a + net.a.seen[0])
    model.a = Remembers()
    read, found = needed(model)
    assert found.opened == {"a"} and read == ["a"] and "/a#0/a.inner#0" in found.keys


class Counts(nn.Module):
    """Changes a buffer that is not its own."""

    def __init__(self, count):
        super().__init__()
        self.count = [count]

    def forward(self, x):
        self.count[0] += 1
        return x * 2


def test_a_module_that_changes_what_others_have_is_run_again():
    model = Net(lambda net, a, b: b + 0 * net.count)
    model.register_buffer("count", torch.zeros(1))
    model.a = Counts(model.count)
    read, found = needed(model)
    assert found.opened == {"a"} and read == ["b"]


def test_without_a_stop_all_is_over():
    assert needed(Net(lambda _, a, b: b), "nowhere")[0] == ["last"]


def test_it_keeps_no_tensor():
    model = Net(lambda _, a, b: a + b).eval()
    with record(model) as batch, torch.no_grad():
        model(normal(4, 8), timestep=torch.tensor(1))
    flow = dataflow_of(model, batch)
    stored = [one.ref.expired() for one in flow._stored.values()]
    assert sum(stored) >= 5 and not any(module._forward_hooks for module in model.modules())
