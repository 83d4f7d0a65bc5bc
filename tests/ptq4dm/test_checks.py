"""Values looked at by their annotations."""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from ptq4dm.checks import MOST, check_fields, check_seeds, checked, limits, seeds_of, shown, wrong_fields
from ptq4dm.errors import UserError


@dataclass
class Settings:
    rank: int = field(default=32, metadata=limits(0, 1024))
    share: float = 0.5
    minutes: float | None = field(default=None, metadata=limits(finite=False))
    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    ends: tuple[float, float] = (0.0, 1.0)
    roles: dict[str, str] = field(default_factory=dict)
    steps: Sequence[int] = field(default=(1, 2), metadata=limits(1))
    fast: bool = False
    folder: str | os.PathLike | None = None


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("rank", "8", "rank must be a whole number from 0 to 1024; got '8'"),
        ("rank", True, "rank must be a whole number from 0 to 1024; got True"),
        ("rank", 1.0, "rank must be a whole number from 0 to 1024; got 1.0"),
        ("rank", 1025, "rank must be a whole number from 0 to 1024; got 1025"),
        ("rank", 10**400, "rank must be a whole number from 0 to 1024; got a number of very many digits"),
        ("share", math.nan, "share must be a number, not NaN or infinity; got nan"),
        ("share", "half", "share must be a number; got 'half'"),
        ("minutes", "soon", "minutes must be a number or None; got 'soon'"),
        ("kind", "c", "kind must be one of 'a', 'b'; got 'c'"),
        ("names", "attn", "names must be a list of texts; got 'attn'"),
        ("names", ["attn", 3], "names must be a list of texts; got ['attn', 3]"),
        ("ends", (1.0, 2.0, 3.0), "ends must be 2 numbers; got (1.0, 2.0, 3.0)"),
        ("ends", (1.0, math.inf), "ends must be 2 numbers, not NaN or infinity; got (1.0, inf)"),
        ("roles", {"a": 1}, "roles must be a dict of texts by texts; got a dict"),
        ("steps", [1, 0], "steps must be a list of whole numbers of 1 or more; got [1, 0]"),
        ("fast", 1, "fast must be True or False; got 1"),
        ("folder", 5, "folder must be a text, a path or None; got 5"),
        ("folder", "a\0b", "folder must be a path that a file system can have; got 'a\\x00b'"),
    ],
)
def test_a_wrong_field_is_named(field, value, sentence):
    settings = Settings(**{field: value})
    assert wrong_fields(settings) == [sentence]
    with pytest.raises(UserError) as caught:
        check_fields(settings, "Settings")
    assert str(caught.value) == f"Settings: {sentence}."


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("rank", 0),
            ("share", 1),
            ("minutes", math.inf),
            ("names", ["a"]),
            ("ends", [0, 1]),
            ("steps", range(1, 4)),
        ),
        *(("fast", np.bool_(True)), ("folder", Path("here")), ("roles", {"a": "b"}), ("kind", "b")),
    ],
)
def test_what_is_right_stays(field, value):
    settings = Settings(**{field: value})
    check_fields(settings, "Settings")
    assert getattr(settings, field) == value


@pytest.mark.parametrize("number", [np.int64(4), np.uint8(4), torch.tensor(4)])
def test_numbers_of_others_become_pythons_own(number):
    settings = Settings(rank=number)
    check_fields(settings, "Settings")
    assert type(settings.rank) is int and settings.rank == 4


def test_arguments_are_looked_at_and_what_is_missing_is_pythons_own_error():
    @checked
    def add(one: int, *, two: "int | None" = None, unknown: "NoSuchName" = None) -> int:  # noqa: F821
        return one + (two or 0)

    assert add(1, two=2, unknown=object()) == 3
    with pytest.raises(UserError, match=r"add: two must be a whole number or None; got '2'\.$"):
        add(1, two="2")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'one'"):
        add()
    with pytest.raises(TypeError, match="unexpected keyword argument 'three'"):
        add(1, three=3)


def test_seeds(monkeypatch):
    monkeypatch.setattr("ptq4dm.checks.MOST_SEEDS", 100)
    assert seeds_of(s for s in (0, np.int64(7), torch.tensor(8), MOST)) == [0, 7, 8, MOST]
    for wrong in ([-1], [MOST + 1], [1.0], [True], ["1"], [math.nan], "12", 3, None, [], torch.tensor([1.5])):
        with pytest.raises(UserError):
            seeds_of(wrong)
    for endless in (range(10**30), range(10**8), itertools.count()):
        with pytest.raises(UserError, match="more than 100 seeds"):
            seeds_of(endless)
    check_seeds(MOST - 3, 4)
    with pytest.raises(UserError, match="leaves no room for 5 seeds"):
        check_seeds(MOST - 3, 5)


def test_what_is_shown_is_short_and_never_fails():
    class Loud:
        def __repr__(self):
            raise RuntimeError("no")

    assert shown(Loud()) == "a Loud" and shown(Loud) == "the class Loud"
    assert len(shown("word " * 1000)) <= 64 and len(shown("x" * 1000)) <= 64
    assert shown([Loud(), 1]) == "[a Loud, 1]"


def test_functions_among_the_arguments():
    """The arguments that an annotation says of a function stand in a list, which is no key of a dictionary."""

    @checked
    def call(show: Callable[[dict], None] | None = None) -> bool:
        return show is None

    assert call() and not call(print)
    with pytest.raises(UserError, match="show must be"):
        call(5)
