"""A network's forward through OpenVINO: converted at its first call, and again for calls of another form.

OpenVINO's kernels are faster for sizes that they know: so a conversion is compiled for each batch that comes. What
comes of it is compared with what the network itself gives for that call before it serves others.

As with graphs of a GPU (graphs.py) the network runs as it is written while hooks wait for calls of its layers, with
gradients, and in training; and where it is not what it was (`Watch`) it is converted anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...errors import DamagedFile, UserError
from ...progress import note
from ..blocks import plain_forward
from ..engines import ENGINES, Engine
from ..graphs import KEPT, Graphed
from ..watch import Unwatched, Watch, hooked
from .call_form import batch_of, form_of_call, tensors_in
from .compiled import Compiled, has_bfloat16, installed, product_lines
from .processor import check_sums
from .saved import count_saved, place_of, read, write
from .tracing import Layers, converted, served_layers

FAR = 1e-2  # of |e|^2: what a converted model may differ by; rounding what lies between layers makes 1e-4 of it


@dataclass
class Served:
    """One form and batch. difference: |e_o - e|^2 / |e|^2 to the network's own outputs e, at the first call."""

    compiled: Compiled
    outputs: Any
    difference: float
    replays: int = 0


class ThroughOpenVINO(Graphed):
    """It takes the place of `forward` in a network's attributes."""

    computes_whole = True

    def __init__(self, model: nn.Module, precision: str, folder: Path | None = None, kept: int = KEPT) -> None:
        """precision: "float32" or "bfloat16", of what is not quantized. folder: where conversions are saved.
        kept: so many forms and batches are kept. Raises UserError for a model with layers that OpenVINO cannot serve,
        or not on this processor.
        """
        super().__init__(model, None, kept)  # type: ignore[arg-type]  # nothing is captured
        self.precision, self.folder = precision, folder
        self.layers = _checked_layers(model)
        self.conversions: dict[Any, Any] = {}
        self.converted = self.loaded = self.damaged = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            untouched = self.watch is not None and self.watch.untouched()
            if why := self._why_plain() or ("" if untouched else hooked(self.model)):
                return self._as_it_is(why, args, kwargs)
            leaves, structure = pytree.tree_flatten((args, kwargs))
            leaves = self._times_as_tensors(leaves, structure)
            form = form_of_call(leaves, structure)
            if isinstance(form, str):
                return self._as_it_is(form, args, kwargs)
            if self.watch is not None and not (untouched or self.watch.unchanged()):
                self._model_changed()
                self.layers = _checked_layers(self.model)
            key = form, batch_of(tensors_in(leaves))
            found: Any = self.graphs.get(key)
            if found is None:
                found = self._made(key, leaves, structure)
            self.graphs.move_to_end(key)
            found.replays += 1
            self.replays += 1
            return pytree.tree_unflatten(found.compiled(tensors_in(leaves)), found.outputs)

    def clear(self) -> None:
        with self.lock:
            self.dropped += len(self.graphs)
            for kept in (self.graphs, self.seen, self.refused, self.conversions):
                kept.clear()
            self.watch = None

    def _made(self, key: Any, leaves: list, structure: Any) -> Served:
        while len(self.graphs) >= self.kept:
            self.graphs.popitem(last=False)
            self.dropped += 1
        form, _ = key
        shape: list[Any] = []

        def call(given: list[Tensor]) -> tuple[Tensor, ...]:
            rest = iter(given)
            mixed = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(mixed, structure)
            outputs, shape[:] = _outputs(plain_forward(self.model)(*args, **kwargs))
            return tuple(outputs)

        with torch.inference_mode(False), torch.no_grad():  # in this order: the first would bring gradients back
            tensors = [tensor.detach().clone() for tensor in tensors_in(leaves)]
            expected = call(tensors)
            self._look()
            old = form in self.conversions
            made = self.conversions[form] if old else self._conversion(form, call, tensors)
            compiled, difference = self._compared(made, tensors, expected)
            if difference > FAR and old:  # the network does something else for another batch
                made = self._convert(call, tensors)
                compiled, difference = self._compared(made, tensors, expected)
        if not difference <= FAR:
            raise UserError(
                f"what OpenVINO made of {type(self.model).__name__} gives something else than the model itself "
                f"(|difference|^2 is {difference:.1e} of |output|^2); run it by its own kernels."
            )
        self.conversions[form] = made
        self.captures += 1
        one = Served(compiled, shape[0], difference)
        self.graphs[key] = one  # type: ignore[assignment]
        return one

    def _look(self) -> None:
        """Watch the model as it is after a call of its own: what it keeps from its first call is there now."""
        try:
            self.watch = self.watch or Watch(self.model, left=["forward"])
        except Unwatched as error:
            raise UserError(f"OpenVINO cannot serve {type(self.model).__name__}: {error}.") from None

    def _conversion(self, form: Any, call: Callable, tensors: list[Tensor]) -> Any:
        if self.folder is None:
            return self._convert(call, tensors)
        place = place_of(self.folder, self.model, form)
        try:
            made = read(place)
        except DamagedFile as error:
            note(f"{error} The conversion is made anew.")
            made = None
            self.damaged += 1
        if made is not None:
            self.loaded += 1
            return made
        made = self._convert(call, tensors)
        write(made, place)
        return made

    def _convert(self, call: Callable, tensors: list[Tensor]) -> Any:
        self.converted += 1
        try:
            return converted(self.model, self.layers, call, tensors)
        except RuntimeError as error:
            raise UserError(f"OpenVINO cannot convert {type(self.model).__name__}: {_first(error)}.") from error

    def _compared(self, made: Any, tensors: list[Tensor], expected: tuple) -> tuple[Compiled, float]:
        try:
            compiled = Compiled(made, self.precision, tensors)
            given = compiled(tensors)
        except RuntimeError as error:
            raise UserError(f"OpenVINO cannot compile {type(self.model).__name__}: {_first(error)}.") from error
        return compiled, _difference(given, expected)

    def products(self) -> dict[str, tuple[str, str]]:
        """Name of each quantized layer -> (what its product runs in, as "u8" or "bf16", OpenVINO's kernel); {} before
        the first call."""
        last: Any = next(reversed(self.graphs.values()), None)
        return {} if last is None else last.compiled.products(self.layers)

    def lines(self) -> list[str]:
        """What is said of it."""
        lines = [f"served by OpenVINO {installed()}, what is not quantized in {self.precision}"]
        served: Any = list(self.graphs.values())
        if served and self.layers:
            lines += product_lines(self.layers, served[-1].compiled)
        if served:
            most = max(one.difference for one in served)
            damaged = f", {self.damaged} damaged and made anew" if self.damaged else ""
            lines.append(
                f"{self.converted} conversions, {self.loaded} loaded{damaged}, compiled for {len(served)} shapes, "
                f"{self.replays} calls; the first differed from the model's own by {most:.1e} of |e|^2"
            )
        else:
            lines.append("converted at its first call")
        return [*lines, *(f"{count} calls as they are: {why}" for why, count in self.plain.items())]


def _first(error: Exception) -> str:
    """The first words of another library's message."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _checked_layers(model: nn.Module) -> Layers:
    layers = served_layers(model)
    check_sums(layers)
    return layers


def _outputs(result: Any) -> tuple[list[Tensor], list[Any]]:
    """(tensors, [structure]) of what a network gave."""
    leaves, structure = pytree.tree_flatten(result)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise UserError("OpenVINO serves networks that give tensors, and this one gives something else, too.")
    return leaves, [structure]


def _difference(given: list[Tensor], expected: tuple[Tensor, ...]) -> float:
    """The largest |a - b|^2 / |b|^2 of the outputs; infinity where one has another shape."""
    if [one.shape for one in given] != [one.shape for one in expected]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(given, expected, strict=True)]
    return max(float((a - b).square().sum() / b.square().sum().clamp_min(1e-30)) for a, b in pairs)


def _through(model: nn.Module, precision: str | None, folder: Path | None, kept: int) -> ThroughOpenVINO:
    return ThroughOpenVINO(model, precision or ("bfloat16" if has_bfloat16() else "float32"), folder, kept)


ENGINES.add("openvino", Engine("openvino", _through, count_saved))
