"""What `fuse` changed and what it left, and why."""

from __future__ import annotations

from collections import Counter

from torch import nn

from ...handed.notes import Notes
from ..base import QuantizedLayer
from .parts import in_blocks

NOWHERE = (
    "on this device every module computes as before: fused kernels are for NVIDIA GPUs, and with a C++ compiler for "
    "x86 CPUs: static int8 with VNNI, SVDQuant with int8 or int4 inputs with AVX2 too"
)
FORM = "it is built otherwise than those that are fused"


class FuseReport(list):
    """The names of the modules that were fused, as a list; printed, a short table.

    kinds: name -> the class of each fused module; idle: those of them that compute as before where the model is now;
    left: name of a module of a kind that can be fused -> (its class, why it was left); notes: sentences on when fused
    modules compute as before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[str, str] = {}
        self.idle: list[str] = []
        self.left: dict[str, tuple[str, str]] = {}
        self.notes: list[str] = []
        self.handed: dict[str, Notes] = {}

    def add(self, name: str, kind: str) -> None:
        """Note a module that was fused."""
        self.append(name)
        self.kinds[name] = kind

    def hand(self, name: str, kind: str, notes: Notes) -> None:
        """Note a module that hands on what it has."""
        self.add(name, kind)
        self.handed[name] = notes

    def leave(self, name: str, kind: str, why: str) -> None:
        """Note a module that was left, but for parts of one that is fused as a whole."""
        if not any(name.startswith(f"{fused}.") for fused in self):
            self.left[name] = (kind, why)

    def note(self, model: nn.Module, hooked: list[str], on_kernels: bool, idle: list[str]) -> None:
        """Say when the fused modules of a model compute as before. hooked: those that have hooks; idle: those that no
        kernels serve where the model is."""
        if on_kernels:
            self.idle += idle
        else:
            self.notes.append(NOWHERE)
        if model.training:
            self.notes.append("in training modules compute as before; call eval()")
        if hooked:
            more = f" and {len(hooked) - 1} more" if len(hooked) > 1 else ""
            self.notes.append(
                f"'{hooked[0]}'{more}: computes as before while hooks (offloading, recorders) are on its parts"
            )
        self.notes = list(dict.fromkeys(self.notes))

    def __str__(self) -> str:
        unread = [name for name, notes in self.handed.items() if notes.settled() == ()]
        kinds = Counter(kind for name, kind in self.kinds.items() if name not in unread and name not in self.idle)
        lines = [f"{'fused':<6} {count:>4} {kind}" for kind, count in kinds.items()]
        for kind, count in Counter(self.kinds[name] for name in self.idle).items():
            lines.append(f"{'as before':<6} {count} {kind.partition(', ')[0]}: no kernels of this device serve it")
        for kind, count in Counter(self.kinds[name] for name in unread).items():
            first = next(name for name in unread if self.kinds[name] == kind)
            plain, _, what = kind.partition(", ")
            why = (
                "its layers share nothing, or what a norm hands on"
                if "share" in what
                else "no quantized layer reads it"
            )
            lines.append(f"{'left':<6} {count:>4} {plain}: {why} ('{first}')")
        unseen = [name for name, notes in self.handed.items() if notes.settled() is None and name not in self.idle]
        if unseen and NOWHERE not in self.notes:
            lines.append(
                f"of {len(unseen)} of these a first call that is not compiled will tell whether they are read"
            )
        for (kind, why), count in Counter(self.left.values()).items():
            first = next(name for name, seen in self.left.items() if seen == (kind, why))
            lines.append(f"{'left':<6} {count:>4} {kind}: {why} ('{first}')")
        return "\n".join([*(lines or ["no module is of a kind that can be fused"]), *self.notes])


def why_left(module: nn.Module, serves: tuple[type, ...] | None, read: list[nn.Module] | None = None) -> str:
    """Why a module of a kind that can be fused is not, by what its layers are.

    serves: the classes of layers that its kind is fused around; None of blocks.py, where layers say so themselves.
    read: the layers that count, where they are not all.
    """
    plain = []
    quantized = [layer for layer in module.modules() if isinstance(layer, QuantizedLayer)]
    if not quantized:
        return "none of its layers is quantized"
    for name, layer in module.named_modules():
        if read is not None and not any(layer is one for one in read):
            continue
        which = f"'{name}'" if name else "it"
        if hasattr(layer, "base_layer"):
            return f"{which} has an adapter"
        if isinstance(layer, QuantizedLayer):
            if not (in_blocks(layer) if serves is None else isinstance(layer, serves)):
                return f"{which} is {layer.plan}, which has no fused kernels here"
            if why := layer.why_not_in_blocks() if serves is None else layer.why_not_fused():
                return f"{which} {why}"
        elif isinstance(layer, (nn.Linear, nn.Conv2d)):
            plain.append(which)
    return f"{plain[0]} is in full precision" if plain else FORM
