"""A pipeline's folder, looked at before diffusers opens it: nothing in it may run code or lead out of it.

model_index.json names components, each a library and a class; a component's folder holds config.json and weights, of
which an index may name several files. What is checked: that these files are whole, that names stay in the folder,
that classes are of libraries that pipelines use or modules that the caller imported, that there are safetensors.
"""

from __future__ import annotations

import inspect
import math
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import diffusers
from diffusers import pipelines

from ..annotations import MOST, annotations_of
from ..errors import DamagedFile
from ..files.outside import described, outside, read_object, read_tensors
from ..files.places import INDEX

LIBRARIES = ("diffusers", "transformers", __name__.partition(".")[0])
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
ADVICE = "copy or download it again"


def check_folder(folder: Path, call: Mapping[str, Any]) -> None:
    """Raises DamagedFile, naming the file, where a pipeline's folder is damaged or would lead out of itself.

    call: what `from_pretrained` is going to be called with beside the folder. Components among it are not loaded, and
    who passes trust_remote_code or custom_pipeline wants code to run.
    """
    trusted = bool(call.get("trust_remote_code") or call.get("custom_pipeline"))
    index = read_object(folder / INDEX, {"_class_name": (str, list) if trusted else str}, ADVICE)
    with outside(folder / INDEX, ADVICE):
        _check_numbers(index)
        for name, value in index.items():
            if _is_component(name, value) and name not in call:
                if not is_file_name(name):
                    raise ValueError(f"'{name[:60]}' leads out of the folder")
                if not trusted:
                    _check_class(folder / name, *value)
                if (folder / name).is_dir():
                    _check_files(folder / name, call)
    for path in sorted(folder.rglob("*.index*.json")):
        _check_index(path, call.get("variant"))
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            names = read_tensors(path, lambda file: file.names)
        except DamagedFile as error:
            raise DamagedFile(f"{path} is not a whole safetensors file; {ADVICE}.") from error
        if any(name.endswith(".qweight") for name in names):
            _check_says_quantized(path)


def absent_parts(folder: Path) -> dict[str, None]:
    """Parts of a pipeline that its folder was saved without, such as text encoders: name -> None. diffusers has to be
    told of those that its class cannot do without."""
    index = read_object(folder / "model_index.json", {})
    return {name: None for name, value in index.items() if value == [None, None]}


def _check_says_quantized(path: Path) -> None:
    """Raises DamagedFile where codes lie beside a configuration that does not say what they are: diffusers would
    leave the layers as a new model has them."""
    config = path.parent / "config.json"
    if config.is_file() and not read_object(config, {}, ADVICE).get("quantization_config"):
        raise DamagedFile(f"{path} holds codes of quantized layers, and {config} no quantization_config; {ADVICE}.")


def _is_component(name: str, value: Any) -> bool:
    """Whether an entry of model_index.json is a component that is there: its library and its class."""
    pair = isinstance(value, list) and len(value) == 2 and all(isinstance(one, str) for one in value)
    return pair and not name.startswith("_")


def _check_class(place: Path, library: str, kind: str) -> None:
    """Raises ValueError where a component's class is of code that has not been imported."""
    if (place / f"{library}.py").exists() or not _is_known(library):
        raise ValueError(
            f"'{place.name}' is of {described(library)}, no library that pipelines use, and code from a folder is "
            "not run: import it first if it is yours"
        )
    if not kind.isidentifier():
        raise ValueError(f"'{place.name}' is of no class but {described(kind)}")


def _check_files(place: Path, call: Mapping[str, Any]) -> None:
    """Raises DamagedFile where a component's configuration is damaged or names code, or its weights are pickled."""
    files = sorted(path.name for path in place.iterdir())
    for name in {"config.json", "scheduler_config.json"} & set(files):
        config = read_object(place / name, {}, ADVICE)
        with outside(place / name, ADVICE):
            _check_numbers(config)
            _check_texts(config)
            if name == "scheduler_config.json":
                _check_betas(config)
            if config.get("auto_map") and not call.get("trust_remote_code") and any(f.endswith(".py") for f in files):
                raise ValueError("its 'auto_map' names code beside it, which is not run from a folder")
    pickled = [name for name in files if name.endswith(PICKLED) and "model" in name]
    other = any(name.endswith((".safetensors", ".gguf", ".onnx", ".msgpack")) for name in files)
    if pickled and not other and call.get("use_safetensors", True):
        raise DamagedFile(
            f"{place} holds its weights pickled ({pickled[0]}), which can run code and is never loaded; get the "
            "model as safetensors."
        )


