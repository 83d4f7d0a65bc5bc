"""The streams of diffusers' feed-forward layers: hidden units between two Linears, each with its own activation.

f(W_1 x) is alike in every hidden unit; gated layers have two rows for each, and are linear in the first:

    GEGLU, SwiGLU      h = a * f(g)      [a; g] = W_1 x
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .attention import class_of
from .streams import COLUMNS, ROWS, End, Stream, whole

# diffusers' activation -> rows of a unit
ACTIVATIONS = {
    "activations.GELU": 1,
    "activations.ApproximateGELU": 1,
    "activations.LinearActivation": 1,
    "activations.GEGLU": 2,
    "activations.SwiGLU": 2,
}


def hidden_streams(model: nn.Module) -> list[Stream]:
    """From all rows of a hidden unit to its column; only the order of the units is free."""
    return whole(model, [stream for stream, _ in _hidden(model)])


def gated_streams(model: nn.Module) -> list[Stream]:
    """From the rows that a gate multiplies to the columns that read them: linear in each unit."""
    return whole(
        model, [Stream(s.writers[:1], s.readers, s.size) for s, rows_of_unit in _hidden(model) if rows_of_unit == 2]
    )


def _hidden(model: nn.Module) -> Iterator[tuple[Stream, int]]:
    """(stream, rows of a unit) of every feed-forward layer that is known."""
    for name, module in model.named_modules():
        if class_of(module) == "attention.FeedForward":
            rows = ACTIVATIONS.get(class_of(module.net[0]))
            enter, leave = "net.0.proj", "net.2"
            if not all(isinstance(layer, nn.Dropout) for layer in (module.net[1], *module.net[3:])):
                continue
        elif class_of(module) == "transformer_flux.FluxSingleTransformerBlock":
            rows, enter, leave = 1, "proj_mlp", "proj_out"
        else:
            continue
        first, last = (module.get_submodule(child) for child in (enter, leave))
        if rows is None or not type(first) is type(last) is nn.Linear:
            continue
        size = first.out_features // rows
        start = last.in_features - size  # in FLUX's single blocks the attention comes first
        enter, leave = (f"{name}.{child}".lstrip(".") for child in (enter, leave))
        writers = tuple(End(enter, ROWS, half * size) for half in range(rows))
        yield Stream(writers, (End(leave, COLUMNS, start),), size), rows
