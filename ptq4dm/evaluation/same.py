"""Whether two pipelines are of one model, so that a comparison of them says something: layout, kind and steps."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from ..files.outside import read_object
from ..pipelines.denoiser import check_sampled, denoiser, denoiser_name
from ..pipelines.folder import INDEX
from ..pipelines.load import folder_of


def check_saved(model: str, reference: Any, name: str) -> None:
    """`check_same` of a local folder by its configurations alone, before any work; of what is no folder, nothing."""
    folder, part = folder_of(model), denoiser_name(reference)
    if not (folder / INDEX).is_file() or not (folder / part / "config.json").is_file():
        return
    _check_kind(model, read_object(folder / INDEX, {"_class_name": str})["_class_name"], reference, name)
    saved, theirs = _plain(read_object(folder / part / "config.json", {})), _layout(reference)
    _check_layout(model, {key: value for key, value in saved.items() if key in theirs}, theirs, name)


def check_same(pipe: Any, reference: Any, model: str, name: str) -> None:
    """Raises UserError where a pipeline is not of the layout of the one in full precision, or takes other steps."""
    check_sampled(pipe, model)
    _check_kind(model, type(pipe).__name__, reference, name)
    _check_layout(model, _layout(pipe), _layout(reference), name)
    ours, theirs = (getattr(one.scheduler, "fixed_steps", None) for one in (pipe, reference))
    if ours != theirs:
        told = ["any number of steps" if steps is None else f"{steps} and no other" for steps in (ours, theirs)]
        raise UserError(f"{model} takes {told[0]}, and {name} {told[1]}; they cannot be compared.")


def _check_kind(model: str, kind: str, reference: Any, name: str) -> None:
    if kind != type(reference).__name__:
        kinds = f"{model} is a {kind} and {name} a {type(reference).__name__}"
        raise UserError(f"{kinds}: different models cannot be compared.")


def _check_layout(model: str, ours: dict, theirs: dict, name: str) -> None:
    compared = theirs if ours.keys() >= theirs.keys() else ours  # a folder need not say all that has a default
    if other := sorted(key for key in compared if ours.get(key) != theirs.get(key)):
        raise UserError(
            f"{model} is another model than {name}: their configurations differ in {', '.join(other[:5])}."
        )


def _layout(pipe: Any) -> dict[str, Any]:
    """What a denoiser is built of, as JSON values, without how it was quantized and where it lay."""
    network = denoiser(pipe)
    kind = type(getattr(network, "_orig_mod", network))  # not torch.compile's wrapper
    return _plain({**network.config, "_class_name": kind.__name__})


def _plain(config: Any) -> dict[str, Any]:
    plain = {"class": config.get("_class_name")}
    plain |= {key: v for key, v in config.items() if key[0] != "_" and key != "quantization_config"}
    return {key: _as_read(value) for key, value in plain.items()}


def _as_read(value: Any) -> Any:
    """A value of a configuration as it is read from a file."""
    if isinstance(value, dict):
        return {str(key): _as_read(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_read(one) for one in value]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
