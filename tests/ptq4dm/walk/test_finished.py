"""What is over before a module is called: kept whole where that is sound, and given again as if it had been run."""

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from helpers import normal
from models import InPlace, pixel_dit
from ptq4dm.calibration.record import answers, record
from ptq4dm.walk.finished import finished_before, size_of, skipping
from ptq4dm.walk.leaves import Passed, Unread

pytestmark = pytest.mark.usefixtures("one_thread")


def batch_of(model, *shape):
    with record(model.eval()) as calls, torch.no_grad():
        model(normal(*shape or (4, 8)), timestep=torch.tensor(1))
    return calls


def names_of(done):
    return [one.module for one in done]


class Aliases(nn.Module):
    """`same` gives its argument and `flat` a view of it: who changes them changes what `first` gave."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.same, self.flat = nn.Identity(), nn.Flatten(0)

    def forward(self, x, timestep=None):
        kept = self.first(x)
        self.same(kept).mul_(2)
        self.flat(kept)[:8].add_(1)
        return self.last(kept) + kept


class Pair(nn.Module):
    def forward(self, x):
        y = x + 1
        return y, [y, 3, None]


class Twice(nn.Module):
    """`shared` is called twice; `pair` gives one tensor two times, and one of them is changed."""

    def __init__(self):
        super().__init__()
        self.shared, self.last, self.pair = nn.Linear(8, 8), nn.Linear(8, 8), Pair()

    def forward(self, x, timestep=None):
        one, (other, factor, _) = self.pair(self.shared(x))
        one.mul_(2)
        return self.last(self.shared(other) * factor)


@pytest.mark.parametrize(
    "build, stop, over",
    [
        (InPlace, "third", ["first", "second"]),
        (Aliases, "last", ["first", "same"]),
        (Twice, "last", ["shared", "pair", "shared"]),
    ],
)
def test_what_is_given_again_is_what_was_made(build, stop, over):
    torch.manual_seed(0)
    model = build()
    batch = batch_of(model)
    (exact,) = answers(model, batch)
    done = finished_before(model, [stop], batch)
    assert names_of(done) == over
    for _ in range(2):  # and nobody has changed what is kept
        with skipping(model, done):
            assert torch.equal(answers(model, batch)[0], exact)


def test_what_is_over_is_not_run_on_the_way_further(monkeypatch):
    model = Twice()
    batch, ran, linear = batch_of(model), [], nn.Linear.forward
    at_first = finished_before(model, ["pair"], batch)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: [ran.append(self), linear(self, x)][1])
    further = finished_before(model, ["last"], batch, at_first)
    assert names_of(at_first) == ["shared"] and names_of(further) == ["shared", "pair", "shared"]
    assert ran == [model.shared]  # its second call
    with skipping(model, further):
        answers(model, batch)
    assert ran == [model.shared, model.last]


def test_an_argument_that_is_passed_on_needs_no_room():
    model = Aliases()
    done = finished_before(model, ["last"], batch_of(model))
    assert isinstance(done[1].output, Passed) and size_of(done) == 4 * 8 * 4


def test_what_is_not_read_has_its_shape_alone_and_shows():
    model = Twice()
    batch = batch_of(model)
    done = finished_before(model, ["last"], batch, reads=[("/shared#1", 0)])
    leaves = pytree.tree_leaves([one.output for one in done])
    assert sum(isinstance(leaf, Unread) for leaf in leaves) == 3 and size_of(done) == 4 * 8 * 4
    with skipping(model, done):
        assert answers(model, batch)[0].isfinite().all()
    nothing = finished_before(model, ["last"], batch, done, reads=[])
    assert size_of(nothing) == 0
    with skipping(model, nothing):
        assert answers(model, batch)[0].isnan().all()
    again = finished_before(model, ["last"], batch, nothing)  # what is gone does not come back
    assert size_of(again) == 0 and nothing == again


def test_a_tensor_that_is_given_twice_is_kept_if_one_of_them_is_read():
    model = Twice()
    (_, pair, _) = finished_before(model, ["last"], batch_of(model), reads=[("/pair#0", 1)])
    assert pair.output[0] is pair.output[1][0] and isinstance(pair.output[0], torch.Tensor)


def test_whole_blocks_are_kept_and_others_part_by_part():
    model = pixel_dit(num_layers=2)
    with record(model) as batch, torch.no_grad():
        model(normal(2, 3, 8, 8), timestep=torch.ones(2), class_labels=torch.ones(2).long())
    names = names_of(finished_before(model, ["transformer_blocks.1.ff.net.2"], batch))
    assert "transformer_blocks.0" in names and not any(name.startswith("transformer_blocks.0.") for name in names)
    assert {"transformer_blocks.1.attn1", "transformer_blocks.1.ff.net.0"} <= set(names)
    assert "transformer_blocks.1" not in names and "transformer_blocks.1.attn1.to_q" not in names


def test_an_error_leaves_the_modules_as_they_were():
    model = Twice()
    done = finished_before(model, ["last"], batch_of(model))
    with pytest.raises(KeyError), skipping(model, done):
        raise KeyError
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
