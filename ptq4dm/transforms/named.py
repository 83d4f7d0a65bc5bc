"""Transforms as recipes name them: "reorder", or "smooth:alpha=0.3", a name and an option of its `find`.

Where there is one option, its name may be left out: "hadamard:64"."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from .base import TRANSFORMS, Transform, is_online


def named(text: str) -> tuple[Transform, dict[str, float]]:
    """(the transform, options of its `find`) that a text names: "kind" or "kind:option=number".

    Raises UserError for a kind or an option that nobody knows, and for a number that is out of its range.
    """
    kind, colon, rest = text.partition(":")
    transform = TRANSFORMS.find(kind)
    if not colon:
        return transform, {}
    known = options_of(transform)
    name, equals, number = rest.partition("=")
    if not equals and len(known) == 1 and _is_number(rest):
        name, number = known[0], rest
    if name not in known:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise UserError(f"the transform '{kind}' has no option '{name}'; {has}.")
    if not _is_number(number):
        raise UserError(f"'{text}' gives {name} no number; write '{kind}:{name}=0.5', for one.")
    value = float(number)
    getattr(transform, "check_options", lambda **_: None)(**{name: value})
    return transform, {name: value}


def check_together(texts: Sequence[str]) -> None:
    """Raises UserError where two of the transforms named would undo or overwrite each other.

    Each kind is made once ("rotate" twice is no rotation at all), and a layer rotates its input by one matrix. Others
    change the weights one after the other, and what each finds is of the model that those before it left.
    """
    kinds = [text.partition(":")[0] for text in texts]
    if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
        raise UserError(f"the transform '{twice}' is made twice ({', '.join(texts)}); name it once.")
    online = [text for text, kind in zip(texts, kinds, strict=True) if is_online(kind)]
    if len(online) > 1:
        raise UserError(f"a layer rotates its input once, by {' or '.join(online)}; name one of them.")


def options_of(transform: Any) -> list[str]:
    """The names of the options of a transform: what its `find` takes by keyword alone."""
    parameters = inspect.signature(transform.find).parameters.values()
    return [one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