def _check_betas(config: dict) -> None:
    """Raises ValueError where noise is added in shares that are none: every sample would be NaN."""
    if config.get("beta_schedule") in ("linear", "scaled_linear") and config.get("trained_betas") is None:
        for name in ("beta_start", "beta_end"):
            if name in config and not (isinstance(config[name], (int, float)) and 0 < config[name] < 1):
                raise ValueError(f"its '{name}' is {described(config[name])}, and lies between 0 and 1")


def _check_texts(config: dict) -> None:
    """Raises ValueError where a network or a scheduler of diffusers' is given a text for a number, or the reverse.

    It would take the value, and count otherwise or fail as it samples. Numbers and truth stand for each other there.
    """
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, (diffusers.SchedulerMixin, diffusers.ModelMixin))):
        return
    for name, annotation in annotations_of(inspect.unwrap(vars(kind)["__init__"])).items():
        value, texts = config.get(name), _texts(annotation)
        if value is not None and texts != {True, False} and texts != {isinstance(value, str)}:
            raise ValueError(f"its '{name}' is {described(value)}")


def _texts(annotation: Any) -> set[bool]:
    """Whether what an annotation allows beside None are texts: True, False, or both."""
    if annotation is Any:
        return {True, False}
    if parts := get_args(annotation):
        if not isinstance(annotation, types.UnionType) and get_origin(annotation) is not Union:
            return {isinstance(part, str) for part in parts} if get_origin(annotation) is Literal else {False}
        return {one for part in parts if part is not type(None) for one in _texts(part)}
    return {annotation is str}


def _is_known(library: str) -> bool:
    """Whether a component may be of a library: diffusers', transformers', ours, or one that is imported already."""
    top = library.partition(".")[0]
    return top in LIBRARIES or hasattr(pipelines, library) or library in sys.modules


def is_file_name(name: Any) -> bool:
    """Whether a name from outside is that of a file in its folder: no path, no link upwards."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0:")


def _check_index(path: Path, variant: str | None) -> None:
    """Raises DamagedFile where an index of weights leads out of its folder or, where it is the one that is going to
    be used, names files or tensors that are not there."""
    index = read_object(path, {"weight_map": dict}, ADVICE)
    with outside(path, ADVICE):
        held: dict[str, list[str]] = {}
        for tensor, file in index["weight_map"].items():
            if not is_file_name(file):
                raise ValueError(f"its weight_map leads out of the folder: {described(file)}")
            held.setdefault(file, []).append(tensor)
        if path.name.endswith(f".safetensors.index.{variant}.json" if variant else ".safetensors.index.json"):
            for file, tensors in held.items():
                if not file.endswith(".safetensors"):
                    raise ValueError(f"its weight_map names '{file}', which is no safetensors file")
                if not (path.parent / file).is_file():
                    raise ValueError(f"'{file}' is not beside it")
                if lost := set(tensors) - set(read_tensors(path.parent / file, lambda file: file.names, ADVICE)):
                    raise ValueError(f"'{file}' lacks '{min(lost)}'")


def _check_numbers(value: Any) -> None:
    """Raises ValueError for NaN, which no configuration has (infinity some do), and for whole numbers that no 64 bits
    hold, in which tables fail in ways of their own."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            _check_numbers(one)
    elif isinstance(value, float) and math.isnan(value):
        raise ValueError("NaN stands in it")
    elif isinstance(value, int) and abs(value) > MOST:
        raise ValueError(f"a number in it is too large: {described(value)}")
