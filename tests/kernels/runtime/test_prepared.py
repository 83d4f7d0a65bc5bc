"""Forms of a weight live as long as the weight, and never keep it alive."""

import gc
import weakref

import pytest
import torch

from ptq4dm.kernels.runtime.prepared import CACHE, prepared

FORMS = {
    "the weight itself": lambda weight: weight,
    "a view of it": lambda weight: weight.flatten(0),
    "another tensor": lambda weight: weight + 1,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_does_not_keep_its_weight_alive(form):
    def use():
        weight = torch.arange(8, dtype=torch.int8).view(2, 4).clone()
        made = prepared(weight, "form", lambda: FORMS[form](weight))
        assert torch.equal(made, prepared(weight, "form", lambda: FORMS[form](weight)))
        return id(weight), weakref.ref(weight)

    name, alive = use()
    gc.collect()
    assert alive() is None and name not in CACHE


def test_a_form_is_made_once():
    weight = torch.ones(2, 4)
    first = prepared(weight, "form", lambda: weight + 1)
    assert prepared(weight, "form", lambda: weight + 2) is first
