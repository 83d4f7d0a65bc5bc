"""A subclass in whose functions one global name means something else: for one object, while the class stays as it is.

Functions find globals in the dictionary of their module. To let one object's functions see another value there, they
are copied with a dictionary of their own, into a subclass that the object can be of for a while. With them are
copied: functions around them (decorators), helper functions of their module that use the name, and all that call
`super()`, for what they reach by it must be the copy, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType
from typing import Any


def subclass_where(kind: type, name: str, changed: Callable[[Any], Any]) -> type:
    """A subclass of a class, of the same name, in whose functions the global `name` is changed(what it was).

    The class itself, where none of its functions uses the name. The subclass is equal (==) to the class, and adds no
    attributes of objects, so that an object may be made one of it by `__class__`, and made one of the class again.
    """
    return _Copier(name, changed).subclass(kind)


class _Copier:
    """Copies of functions; each is made once, also those that call each other."""

    def __init__(self, name: str, changed: Callable[[Any], Any]) -> None:
        self.name, self.changed = name, changed
        self.globals: dict[int, dict[str, Any]] = {}  # by the id of the module's own
        self.copies: dict[FunctionType, FunctionType] = {}
        self.known: dict[FunctionType, bool] = {}
        self.cells: dict[type, CellType] = {}  # what `super()` looks at

    def subclass(self, kind: type) -> type:
        order = kind.__mro__[:-1]
        if not any(self.uses(f) for one in order for value in vars(one).values() for f in _functions(value)):
            return kind
        self.cells = {one: CellType() for one in order}
        names = {name for one in order for name, value in vars(one).items() if self.is_copied(value)}
        new, equal = kind, _equal_to(kind)
        for one in reversed(order):  # one below the other, in the order in which Python looks through the classes
            body = {name: self.remade(value) for name, value in vars(one).items() if name in names}
            named = {key: getattr(one, key) for key in ("__module__", "__qualname__", "__doc__")}
            new = equal(one.__name__, (new,), {**body, **named, "__slots__": ()})
            self.cells[one].cell_contents = new
        return new

    def is_copied(self, value: Any) -> bool:
        return any(self.uses(function) or _calls_super(function) for function in _functions(value))

    def uses(self, function: FunctionType) -> bool:
        """Whether a function uses the name, or a helper that it calls or a function in its closure does."""
        if function not in self.known:
            self.known[function] = any(
                self.name in _names(one.__code__) and self.name in one.__globals__ for one in _reached(function)
            )
        return self.known[function]

    def remade(self, value: Any) -> Any:
        """What stands for an entry of a class in the subclass."""
        if not self.is_copied(value):
            return value
        if isinstance(value, property):
            return property(self.copy(value.fget), self.copy(value.fset), self.copy(value.fdel), value.__doc__)
        if isinstance(value, (staticmethod, classmethod)):
            return type(value)(self.copy(value.__func__))
        return self.copy(value)

    def copy(self, function: Any) -> Any:
        """The function with our globals, and copies in its closure; what is no function is as it was."""
        if not isinstance(function, FunctionType) or function in self.copies:
            return self.copies.get(function, function)
        code, pairs = function.__code__, []
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            held = _held(cell)
            if variable == "__class__":
                pairs.append((self.cells.get(held, cell), None))
            else:
                pairs.append((CellType(), held) if self.is_copied(held) else (cell, None))
        home = self.globals_like(function.__globals__)
        new = FunctionType(code, home, function.__name__, function.__defaults__, tuple(cell for cell, _ in pairs))
        self.copies[function] = new
        for cell, held in pairs:
            if held is not None:
                cell.cell_contents = self.copy(held)
        annotations = "__annotate__" if hasattr(function, "__annotate__") else "__annotations__"
        for key in ("__kwdefaults__", "__module__", "__qualname__", "__doc__", annotations):
            setattr(new, key, getattr(function, key))
        new.__dict__.update(vars(function))
        if isinstance(wrapped := vars(function).get("__wrapped__"), FunctionType):
            new.__wrapped__ = self.copies.get(wrapped, wrapped)  # type: ignore[attr-defined]
        return new

    def globals_like(self, home: dict[str, Any]) -> dict[str, Any]:
        """The globals of a module with the name changed, and with copies of the helper functions that use it."""
        if self.name not in home:
            return home
        if id(home) not in self.globals:
            mine = self.globals[id(home)] = {**home, self.name: self.changed(home[self.name])}
            mine |= {key: self.copy(one) for key, one in home.items() if _is_of(one, home) and self.uses(one)}
        return self.globals[id(home)]


def _equal_to(kind: type) -> type:
    """The kind of classes that are equal to this one: pipelines compare `type(scheduler)` with classes."""

    def equal(cls: type, other: object) -> bool:
        return cls is other or other is kind

    return type(type(kind).__name__, (type(kind),), {"__eq__": equal, "__hash__": lambda cls: hash(kind)})


def _functions(value: Any) -> Iterator[FunctionType]:
    """The functions that an entry of a class is made of."""
    parts = [value.fget, value.fset, value.fdel] if isinstance(value, property) else [value]
    for part in parts:
        part = part.__func__ if isinstance(part, (staticmethod, classmethod)) else part
        if isinstance(part, FunctionType):
            yield part


def _reached(function: FunctionType) -> set[FunctionType]:
    """A function, helpers of its module that it calls, what decorators of these were put on, and so on."""
    found, new = set(), {function}
    while new:
        found |= new
        new = {other for one in new for other in (*_enclosed(one), *_helpers(one))} - found
    return found


def _helpers(function: FunctionType) -> Iterator[FunctionType]:
    home = function.__globals__
    return (home[name] for name in _names(function.__code__) if name in home and _is_of(home[name], home))


def _enclosed(function: FunctionType) -> Iterator[FunctionType]:
    """The functions in a closure: what a decorator was put on."""
    for cell in function.__closure__ or ():
        if isinstance(held := _held(cell), FunctionType):
            yield held


def _held(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _calls_super(function: FunctionType, seen: frozenset[FunctionType] = frozenset()) -> bool:
    inner = (one for one in _enclosed(function) if one not in seen)
    return "__class__" in function.__code__.co_freevars or any(_calls_super(one, seen | {function}) for one in inner)


def _names(code: CodeType) -> set[str]:
    """The names that a function and those defined in it use, but for its local variables."""
    return set(code.co_names).union(*(_names(one) for one in code.co_consts if isinstance(one, CodeType)))


def _is_of(value: Any, home: dict[str, Any]) -> bool:
    """Whether a value is a function that was defined in the module of these globals."""
    return isinstance(value, FunctionType) and value.__module__ == home.get("__name__")
