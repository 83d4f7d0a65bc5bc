"""Checksums of a saved model: whether the tensors on disk are those that were saved, bit by bit.

config.json of a quantized network holds, in its quantization_config,

    "checksums": {"layers": {name: [of the codes, of all else]}, "rest": of the tensors of other layers}

CRC-32 of names, dtypes, shapes and bytes, as safetensors stores them; all else of a layer has its plan in it. It
finds flipped bits and exchanged files; it is no signature: who changes a file on purpose can change that, too.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from functools import cache
from typing import Any

from torch import Tensor, nn

from ..annotations import fits
from ..files.crc import checksum as crc_of
from ..files.outside import checked_object
from ..layers.plan import Plan
from .refusals import bare

REST = ""  # stands for the tensors that belong to no quantized layer


def checksum(tensors: Mapping[str, Tensor], names: Iterable[str], choices: Any = None) -> int:
    """CRC-32 of some tensors: of their names, dtypes, shapes and bytes; and of a layer's choices."""
    crc = 0 if choices is None else zlib.crc32(_text(choices).encode())
    for name in sorted(names):
        tensor = tensors[name]
        crc = crc_of(tensor, zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc))
    return crc


def is_code(name: str) -> bool:
    """Whether a tensor of a quantized layer holds codes."""
    return name.rpartition(".")[2].startswith("qweight")


def parts(names: Iterable[str], layers: Iterable[str]) -> dict[str, tuple[list[str], list[str]]]:
    """Layer -> (its tensors of codes, its other tensors); of no layer: REST -> ([], all of them)."""
    found: dict[str, tuple[list[str], list[str]]] = {name: ([], []) for name in (*layers, REST)}
    for name in names:
        owner, _, tensor = name.rpartition(".")
        inside = owner in found and owner != REST
        if not (inside and tensor == "like"):  # says a dtype, and old files have none
            found[owner if inside else REST][0 if inside and is_code(name) else 1].append(name)
    return found


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a model saves, by name: without peft's wrappers, and what has two names once, by the name that
    transformers calls the source."""
    tensors = {bare(name): tensor for name, tensor in model.state_dict().items()}
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        tensors.pop(name, None)
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        if {name, source} <= tensors.keys() and tensors[name].data_ptr() == tensors[source].data_ptr():
            del tensors[name]
    return tensors


def checksums_of(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor] | None = None) -> dict | None:
    """The checksums of a model as it would be saved now, or of tensors that were saved of it; None where tensors are
    not in memory."""
    tensors = saved_tensors(model) if tensors is None else tensors
    if any(tensor.is_meta for tensor in tensors.values()):
        return None
    split = parts(tensors, plan.layers)
    rest = split.pop(REST)[1]
    return {
        "layers": {
            name: [checksum(tensors, codes), checksum(tensors, others, plan.layers[name])]
            for name, (codes, others) in sorted(split.items())
        },
        "rest": checksum(tensors, rest),
    }


def changed(
    sums: dict,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    chosen: Callable[[str, bool], bool] | None = None,
) -> list[str]:
    """The layers, REST among them, whose tensors or choices have other checksums than those recorded; sorted.

    chosen: (layer, whether it is for its codes) -> whether to look; everything if left out.
    """
    look, wrong = chosen or (lambda *_: True), []
    for name, (codes, others) in parts(tensors, plan.layers).items():
        kept = [None, sums["rest"]] if name == REST else sums["layers"].get(name, [-1, -1])
        same = not (look(name, True) and name != REST) or checksum(tensors, codes) == kept[0]
        same = same and (not look(name, False) or checksum(tensors, others, plan.layers.get(name)) == kept[1])
        if not same:
            wrong.append(name)
    return sorted({*wrong, *(sums["layers"].keys() - plan.layers.keys())})


def _text(choices: Any) -> str:
    """What a layer's choices are beside the defaults: a later version may have more of them."""
    plain = _defaults(type(choices))  # type: ignore[arg-type]  # mypy takes no class for hashable
    chosen = {name: value for name in plain if (value := getattr(choices, name)) != plain[name]}
    return json.dumps(chosen, sort_keys=True, default=asdict)


@cache
def _defaults(kind: type) -> dict[str, Any]:
    return {item.name: item.default for item in fields(kind)}


def checked_sums(sums: Any) -> dict:
    """The checksums that config.json holds. Raises ValueError where they are none."""
    checked_object(sums, {"layers": dict, "rest": int})
    if not fits(sums["layers"], dict[str, tuple[int, int]]):
        raise ValueError("its checksums are not two numbers for each layer")
    return sums


def told(layers: list[str]) -> str:
    """Names of changed layers for one line."""
    names = [f"'{name}'" if name else "tensors of layers that are not quantized" for name in layers]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
