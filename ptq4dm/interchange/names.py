"""From the names of a file to those of a model of diffusers, by diffusers' own converters.

A converter renames tensors, and splits and joins their rows: q, k and v of one product, scale and shift in another
order. It never sees a quantized weight: it is given the numbers of its rows, [N, 1], and what becomes of these is
done with codes and scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import diffusers
import torch
from diffusers.loaders import single_file_model
from torch import Tensor, nn

from ..errors import UserError
from ..files.outside import reason
from .rows import PREFIXES, Found, Rows


def in_names_of(model: nn.Module, found: Found) -> Found:
    """The same by the names of a model: those of the file, or what diffusers' converter for the model's class makes.

    Of a file that holds more than a denoiser (an autoencoder, say) the rest is left out. Raises UserError where the
    file's names are neither; where most are the model's, or a converter has left one out, naming what is too much.
    """
    found = _without_prefix(found)
    known = {*model.state_dict(), *(name for name, _ in model.named_buffers())}
    given = found.weights.keys() | found.tensors.keys()
    if given <= known:
        return found
    numbers, sources = number_rows({name: rows.outputs for name, rows in found.weights.items()})
    try:
        converted = convert(model, {**numbers, **found.tensors}, found.where)
        _check_all_taken(model, converted, sources, found)
    except UserError:
        if 2 * len(given & known) > len(given):
            raise _strangers(model, given, known, found.where) from None
        raise
    weights = {}
    for name, value in converted.items():
        if is_numbers(value):
            weights[name] = _picked(found, sources, value, name)
    return Found(found.where, weights, {name: one for name, one in converted.items() if name not in weights})


def _strangers(model: nn.Module, given: Set[str], known: Set[str], where: str) -> UserError:
    """What to say of a file in the names of a model, but for some."""
    strange, missing = sorted(given - known), sorted({*model.state_dict()} - given)
    more = f" ({len(strange)} such tensors)" if len(strange) > 1 else ""
    lacks = f", and lacks '{missing[0]}'" if missing else ""
    return UserError(f"{where} has '{strange[0]}', which the {type(model).__name__} has not{more}{lacks}.")


def _check_all_taken(
    model: nn.Module, converted: dict[str, Tensor], sources: list[tuple[str, int]], found: Found
) -> None:
    """Raises UserError, naming the weight, where a converter has left out rows of a quantized one."""
    parts = [one[:, 0] for one in converted.values() if is_numbers(one)]
    taken = torch.cat(parts).unique() if parts else torch.empty(0, dtype=torch.int64)
    for name, first in sources:
        rows = found.weights[name].outputs
        if int(((taken >= first) & (taken < first + rows)).sum()) < rows:
            raise UserError(
                f"{found.where} has '{name}', which the {type(model).__name__} has not, or not all of it."
            )


def number_rows(outputs: dict[str, int]) -> tuple[dict[str, Tensor], list[tuple[str, int]]]:
    """(name -> numbers [N, 1] of its rows, no number twice; (name, its first number) in their order)."""
    numbers, sources, first = {}, [], 0
    for name, count in outputs.items():
        numbers[name] = torch.arange(first, first + count)[:, None]
        sources.append((name, first))
        first += count
    return numbers, sources


def is_numbers(value: Any) -> bool:
    """Whether a converter's result is numbers of rows."""
    return isinstance(value, Tensor) and value.dtype == torch.int64 and value.ndim == 2 and value.shape[1] == 1


def runs_of(sources: list[tuple[str, int]], numbers: Tensor) -> list[tuple[str, Tensor]]:
    """Numbers of rows [n, 1] -> (name, rows of it [m]) one after the other."""
    starts = torch.tensor([first for _, first in sources])
    which = torch.searchsorted(starts, numbers[:, 0], right=True) - 1
    found, place = [], 0
    for index, count in zip(
        *(one.tolist() for one in torch.unique_consecutive(which, return_counts=True)), strict=True
    ):
        name, first = sources[index]
        found.append((name, numbers[place : place + count, 0] - first))
        place += count
    return found


def convert(model: nn.Module, checkpoint: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """A checkpoint in the names of a model of diffusers. Raises UserError where it cannot be converted."""
    kinds, first = single_file_model.SINGLE_FILE_LOADABLE_CLASSES, next(iter(checkpoint))
    name = next((one for one in kinds if isinstance(model, getattr(diffusers, one))), None)
    if name is None:
        raise UserError(
            f"{where} has other names than {type(model).__name__}, for which diffusers has no converter (the first "
            f"is '{first}'): give a file in the names of diffusers."
        )
    why = ""
    for prefix in ("", PREFIXES[0]):  # that of UNets wants one, others do without
        given = {prefix + key: one for key, one in checkpoint.items()}
        try:
            made = kinds[name]["checkpoint_mapping_fn"](checkpoint=given, config=dict(model.config))
        except Exception as error:  # converters fail in every way on names that are not those they know
            why = why or reason(error)
            continue
        if made:
            return made
    raise UserError(
        f"the names in {where} ('{first}' ...) are not those of a {name}, in diffusers or in its original ({why})."
    )


def _without_prefix(found: Found) -> Found:
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in found.weights.keys() | found.tensors.keys()):
            weights, tensors = (
                {name.removeprefix(prefix): one for name, one in part.items() if name.startswith(prefix)}
                for part in (found.weights, found.tensors)
            )
            return Found(found.where, weights, tensors)
    return found


def _picked(found: Found, sources: list[tuple[str, int]], numbers: Tensor, name: str) -> Rows:
    try:
        return Rows.joined([found.weights[source].pick(rows) for source, rows in runs_of(sources, numbers)])
    except ValueError as error:
        raise UserError(f"'{name}' of {found.where} cannot be loaded: {error}.") from None


def in_names_of_file(
    model: nn.Module, state: Mapping[str, Tensor], outputs: dict[str, int], where: str
) -> dict[str, list[tuple[str, Tensor]]]:
    """How tensors of a file are made of those of a model: the inverse of `in_names_of`.

    state: the model's, as it would be in full precision. outputs: names in the file -> rows of each. Returns name in
    the file -> (name in the model, rows of it [m]) one after the other. Raises UserError where a tensor of the model
    is in none, or one of the file is not made whole.
    """
    numbers, sources = number_rows(outputs)
    converted = numbers if outputs.keys() <= state.keys() else convert(model, numbers, where)
    names = list(state)
    owner = torch.full((sum(outputs.values()),), -1)
    row = torch.zeros_like(owner)
    for index, name in enumerate(names):
        found = converted.get(name)
        if found is None or not is_numbers(found) or len(found) != (len(state[name]) if state[name].ndim else 1):
            raise UserError(
                f"'{name}' of the model has no tensor of as many rows in {where}: it is of another model."
            )
        owner[found[:, 0]], row[found[:, 0]] = index, torch.arange(len(found))
    made = {}
    for name, first in sources:
        own, rows = owner[first : first + outputs[name]], row[first : first + outputs[name]]
        if bool((own >= 0).any()):
            made[name] = _runs(own, rows, names, f"'{name}' of {where}")
    return made


def _runs(own: Tensor, rows: Tensor, names: list[str], what: str) -> list[tuple[str, Tensor]]:
    if bool((own < 0).any()):
        raise UserError(f"{what} has rows that the model has not: it is of another model.")
    which, counts = torch.unique_consecutive(own, return_counts=True)
    parts = rows.split(counts.tolist())
    return [(names[index], part) for index, part in zip(which.tolist(), parts, strict=True)]
