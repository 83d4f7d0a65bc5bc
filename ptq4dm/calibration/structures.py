"""The containers of a call's arguments, and the plain values in them, as JSON in a file's header.

What comes back is built of plain containers only. PyTorch's own reader of such texts would import whatever module a
text names (for the factory of a defaultdict, for the class of an enum), so each text is looked through before.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import UserError
from ..files.outside import described, parse_json

SEQUENCES = {
    "builtins.tuple",
    "builtins.list",
    "collections.deque",
    "torch.Size",
    "torch.fx.immutable_collections.immutable_list",
}
MAPPINGS = {"builtins.dict", "collections.OrderedDict", "torch.fx.immutable_collections.immutable_dict"}
FACTORIES = {"list", "dict", "set", "tuple", "int", "float", "str", "bool"}  # of a defaultdict


def write_structure(structure: pytree.TreeSpec) -> str:
    """JSON of the containers of a call. Raises UserError for containers that no file can hold."""
    try:
        return pytree.treespec_dumps(structure)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise UserError(f"the model is called with containers that cannot be kept in a file ({error}).") from None


def read_structure(text: Any, leaves: int) -> pytree.TreeSpec:
    """The containers of (args, kwargs) with so many values in them. Raises ValueError for anything else."""
    if not isinstance(text, str):
        raise ValueError(f"the structure of a call is {described(text)}")
    _, tree = parse_json(text)
    found = _leaves(tree)
    (args, kwargs) = (one["type"] for one in tree["children_spec"])
    if tree["type"] != "builtins.tuple" or args != "builtins.tuple" or kwargs != "builtins.dict":
        raise ValueError("the structure of a call is not that of arguments")
    if not all(isinstance(name, str) for name in parse_json(tree["children_spec"][1]["context"])):
        raise ValueError("an argument's name is no text")
    if found != leaves:
        raise ValueError(f"the structure of a call has places for {found} values, and {leaves} are there")
    return pytree.treespec_loads(text)


def _leaves(tree: Any) -> int:
    """How many values a structure holds. Raises ValueError where it is not made of plain containers."""
    if not isinstance(tree, dict) or set(tree) != {"type", "context", "children_spec"}:
        raise ValueError("the structure of a call is damaged")
    kind, context, children = tree["type"], tree["context"], tree["children_spec"]
    if not isinstance(children, list):
        raise ValueError("the structure of a call is damaged")
    if kind is None:
        if context is not None or children:
            raise ValueError("the structure of a call is damaged")
        return 1
    if not isinstance(kind, str):
        raise ValueError("the structure of a call is damaged")
    if kind in SEQUENCES:
        length = parse_json(context)  # of a deque: the most that it takes
        if not (length is None or (kind == "collections.deque" and type(length) is int and length >= len(children))):
            raise ValueError("the structure of a call is damaged")
    else:
        _check_keys(_keys(kind, context), len(children))
    return sum(map(_leaves, children))


def _keys(kind: str, context: Any) -> Any:
    if kind in MAPPINGS:
        return parse_json(context)
    if kind == "collections.defaultdict" and isinstance(context, dict):
        if context.get("default_factory_module") == "builtins" and context.get("default_factory_name") in FACTORIES:
            return context.get("dict_context")
    else:
        known = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(kind)
        if isinstance(known, type) and issubclass(known, OrderedDict):
            return parse_json(context)  # an output of diffusers' or transformers' models, which is a dict
    raise ValueError(f"the structure of a call names {described(kind)}, which is no plain container")


def _check_keys(keys: Any, count: int) -> None:
    plain = isinstance(keys, list) and all(key is None or isinstance(key, (str, int, float)) for key in keys)
    if not plain or len(set(keys)) != count or len(keys) != count:
        raise ValueError("the keys of a dict in the structure of a call do not fit")


def write_leaf(leaf: Any) -> Any:
    """JSON of a value that is no tensor. Raises UserError where there is none."""
    if isinstance(leaf, torch.Size):
        return {"size": list(leaf)}
    for kind in (torch.dtype, torch.device):
        if isinstance(leaf, kind):
            return {kind.__name__: str(leaf).removeprefix("torch.")}
    if isinstance(leaf, (bool, int, float, str)) or leaf is None:
        return leaf
    raise UserError(
        f"the model is called with a {type(leaf).__name__}, which cannot be kept in a file; tensors, numbers, "
        "strings and tuples, lists and dicts of them can."
    )


def read_leaf(leaf: Any) -> Any:
    """A value from its JSON. Raises ValueError or RuntimeError for what `write_leaf` does not write."""
    if leaf is None or isinstance(leaf, (bool, int, float, str)):
        return leaf
    if isinstance(leaf, dict) and len(leaf) == 1:
        ((kind, value),) = leaf.items()
        if kind == "size" and isinstance(value, list) and all(type(n) is int and n >= 0 for n in value):
            return torch.Size(value)
        if kind == "device" and isinstance(value, str):
            return torch.device(value)
        if kind == "dtype":
            return dtype_named(value)
    raise ValueError(f"a value of a call is {described(leaf)}")


def dtype_named(name: Any) -> torch.dtype:
    """A dtype by its name ("float32"). Raises ValueError where there is none."""
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{described(name)} is no dtype")
    return found
