"""Types of fields: a value of JSON is of an annotated type or not, and words say which."""

from dataclasses import dataclass, field

import pytest

from ptq4dm.files.typed import LARGEST, check_types


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
        {"count": LARGEST, "share": None, "table": {"a": []}},
    ],
)
def test_values_of_their_types(values):
    check_types(Choices(**values))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"name": 5}, "name is 5 and should be a text"),
        ({"count": True}, "count is True and should be a whole number"),
        ({"count": 2.0}, "count is 2.0"),
        ({"count": LARGEST + 1}, "should be a whole number"),
        ({"share": float("nan")}, "share is nan and should be a finite number or none"),
        ({"share": "1"}, "share is '1'"),
        ({"on": 1}, "on is 1 and should be true or false"),
        ({"sizes": [1, "2"]}, "sizes is list and should be a list of whole numbers"),
        ({"sizes": "12"}, "sizes is '12'"),
        ({"table": {1: []}}, "table is dict and should be a table"),
        ({"table": []}, "table is list"),
    ],
)
def test_values_of_other_types(values, words):
    with pytest.raises(ValueError) as caught:
        check_types(Choices(**values))
    assert words in str(caught.value)


def test_a_class_whose_annotations_nobody_can_read_is_not_compared():
    @dataclass
    class Local:
        size: "Nowhere" = 0  # noqa: F821

    check_types(Local(size="x"))
