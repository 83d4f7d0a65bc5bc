"""States of modules: equal as long as nothing that decides on results has changed, and cheap to hold."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ptq4dm.caching.state import State


def module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.scaling = {"default": 1.0}
    model.names = ["default"]
    model.chosen = {"one"}
    return model.eval()


def test_it_is_equal_while_nothing_happens():
    model = module()
    kept = State([model, None], "more").held()
    with torch.no_grad():
        model(torch.randn(3, 4))
    model.state_dict()
    assert (
        kept == State([model, None], "more") and kept != State([model], "less") and kept != State([module()], "more")
    )


CHANGES = {
    "in place": lambda m: m[0].weight.detach().mul_(1),
    "another parameter": lambda m: setattr(m[0], "bias", nn.Parameter(m[0].bias.detach().clone())),
    "no parameter": lambda m: setattr(m[0], "bias", None),
    "memory": lambda m: setattr(m[0].weight, "data", m[0].weight.data.clone()),
    "dtype": lambda m: m.half(),
    "a view": lambda m: setattr(m[0].weight, "data", m[0].weight.data[:2]),
    "a buffer": lambda m: m[1].running_mean.add_(1),
    "a number": lambda m: setattr(m[1], "eps", 0.1),
    "in a dict": lambda m: m.scaling.update(default=2.0),
    "in a list": lambda m: m.names.append("other"),
    "in a set": lambda m: m.chosen.add("two"),
    "a class": lambda m: setattr(m[0], "__class__", type("Other", (nn.Linear,), {})),
    "a function": lambda m: setattr(m[0], "forward", lambda x: x),
    "a module more": lambda m: m.append(nn.Identity()),
    "a module": lambda m: m.__setitem__(1, nn.Identity()),
    "training": lambda m: m.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change):
    model = module()
    kept = State([model]).held()
    CHANGES[change](model)
    assert kept != State([model]) and State([model]) == State([model])


def test_memory_that_is_given_back_is_not_held_and_not_mistaken():
    """A weight that moves away frees its bytes, and what gets them then is not the same weight."""
    model = module()
    kept = State([model]).held()
    storage = StorageWeakRef(model[0].weight.untyped_storage())
    before = model[0].weight.detach().clone()
    model[0].weight.data = torch.zeros(4, 4)
    assert storage.expired()
    model[0].weight.data = before * 2
    assert kept != State([model])


def test_tensors_without_a_count_are_never_the_same():
    model = module()
    with torch.inference_mode():
        model[0].weight = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    assert State([model]) != State([model])
