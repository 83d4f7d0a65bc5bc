"""What a layer's rounding does to the model's prediction: without gradients, and without quantized runs of the model.

    masked    s_l = mean over draws of |eps_m - eps|^2 / |eps|^2, with a drawn share of the layer's weights at zero
              Omega_lf = s_l * (error of format f) / (error of the mask)
    direct    Omega_lf = |eps_q - eps|^2 / |eps|^2, with layer l alone in format f

"On-Chip Hardware-Aware Quantization" (arXiv:2309.01945) masks a layer's weights and measures the change of what the
model gives by a KL divergence; for the Gaussian steps of a sampler that is a squared error. Which share, how many
draws and how formats enter are not known: they are our assumption. One masked run of a layer serves all formats.

The error of a format beside that of the mask, by `scale`:

    weights   (|W - Q|^2 + |W|^2 r_f) / |W_m|^2     W_m: the weights that were zeroed; r_f = |y_q - y_Q|^2 / |y_Q|^2,
              what rounding its inputs does to the layer's output y_Q = Q x: as an error of the weights of that size
    outputs   |y_q - y|^2 / |y_m - y|^2             of the layer's own output: Hessian rounding and inputs count as
              they are, and no run of the model is needed
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..calibration.calls import Calls
from ..calibration.evidence import BATCH, chosen_calls, squared_error, substituted
from ..calibration.record import answers, samples_of
from ..hooks import computing, hooked, input_of
from ..pipelines.denoiser import evaluation_mode
from ..pipelines.loading import not_while_loading
from ..progress import progress_bar

SCALES = ("weights", "outputs")

Formats = Mapping[str, Mapping[str, nn.Module]]


@dataclass
class Sensitivity:
    """errors: layer -> label -> what the format adds to the prediction's error. forwards: of the model, in tuples;
    layer_runs: runs of all layers alone, in tuples and formats."""

    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    forwards: int = 0
    layer_runs: int = 0


def parts_of(calls: Calls, num_tuples: int, draws: int) -> list[list[Calls]]:
    """`num_tuples` of the calls, evenly from all, dealt out to the draws: each has tuples of all times; in batches
    that are one call each."""
    chosen = chosen_calls(calls, num_tuples)
    dealt = [chosen[first::draws] for first in range(min(draws, len(chosen)))]
    return [list(part.batches(BATCH)) for part in dealt]


class Prediction:
    """What a model gives on calibration calls, and how far another run of it is off."""

    def __init__(self, model: nn.Module, parts: list[list[Calls]]):
        self.model, self.parts, self.forwards = model, parts, 0
        self.exact = [[self._run(batch) for batch in part] for part in parts]
        zeros = (squared_error(one, torch.zeros_like(one)) for part in self.exact for one in part)
        self.signal = sum(zeros) or 1.0

    def error(self, part: int) -> float:
        """|eps_now - eps|^2 of one part, over |eps|^2 of the part's share of all tuples."""
        share = sum(map(len, self.parts[part])) / sum(len(batch) for one in self.parts for batch in one)
        pairs = zip(self.parts[part], self.exact[part], strict=True)
        return sum(squared_error(self._run(batch), exact) for batch, exact in pairs) / (self.signal * share)

    @torch.no_grad()
    def _run(self, batch: Calls) -> Tensor:
        self.forwards += len(batch)
        with evaluation_mode(self.model), not_while_loading():
            return samples_of(answers(self.model, batch)[0], batch)


def masked(
    model: nn.Module,
    formats: Formats,
    names: list[str],
    parts: list[list[Calls]],
    share: float = 0.1,
    scale: str = SCALES[0],
    seed: int = 0,
) -> Sensitivity:
    """Sensitivities by masking, a run on each tuple for each layer.

    formats: label -> quantized layers; names: of the layers; parts: of `parts_of`, one for each draw.
    """
    prediction, found = Prediction(model, parts), Sensitivity()
    own = layer_errors(model, formats, names, [part[0] for part in parts])
    found.layer_runs = sum(len(part[0]) for part in parts) * max(len(formats), 1)
    for place, name in enumerate(progress_bar(names, desc="masking", unit="layer")):
        layer, changes = model.get_submodule(name), []
        for number in range(len(parts)):
            draw = torch.Generator("cpu").manual_seed((seed * 1_000_003 + place) * 1_009 + number)
            mask = _Masked(layer, share, draw)
            with computing(model, {name: mask}):
                error = prediction.error(number)
            size = mask.weights if scale == "weights" else mask.output_error
            changes.append(error / size if size else 0.0)
        mean = sum(changes) / len(changes)
        found.errors[name] = {label: mean * one[scale] for label, one in own[name].items()}
    found.forwards = prediction.forwards
    return found


