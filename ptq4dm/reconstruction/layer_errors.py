"""How far quantized layers are from the float ones: signal over noise, of their outputs or of their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from ..calibration.record import answers
from ..calibration.store import CalibrationStore
from ..errors import UserError
from ..hooks import hooked
from ..pipelines.denoiser import evaluation_mode

AT_ONCE = 1 << 20  # values whose squares are summed at a time
ERROR_SAMPLES, ERROR_BATCH = 32, 16  # tuples on which layer errors are measured, so many at a time


class Ratio:
    """Streaming signal-to-quantization-noise ratio."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    @classmethod
    def between(cls, exact: Tensor, approximate: Tensor) -> Ratio:
        ratio = cls()
        ratio.update(exact, approximate)
        return ratio

    def update(self, exact: Tensor, approximate: Tensor) -> None:
        pairs: Iterable[tuple[Tensor, Tensor]] = ((exact, approximate),)
        if exact.ndim and exact.numel() > AT_ONCE:  # float64 of a large weight is several times the weight
            rows = max(1, AT_ONCE * len(exact) // exact.numel())
            pairs = zip(exact.split(rows), approximate.split(rows), strict=True)
        for part, other in pairs:
            whole = part.detach().double()
            self.signal += float(whole.square().sum())
            self.noise += float((whole - other.detach().double()).square().sum())

    @property
    def decibel(self) -> float:
        """10 log10(signal / noise); infinity where there is no noise; NaN where either is no finite number."""
        if not (math.isfinite(self.signal) and math.isfinite(self.noise)):
            return math.nan
        if not self.noise:
            return math.inf
        return 10 * (math.log10(max(self.signal, 1e-300)) - math.log10(self.noise))


def output_errors(model: nn.Module, layers: dict[str, nn.Module], store: CalibrationStore) -> dict[str, Ratio]:
    """Each quantized layer beside its original, fed the original's inputs, on tuples from every bin."""
    errors = {name: Ratio() for name in layers}

    def compare(name: str) -> Callable:
        return lambda _, args, kwargs, output: errors[name].update(output, layers[name](*args, **kwargs))

    calls = store.recorded()
    calls = calls[slice(None, None, max(1, len(calls) // ERROR_SAMPLES))]  # of all times
    with evaluation_mode(model), hooked(model, after={name: compare(name) for name in layers}):
        for batch in calls.batches(ERROR_BATCH):
            answers(model, batch)
    for name, error in errors.items():
        if not math.isfinite(error.signal):
            raise UserError(
                f"layer '{name}' gives NaN or infinity in full precision on the calibration data, so nothing can be "
                "said of its error; collect again, from a model that gives finite numbers."
            )
    return errors


def weight_errors(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, Ratio]:
    """Each quantized layer's weight beside the original's."""
    return {
        name: Ratio.between(model.get_submodule(name).weight, layer.dequantized_weight())
        for name, layer in layers.items()
    }
