"""Streams: the channels between Linear layers, where a change on one side can be undone on the other.

Some layers write a stream with rows of their weights, others read it with columns of theirs:

    x = W_writer u + b,   y = W_reader x          x -> A x  is undone by  W_reader -> W_reader A^-1

A transform changes only streams that `attention` or `feedforward` find in the model, so that a plan is refused
wherever it would not be exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UserError
from .base import Evidence, TransformPlan

ROWS, COLUMNS = 0, 1
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NORMS = (nn.RMSNorm, nn.LayerNorm)  # and diffusers' own


@dataclass(frozen=True)
class End:
    """A layer at the end of a stream: the rows or columns of its weight that begin at `start`.

    A norm's weight [K] counts as rows: after the nonlinear part a norm multiplies by it, and adds its bias.
    """

    name: str
    axis: int
    start: int = 0


@dataclass(frozen=True)
class Stream:
    """`size` channels in `heads` equal parts, with the layers that write and that read them."""

    writers: tuple[End, ...]
    readers: tuple[End, ...]
    size: int
    heads: int = 1

    @property
    def modules(self) -> list[str]:
        return [end.name for end in (*self.writers, *self.readers)]


def change(model: nn.Module, stream: Stream, write: Callable, read: Callable) -> None:
    """Replace the stream's part of each weight, in place, by a formula of it.

    write, read: from a matrix with the stream's channels along its first axis to another such. They get the rows
        of a weight [K, in], the transposed columns of one [K, out], and a bias of those rows as [K, 1]; in float32
        at least.
    """
    with torch.no_grad():
        for ends, formula in ((stream.writers, write), (stream.readers, read)):
            for end in ends:
                for part in _parts(model.get_submodule(end.name), end, stream.size):
                    wide = torch.promote_types(part.dtype, torch.float32)
                    part.copy_(formula(part.to(wide)))


def _parts(layer: nn.Module, end: End, size: int) -> list[Tensor]:
    """Views of what a layer has of a stream, channels first."""
    weight, bias = layer.weight.narrow(end.axis, end.start, size), getattr(layer, "bias", None)
    if end.axis == COLUMNS:
        return [weight.T]
    weight = weight[:, None] if weight.ndim == 1 else weight
    return [weight] if bias is None else [weight, bias.narrow(0, end.start, size)[:, None]]


def is_norm(layer: object) -> bool:
    """Whether a module normalizes, and then multiplies by a weight [K]."""
    own = type(layer).__module__ == "diffusers.models.normalization" and type(layer).__name__ == "RMSNorm"
    return (own or type(layer) in NORMS) and getattr(getattr(layer, "weight", None), "ndim", 0) == 1


def _can_be_end(layer: object) -> bool:
    """Of a type that a stream begins or ends in, with a float weight."""
    return (type(layer) is nn.Linear or is_norm(layer)) and layer.weight.dtype in FLOATS  # type: ignore[attr-defined]


def whole(model: nn.Module, streams: Iterable[Stream]) -> list[Stream]:
    """Those streams whose ends are plain float Linear layers or norms, large enough, that share no tensor with
    others."""
    modules = dict(model.named_modules())
    uses = Counter(id(tensor) for module in modules.values() for tensor in module._parameters.values())
    uses.update(id(child) for module in modules.values() for child in module._modules.values())

    def usable(end: End, size: int) -> bool:
        layer = modules.get(end.name)
        bias = getattr(layer, "bias", None)
        return (
            layer is not None
            and _can_be_end(layer)
            and end.start + size <= layer.weight.shape[end.axis]
            and uses[id(layer)] == uses[id(layer.weight)] == 1
            and (bias is None or uses[id(bias)] == 1)
        )

    return [s for s in streams if all(usable(end, s.size) for end in (*s.writers, *s.readers))]


def streams_of(
    model: nn.Module, plans: Iterable[TransformPlan], streams: list[Stream], tensors: tuple[str, ...] = ()
) -> list[Stream]:
    """Those of a model's streams that plans are for; each of a plan's `tensors` must be of its stream's size.

    Raises:
        UserError: a module is missing or quantized, weights are not loaded, the stream is not there or of another
            size, or a tensor is missing.
    """
    return [_stream_of(model, plan, streams, tensors) for plan in plans]


def _stream_of(model: nn.Module, plan: TransformPlan, streams: list[Stream], tensors: tuple[str, ...]) -> Stream:
    for name in plan.modules:
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise UserError(f"the plan of '{plan.kind}' is of another model: there is no module '{name}'.") from None
        if not _can_be_end(layer):
            raise UserError(
                f"'{plan.kind}' changes weights in full precision, and '{name}' is a {type(layer).__name__}; "
                "apply it to the float model, before quantization and adapters."
            )
        if layer.weight.is_meta:
            raise UserError(f"'{plan.kind}' needs the weight of '{name}', which is not loaded (on 'meta').")
    found = next((stream for stream in streams if stream.modules == plan.modules), None)
    if found is None:
        raise UserError(
            f"the plan of '{plan.kind}' for {plan.modules} is of another model: in this one that change would not "
            "preserve the function."
        )
    for name in tensors:
        if name not in plan.tensors or plan.tensors[name].shape != (found.size,):
            raise UserError(
                f"the plan of '{plan.kind}' for {plan.modules} needs a tensor '{name}' of {found.size} values: it is "
                "of another model."
            )
    return found


def weight_peaks(model: nn.Module, stream: Stream) -> Tensor:
    """The largest magnitude [K] in each column of the readers' weights, float32."""
    with torch.no_grad():
        parts = [_parts(model.get_submodule(end.name), end, stream.size)[0] for end in stream.readers]
        return torch.stack([part.float().abs().amax(1) for part in parts]).amax(0)


def input_peaks(kind: str, streams: list[Stream], evidence: Evidence | None) -> list[tuple[Stream, Tensor]]:
    """(stream, the largest magnitude [K] of what its readers are fed), float32, of the streams that were seen.

    Raises:
        UserError: there is no evidence, it saw none of the streams, or it is of another model or not finite.
    """
    return _peaks(kind, [(s, s.readers) for s in streams], None if evidence is None else evidence.peak)


def output_peaks(kind: str, streams: list[Stream], evidence: Evidence | None) -> list[tuple[Stream, Tensor]]:
    """(stream, the largest magnitude [K] of what its writers give); otherwise as `input_peaks`."""
    return _peaks(kind, [(s, s.writers) for s in streams], None if evidence is None else evidence.output_peak)


def _peaks(
    kind: str, streams: list[tuple[Stream, tuple[End, ...]]], look_up: Callable[[str], Tensor | None] | None
) -> list[tuple[Stream, Tensor]]:
    if look_up is None:
        raise UserError(f"'{kind}' needs evidence of how large the model's activations are; calibrate it first.")
    found = []
    for stream, ends in streams:
        looked_up = [(end, look_up(end.name)) for end in ends]
        seen = [peak.float()[end.start : end.start + stream.size] for end, peak in looked_up if peak is not None]
        if any(peak.shape != (stream.size,) or not peak.isfinite().all() for peak in seen):
            raise UserError(
                f"'{kind}' needs {stream.size} finite peaks for {stream.modules}; the evidence is of another model."
            )
        if seen:
            found.append((stream, torch.stack(seen).amax(0)))
    if streams and not found:
        raise UserError(
            f"'{kind}' needs peaks, and the evidence has none of {streams[0][0].modules}; calibrate again."
        )
    return found
