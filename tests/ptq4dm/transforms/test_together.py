"""Transforms that would undo or overwrite each other are refused: in recipes, beside a method's own, and in plans."""

from dataclasses import fields

import pytest
from torch import nn

import ptq4dm
from ptq4dm.errors import UserError
from ptq4dm.quantization.recipe import METHODS
from ptq4dm.transforms.base import TransformPlan, apply_all

ROTATIONS = (("hadamard", "regular"), ("sylvester", "sylvester"))

TWO = {
    "hadamard": (("hadamard:64", "sylvester:32"), "a layer rotates its input once, by hadamard:64 or sylvester:32"),
    "itself": (("hadamard:16", "hadamard:64"), "the transform 'hadamard' is made twice"),
    "undone": (("rotate", "rotate"), "the transform 'rotate' is made twice"),
    "smooth": (("smooth", "smooth:alpha=0.3"), "the transform 'smooth' is made twice"),
}


@pytest.mark.parametrize("case", TWO)
def test_transforms_that_undo_or_overwrite_each_other_are_refused(case):
    texts, words = TWO[case]
    for method in METHODS.values():
        if "transforms" in {item.name for item in fields(method)} and not method.loaded_only:
            with pytest.raises(UserError, match=words):
                method(transforms=texts)


def test_a_methods_own_transforms_are_counted():
    with pytest.raises(UserError, match="the transform 'rotate' is made twice"):
        ptq4dm.QoQConfig(rotation="values", transforms=("rotate",))


def test_plans_with_two_transforms_of_one_place_are_refused():
    turned = [TransformPlan(kind, ["0"], {"group": 16, "kind": name}) for kind, name in ROTATIONS]
    twice = [TransformPlan("rotate", ["0", "1"], {"block": 2})] * 2
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    for plans in (turned, twice):
        with pytest.raises(UserError, match="of which only one could be made|'rotate' of .* twice"):
            apply_all(model, plans)
        with pytest.raises(UserError, match="of which only one could be made"):
            ptq4dm.Plan.from_dict(ptq4dm.Plan("rtn", {}, plans).to_dict()).check()
    apart = [TransformPlan(kind, [str(n)], {"group": 16, "kind": name}) for n, (kind, name) in enumerate(ROTATIONS)]
    apply_all(model, apart)