def direct(model: nn.Module, formats: Formats, names: list[str], parts: list[list[Calls]]) -> Sensitivity:
    """Sensitivities by quantizing one layer at a time: a run on each tuple for each layer and format."""
    prediction, found = Prediction(model, parts), Sensitivity()
    for name in progress_bar(names, desc="quantizing one layer", unit="layer"):
        found.errors[name] = {}
        for label, layers in formats.items():
            if name in layers:
                with substituted(model, {name: layers[name]}):
                    errors = [prediction.error(number) for number in range(len(parts))]
                found.errors[name][label] = sum(errors) / len(errors)
    found.forwards = prediction.forwards
    return found


class _Masked:
    """Takes the place of a layer's forward pass: with a drawn share of its weights at zero.

    weights: |W_m|^2. output_error: |y_m - y|^2 / |y|^2 of all that it was called with.
    """

    def __init__(self, layer: nn.Module, share: float, draw: torch.Generator):
        weight = layer.weight.detach()
        zeroed = (torch.rand(weight.shape, generator=draw) < share).to(weight.device)
        self.forward, self.layer = layer.forward, layer
        self.weight = weight.masked_fill(zeroed, 0)
        self.weights = squared_error(weight, self.weight)
        self._wrong = self._right = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        exact = self.forward(*args, **kwargs)
        with computing(self.layer, {"": self.forward}):
            output = functional_call(self.layer, {"weight": self.weight}, args, kwargs)
        self._wrong += squared_error(output, exact)
        self._right += squared_error(exact, torch.zeros_like(exact))
        return output

    @property
    def output_error(self) -> float:
        return self._wrong / self._right if self._right else 0.0


@torch.no_grad()
def layer_errors(
    model: nn.Module, formats: Formats, names: list[str], batches: list[Calls]
) -> dict[str, dict[str, dict[str, float]]]:
    """layer -> label -> {"weights": |W - Q|^2 + |W|^2 r, "outputs": |y_q - y|^2 / |y|^2} on calls of the model.

    Layers that are not called have no error.
    """
    sums: dict[tuple[str, str], list[float]] = {}
    right: dict[str, float] = dict.fromkeys(names, 0.0)

    def after(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            if not input_of(args, kwargs).numel():
                return
            right[name] += squared_error(output, torch.zeros_like(output))
            for label, layers in formats.items():
                if name in layers:
                    given = layers[name](*args, **kwargs)
                    held = layers[name].dequantized()(*args, **kwargs)
                    errors = (
                        squared_error(given, output), squared_error(given, held),
                        squared_error(held, torch.zeros_like(held)),
                    )  # fmt: skip
                    known = sums.setdefault((name, label), [0.0, 0.0, 0.0])
                    known[:] = [a + b for a, b in zip(known, errors, strict=True)]

        return hook

    with evaluation_mode(model), hooked(model, after={name: after(name) for name in names}), not_while_loading():
        for batch in batches:
            answers(model, batch)
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in names}
    for name in names:
        weight = model.get_submodule(name).weight.detach().float()
        for label, layers in formats.items():
            if name not in layers:
                continue
            wrong, inputs, held = sums.get((name, label), (0.0, 0.0, 0.0))
            energy = squared_error(weight, torch.zeros_like(weight))
            rounded = squared_error(weight, layers[name].dequantized_weight())
            found[name][label] = {
                "weights": rounded + energy * (inputs / held if held else 0.0),
                "outputs": wrong / right[name] if right[name] else 0.0,
            }
    return found
