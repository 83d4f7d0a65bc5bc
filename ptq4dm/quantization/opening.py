"""A packed checkpoint, compared with the plan that lies beside it, before a model takes its tensors.

Names, dtypes and shapes of all tensors, and the values of all but codes, are always looked at. Codes, and the weights
of layers that are not quantized, are most of a file's bytes: they are read where they are few (READ_AT_LOAD), and by
`ptq4dm info --verify` in any case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import DamagedFile
from ..files.outside import TensorFile, read_tensors, reason
from ..layers.base import is_quantized, replace_module
from ..layers.plan import Plan
from ..layers.registry import empty_quantized
from ..layers.shift.norms import put_norms
from ..layers.stored import check_stored
from .checksums import REST, changed, told
from .planning import check_plan
from .recipe import QuantConfig
from .refusals import fuse_as_in

# Bytes for each tensor of a file, and bytes of a file in any case. diffusers takes about 0.15 ms for a tensor, and
# CRC-32, with all the rest, less than a twentieth of that for these: 2 to 3 % of loading, as measured; 5 to 8 % where
# everything is read.
READ_AT_LOAD = (16 << 10, 1 << 20)


def put_empty(model: nn.Module, config: QuantConfig) -> None:
    """Put empty quantized layers, by a config's plan, into a model whose tensors are still to come.

    Raises DamagedFile where the config has no plan, or one that does not fit.
    """
    if config.plan is None:
        raise DamagedFile("config.json names ptq4dm but holds no plan; save the model again.")
    fuse_as_in(config.plan.layers, model)
    check_plan(model, config.plan)
    put_norms(model, config.plan.norms)
    for name, choice in config.plan.layers.items():
        replace_module(model, name, empty_quantized(model.get_submodule(name), choice, "meta"))


def put_dequantized(model: nn.Module) -> None:
    """Put float layers in the place of a model's quantized ones."""
    for name, layer in list(model.named_modules()):
        if is_quantized(layer):
            replace_module(model, name, layer.dequantized())


def read_files(paths: Sequence[Any], keys: Sequence[str]) -> dict[str, Tensor]:
    """All tensors of a checkpoint's safetensors files, mapped, not read. Raises DamagedFile.

    keys: what its index, if it has one, says that they hold.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors |= read_tensors(path, TensorFile.tensors, "copy or download it again")
    if len(paths) > 1 and (other := sorted(set(keys) ^ tensors.keys())):
        raise DamagedFile(
            f"the index beside {paths[0]} and its files disagree (on '{other[0]}'); save the model again."
        )
    return tensors


def check_keys(model: nn.Module, keys: Sequence[str]) -> None:
    """Raises DamagedFile where a checkpoint lacks tensors of the model, its layers quantized, or holds others.

    Tensors that a class of diffusers' passes over by name are no matter.
    """
    known = _names(model)
    if known == set(keys):
        return
    known |= model.state_dict().keys()
    spared = {
        key for pair in getattr(model, "all_tied_weights_keys", {}).items() if {*pair} & {*keys} for key in pair
    }
    spared.update(getattr(model, "_keys_to_ignore_on_save", None) or ())
    if missing := [key for key in known - {*keys} - spared if not (key.endswith(".like") or key == "like")]:
        raise lacking(missing)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    left = sorted(set(keys) - known)
    left = [key for key in left if not any(re.search(pattern, key) for pattern in ignored)]
    if left:
        raise DamagedFile(
            f"the checkpoint holds {len(left)} tensors that its plan does not name (first '{left[0]}'); it and its "
            "config.json are not of one model: save or download it again."
        )


def _names(model: nn.Module) -> set[str]:
    """Names of a model's parameters and buffers that it saves: those of its state dict in a third of the time."""
    return {
        f"{place}.{name}" if place else name
        for place, module in model.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and name not in module._non_persistent_buffers_set
    }


def lacking(keys: Sequence[str]) -> DamagedFile:
    """The error that says that a checkpoint lacks some of a model's tensors."""
    return DamagedFile(
        f"the checkpoint lacks {len(keys)} tensors of the model (first '{min(keys)}'); "
        "it is truncated or of another model: save or download it again."
    )


def check_layers(
    model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor], sums: dict | None, where: str, whole: bool = True
) -> None:
    """Raises DamagedFile, naming the layer, where tensors are not those of a plan, or not those that were saved.

    model: with empty quantized layers. sums: checksums, or None. whole: whether all tensors are there; if not, layers
    that are not complete are passed over.
    """
    each, least = READ_AT_LOAD
    everything = sum(tensor.nbytes for tensor in tensors.values()) <= max(least, each * len(tensors))
    own: dict[str, dict[str, Tensor]] = {name: {} for name in plan.layers}
    for key, tensor in tensors.items():
        name, _, short = key.rpartition(".")
        if name in own:
            own[name][short] = tensor
    for name, found in own.items():
        layer = model.get_submodule(name)
        lacks = {short for short, _ in layer.named_parameters(recurse=False)} - found.keys() - {"like"}
        if lacks and not whole:
            continue  # of other files; what is missing in all of them, check_keys says
        try:
            check_stored(layer, found, codes=everything, prefix=f"{name}.")
        except ValueError as error:
            raise DamagedFile(f"{where} is damaged ({reason(error)}); save or download the model again.") from None
    if sums is None:
        return
    few = None if everything else lambda name, codes: name != REST and not codes
    if wrong := changed(sums, plan, tensors, few):
        raise DamagedFile(
            f"{where} and its config.json are not as they were saved: the checksums of {told(wrong)} differ; "
            "copy or download them again."
        )
