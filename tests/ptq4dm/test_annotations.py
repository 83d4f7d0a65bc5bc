"""Types of fields: a value of JSON is of an annotated type or not, and words say which."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from ptq4dm.annotations import MOST, complaint, fits
from ptq4dm.checks import check_fields, check_types


@dataclass
class Choices:
    name: str = ""
    count: int = 0
    share: float | None = None
    on: bool = False
    sizes: tuple[int, ...] = ()
    table: dict[str, list] = field(default_factory=dict)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"name": "x", "count": -3, "share": 2, "on": True},  # a whole number is a number
        {"sizes": [1, 2]},  # JSON has no tuples
        {"count": MOST, "share": None, "table": {"a": []}},
    ],
)
def test_values_of_their_types(values):
    check_types(Choices(**values))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"name": 5}, "name must be a text; got 5"),
        ({"count": True}, "count must be a whole number; got True"),
        ({"count": 2.0}, "got 2.0"),
        ({"count": MOST + 1}, "count must be a whole number from -"),
        ({"share": float("nan")}, "share must be a number or None, not NaN or infinity; got nan"),
        ({"share": "1"}, "share must be a number or None; got '1'"),
        ({"on": 1}, "on must be True or False; got 1"),
        ({"sizes": [1, "2"]}, "sizes must be a list of whole numbers; got [1, '2']"),
        ({"sizes": "12"}, "got '12'"),
        ({"table": {1: []}}, "table must be a dict of values that are each a list by texts; got a dict"),
        ({"table": []}, "got an empty list"),
    ],
)
def test_values_of_other_types(values, words):
    with pytest.raises(ValueError) as caught:
        check_types(Choices(**values))
    assert words in str(caught.value)


def test_what_a_file_cannot_hold_is_taken_from_python_alone():
    """A file's numbers are JSON's; from Python, NumPy's and a tensor's are taken for what they are."""
    for number in (np.float32(2), np.int64(2), torch.tensor(2)):
        assert complaint(number, float) is None and not fits(number, float)
        check_fields(Choices(share=number), "Choices")
        with pytest.raises(ValueError, match="share must be a number or None"):
            check_types(Choices(share=number))
    assert complaint([MOST + 1], list[int]) is None and not fits([MOST + 1], list[int])
    assert not fits({"a": [1, float("nan")]}, dict[str, list[float]])
    assert fits([4, 0.5], tuple[int, float]) and not fits([4, 0.5, 1], tuple[int, float])
    assert fits([1, True], list[Any]) and not fits([1, True], list[int])


def test_a_class_whose_annotations_nobody_can_read_is_not_compared():
    @dataclass
    class Local:
        size: "Nowhere" = 0  # noqa: F821

    check_types(Local(size="x"))
