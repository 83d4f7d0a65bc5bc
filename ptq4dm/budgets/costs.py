"""Times of every layer in every format on this device, from a cache of measurements or measured now.

Measurements lie in one JSON file for each device, number of threads, and versions of torch and of this package, by
what they are of: {"layers": {"kind | format": [median, quartile, quartile, count]}, "steps": {...}}, in microseconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibration.calls import Call
from ..files.atomic import replacing
from ..files.outside import checked_object, outside, read_json
from ..files.places import make_parent
from ..kernels.runtime.settings import slug
from ..version import __version__
from .clocks import Clock, Figure, between, dealt, entry, kinds_of, pooled, time_in_place
from .graphs import Formats, time_in_graphs
from .table import KEEP

WAY = 2  # how figures are made: files of another way are not read


@dataclass
class Costs:
    """Figures by label of a format: of a layer in a step, and of the whole step with that format in all layers.

    where: the device. fresh: whether they were measured now.
    """

    layers: dict[str, dict[str, Figure]]
    steps: dict[str, Figure]
    where: str
    fresh: bool

    @property
    def outside(self) -> float:
        """Microseconds of a step that are none of its layers': the whole in full precision minus their sum."""
        return self.steps[KEEP].median - sum(figure.median for figure in self.layers[KEEP].values())


@dataclass
class Measurements:
    """What a file of measurements holds."""

    layers: dict[str, Figure] = field(default_factory=dict)
    steps: dict[str, Figure] = field(default_factory=dict)


def costs(
    model: nn.Module,
    call: Call,
    formats: Formats,
    rounds: int,
    folder: str | os.PathLike | None = None,
    clock: Clock = time.perf_counter,
) -> Costs:
    """Times of a model's layers in each format, of one call of the model.

    call: on the model's device. formats: label -> layers in the place of the model's; KEEP has none.
    rounds: that are timed. folder: where measurements are kept, the user's cache if None, nowhere if "".
    """
    device = next(model.parameters()).device
    names = list(dict.fromkeys(name for layers in formats.values() for name in layers))
    kinds = kinds_of(model, names, call)
    if device.type == "cuda":  # what is measured there is of a place in a model
        place = step_name(model, kinds, dict.fromkeys(kinds, KEEP))
        kinds = {name: f"{kind} in {place}" for name, kind in kinds.items()}
    words = {label: {name: words_of(layers.get(name)) for name in kinds} for label, layers in formats.items()}
    path = None if folder == "" else file_of(device, folder)
    known = load(path) if path is not None and path.is_file() else Measurements()
    wanted = {entry(kinds[name], words[label][name]) for label in formats for name in kinds}
    steps = {label: step_name(model, kinds, words[label]) for label in formats}
    fresh = not (wanted <= set(known.layers) and set(steps.values()) <= set(known.steps))
    if fresh:  # all of them: figures of one table are of one sitting
        if path is not None:
            make_parent(path)
        if device.type == "cuda":
            found, whole = time_in_graphs(model, call, formats, kinds, words, rounds)
        else:
            found, whole = _on_cpu(model, call, formats, kinds, words, rounds, clock)
        known.layers |= found
        known.steps |= {steps[label]: figure for label, figure in whole.items()}
        if path is not None:
            save(known, path, device)
    of = {label: {n: known.layers[entry(kinds[n], words[label][n])] for n in kinds} for label in formats}
    return Costs(of, {label: known.steps[steps[label]] for label in formats}, device_words(device), fresh)


def _on_cpu(
    model: nn.Module,
    call: Call,
    formats: Formats,
    kinds: Mapping[str, str],
    words: Mapping[str, Mapping[str, str]],
    rounds: int,
    clock: Clock,
) -> tuple[dict[str, Figure], dict[str, Figure]]:
    """("kind | format" -> figure, label -> figure of the step), by a clock, in uniform models and in mixtures."""
    mixtures = dealt(list(formats), list(kinds))
    mixed = {
        mix: {name: formats[label][name] for name, label in given.items() if name in formats[label]}
        for mix, given in mixtures.items()
    }
    said = {mix: {name: words[label][name] for name, label in given.items()} for mix, given in mixtures.items()}
    times = time_in_place(model, call, {**formats, **mixed}, list(kinds), rounds, clock)
    whole = {label: Figure.of(times.steps[label]) for label in formats}
    return between(pooled(times, kinds, words), pooled(times, kinds, said)), whole


def words_of(layer: Any) -> str:
    """A quantized layer's format and kernels in words: what decides about its time, but for its shape."""
    if layer is None:
        return KEEP
    plan = layer.plan
    wide = f", {len(plan.wide)} wide rows" if hasattr(plan, "wide") else ""
    return f"{plan.format} {plan}{wide} on {layer.kernels_text()}"


def step_name(model: nn.Module, kinds: Mapping[str, str], words: Mapping[str, str]) -> str:
    """The name of the measurement of a whole step: the model's class and a digest of its layers and their formats."""
    text = json.dumps([[name, kinds[name], words[name]] for name in kinds])
    return f"{type(model).__name__} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


# ------------------------------------------------------------------------------------------------------ the file


def device_words(device: torch.device) -> str:
    """The device, and on a CPU how many threads compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu()}, {torch.get_num_threads()} threads"


def _cpu() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def file_of(device: torch.device, folder: str | os.PathLike | None = None) -> Path:
    """The file of this device's measurements, in `folder` or the user's cache."""
    cache = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "ptq4dm" / "costs"
    name = f"{slug(device_words(device))}-torch-{torch.__version__}-ptq4dm-{__version__}-{WAY}.json"
    return Path(cache if folder is None else folder) / name


def load(path: Path) -> Measurements:
    """Read what `save` wrote. Raises DamagedFile where it is no file of measurements."""
    advice = "remove it: it is measured again"
    data = read_json(path, advice)
    with outside(path, advice):
        checked_object(data, {"layers": dict, "steps": dict})
        return Measurements(_figures(data["layers"]), _figures(data["steps"]))


def _figures(data: dict) -> dict[str, Figure]:
    found = {}
    for name, numbers in data.items():
        if not (isinstance(numbers, list) and len(numbers) == 4 and all(_number(n) for n in numbers)):
            raise ValueError(f"'{name}' is no measurement")
        found[name] = Figure(float(numbers[0]), float(numbers[1]), float(numbers[2]), int(numbers[3]))
    return found


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


def save(known: Measurements, path: Path, device: torch.device) -> None:
    """Write measurements into a file. Raises UserError where that fails."""
    rows: Callable[[dict[str, Figure]], dict] = lambda some: {name: list(astuple(one)) for name, one in some.items()}  # noqa: E731
    facts = {"device": device_words(device), "torch": torch.__version__, "ptq4dm": __version__}
    text = json.dumps({**facts, "layers": rows(known.layers), "steps": rows(known.steps)}, indent=1)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
