"""How far attention in 8 bits is from attention as it was, layer by layer and timestep by timestep.

    errors = ptq4dm.attention_errors(pipe, lambda: pipe("a red barn"))
    errors.over(0.05)         # layers and timesteps whose error is larger

The model computes as it was; beside each attention the 8-bit one is computed on the same queries, keys and values:

    error = |y8 - y|^2 / |y|^2         summed over what a layer computes at a timestep

An error says what a layer adds at one place; what comes of it in the picture only pictures say (`evaluate`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checks import checked
from ..errors import UserError
from ..hooks import hooked
from ..layers.attention.processors import Redirected
from ..pipelines.denoiser import denoisers_by_prefix
from ..tables import aligned
from .eight_bits import attention_in_8_bits, time_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass
class AttentionErrors:
    """Errors by layer and timestep: `squares[layer][timestep]` is [sum of squared differences, of squares]."""

    kind: str
    squares: dict[str, dict[float, list[float]]] = field(default_factory=lambda: defaultdict(dict))

    def error(self, layer: str | None = None, timestep: float | None = None) -> float:
        """Relative error, root of the sums, of one layer or all, at one timestep or all."""
        found = [
            pair
            for name, times in self.squares.items()
            for time, pair in times.items()
            if layer in (None, name) and timestep in (None, time)
        ]
        off, whole = (sum(pair[i] for pair in found) for i in (0, 1))
        return (off / whole) ** 0.5 if whole else 0.0

    @property
    def timesteps(self) -> list[float]:
        """Those that were seen, the largest first."""
        return sorted({time for times in self.squares.values() for time in times}, reverse=True)

    def over(self, bound: float) -> list[tuple[str, float, float]]:
        """(layer, timestep, error) above `bound`, the largest first: where 16 bits may be worth their time."""
        rows = [(name, time, self.error(name, time)) for name, times in self.squares.items() for time in times]
        return sorted((row for row in rows if row[2] > bound), key=lambda row: -row[2])

    def __str__(self) -> str:
        """A row for each layer, a column for each timestep, in percent."""
        times = self.timesteps
        rows = [["timestep", *(f"{time:.5g}" for time in times), "    all"]]
        for name in [*self.squares, None]:
            rows.append([name or "all layers", *(f"{100 * self.error(name, t):6.2f}%" for t in [*times, None])])
        return "\n".join(aligned(rows, right=range(1, len(times) + 1)))


@torch.no_grad()
@checked
def attention_errors(
    target: DiffusionPipeline | nn.Module, call: Callable[[], Any], kind: str = "int8"
) -> AttentionErrors:
    """Errors of attention in 8 bits while `call()` runs the pipeline or model, whose pictures stay as they are.

    kind: of queries and keys, "int8" or "e4m3".

    Raises UserError as attention_in_8_bits does, and where `call` reaches no attention of the model.
    """
    errors, now = AttentionErrors(kind), [0.0]
    with attention_in_8_bits(target, kind) as state, ExitStack() as stack:
        for model in denoisers_by_prefix(target, "what is measured").values():
            stack.enter_context(hooked(model, before={"": _clock(now, time_of(model))}))
        state.redirected = lambda name: _Compared(errors, now, state, name)
        call()
    if not errors.squares:
        raise UserError("attention_errors: the call reached no attention that can be in 8 bits.")
    return errors


def _clock(now: list[float], time: Callable[..., float | None]) -> Callable[..., None]:
    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        now[0] = time(args, kwargs) or 0.0

    return before


class _Compared(Redirected):
    """Attention as it was, and beside it in 8 bits."""

    def __init__(self, errors: AttentionErrors, now: list[float], state: Any, name: str) -> None:
        super().__init__(state, name)
        self.errors, self.now = errors, now

    def _attend(self, function: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = function(query, key, value, *args, **kwargs)
        off = super()._attend(function, query, key, value, *args, **kwargs).double() - y.double()
        pair = self.errors.squares[self.name].setdefault(self.now[0], [0.0, 0.0])
        pair[0] += float(off.square().sum())
        pair[1] += float(y.double().square().sum())
        return y
