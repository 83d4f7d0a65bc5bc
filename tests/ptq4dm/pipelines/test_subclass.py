"""A subclass in whose functions one global name means something else."""

import functools

import pytest

from ptq4dm.pipelines.subclass import subclass_where


def word():
    return "own"


def said():
    """A helper that uses the name."""
    return word()


def twice(function):
    @functools.wraps(function)
    def called(*args, **kwargs):
        return [function(*args, **kwargs) for _ in range(2)]

    return called


class Mixin:
    def greeting(self):
        return f"mixin {word()}"


class Base(Mixin):
    def greeting(self):
        return f"base {word()}, {super().greeting()}"

    def plain(self):
        return "base"

    def over(self):
        return word()


class Kind(Base):
    def __init__(self, name="x"):
        super().__init__()
        self.name = name

    def __call__(self, a=1, *rest, b=2, **more):
        return word(), a, rest, b, more

    def greeting(self):
        return f"kind {super().greeting()}"

    def over(self):  # does not use the name, and must not be passed over for a copy of Base's
        return "kind"

    @twice
    def decorated(self):
        return word()

    @twice
    def decorated_super(self):
        return super().greeting()

    @staticmethod
    def alone():
        return said()

    @classmethod
    def made(cls):
        return cls.__name__, word()

    @property
    def shown(self):
        return word()

    def nested(self):
        inner = [word() for _ in range(2)]
        return (lambda: [*inner, word()])()

    def recursive(self, n=2):
        return [word(), *self.recursive(n - 1)] if n else []


def counter():
    count = 0

    def counted(self):
        nonlocal count
        count += 1
        return word(), count

    return counted


Kind.counted = counter()


@pytest.fixture
def one():
    one = Kind()
    one.__class__ = subclass_where(Kind, "word", lambda own: lambda: f"not {own()}")
    return one


def test_all_functions_of_the_object_see_it(one):
    assert one() == ("not own", 1, (), 2, {}) and one(3, 4, b=5, c=6) == ("not own", 3, (4,), 5, {"c": 6})
    assert one.decorated() == ["not own"] * 2
    assert one.alone() == "not own" and one.made() == ("Kind", "not own") and one.shown == "not own"
    assert one.nested() == ["not own"] * 3 and one.recursive() == ["not own"] * 2


def test_super_reaches_what_it_reached(one):
    assert one.greeting() == "kind base not own, mixin not own"
    assert one.decorated_super() == ["base not own, mixin not own"] * 2
    assert one.over() == "kind" and one.plain() == "base"


def test_closures_are_shared_with_the_class(one):
    first = Kind().counted()[1]
    assert one.counted() == ("not own", first + 1) and Kind().counted() == ("own", first + 2)


def test_the_class_and_its_module_stay_as_they_are(one):
    assert type(one) in (Kind,) and {Kind: 1}[type(one)] == 1  # equal
    assert type(one) not in (Base, Mixin) and type(one) is not Kind
    assert isinstance(one, Kind) and type(one).__name__ == "Kind" and type(one).__module__ == Kind.__module__
    assert Kind()() == ("own", 1, (), 2, {}) and Kind().greeting() == "kind base own, mixin own"
    assert word() == said() == "own"
    one.__class__ = Kind
    assert one.decorated() == ["own"] * 2 and vars(one) == {"name": "x"}


def test_a_class_that_does_not_use_the_name_is_itself():
    assert subclass_where(Kind, "no_such_name", lambda own: own) is Kind
