"""Keys and values of the texts of one pipeline call: kept by what the text is, for each layer."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .four_bits import keys_in_4_bits, values_in_4_bits
from .state import State

MOST_TEXTS = 4
"""Kept at a time. Pipelines that call a network once for each half of guidance have two, with more terms three."""

Parts = tuple[Tensor, ...]


class Text:
    """What a layer was given as text, and each layer's keys and values of it."""

    def __init__(self, given: Tensor) -> None:
        self.copy = given.detach().clone()
        self.kept: dict[int, tuple[State, Parts]] = {}

    def is_of(self, given: Tensor) -> bool:
        """Whether the values are the same, to the bit; NaN is never the same."""
        mine = self.copy
        facts = [(one.shape, one.dtype, one.device) for one in (mine, given)]
        return facts[0] == facts[1] and torch.equal(mine, given)


class TextCache:
    """Keys and values by layer and text; `str()` of it is a report, also after the block.

    bits: 4 for the codes of formats/kv4.py; 16: float32 becomes float16; None: as they are computed.
    layers: names of the layers that are served. left: name of a layer that is not -> why.
    made, reused: how often keys and values of a layer were computed, and taken from here. uncached: how many of those
        computed could not be kept, because a hook waits for the calls of the layer's projections.
    """

    def __init__(self, bits: int | None, clocks: Iterable[Any] = ()) -> None:
        self.bits = bits
        self.layers: list[str] = []
        self.left: dict[str, str] = {}
        self.made = self.reused = self.uncached = 0
        self.kernels: Counter[str] = Counter()
        self._texts: list[Text] = []
        self._most = 0, 0
        self._clocks = list(clocks)
        self._call: list[Any] = []
        self._seen: tuple[weakref.ref[Tensor], tuple[int, int], Text] | None = None

    def clear(self) -> None:
        """Forget all keys, values and texts; the counts stay."""
        self._most = self.most_bytes
        self._texts.clear()
        self._seen = None

    @property
    def bytes(self) -> tuple[int, int]:
        """Of keys and values that are kept now, and of the copies of texts, by which these are known again."""
        parts = [part for text in self._texts for _, kept in text.kept.values() for part in kept]
        copies = [text.copy for text in self._texts]
        one, other = (sum(part.numel() * part.element_size() for part in of) for of in (parts, copies))
        return one, other

    @property
    def most_bytes(self) -> tuple[int, int]:
        """The most of `bytes` that was kept at a time."""
        return max(self._most, self.bytes)

    @torch.compiler.disable
    def of(
        self, layer: nn.Module, parts: tuple[nn.Module | None, ...], given: Tensor, make: Callable[[], Parts]
    ) -> Parts:
        """A layer's stored keys and values of a text [B, L, C], computed by `make` unless they are here.

        parts: the modules that `make` calls; none where their calls may not be left out: then nothing is kept.

        Raises UserError where gradients are wanted.
        """
        if torch.is_grad_enabled():
            raise UserError(
                "keys and values of a text are kept for sampling, and have no gradient: call the model under "
                "torch.no_grad()."
            )
        if not parts:
            self.made, self.uncached = self.made + 1, self.uncached + 1
            return self._stored(make())
        self._new_call()
        text, kind = self._text_of(given), given.device.type
        state = State(parts, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        kept = text.kept.get(id(layer))
        if kept is not None and kept[0] == state:
            self.reused += 1
            return kept[1]
        self.made += 1
        text.kept.pop(id(layer), None)
        stored = self._stored(make())
        text.kept[id(layer)] = state.held(), stored
        return stored

    def _stored(self, pair: Parts) -> Parts:
        if self.bits == 4:
            keys, values = pair
            return *keys_in_4_bits(keys), *values_in_4_bits(values)
        if self.bits == 16:
            return tuple(one if one.dtype.itemsize == 2 else one.to(torch.float16) for one in pair)
        return pair

    def _text_of(self, given: Tensor) -> Text:
        """The text that was given, known by its values. Within a forward pass layers are given the same tensor, which
        is compared once."""
        version = None if given.is_inference() else given._version
        if self._seen is not None and version is not None:
            tensor, known, text = self._seen
            if known == (version, given.data_ptr()) and tensor() is given:
                return text
        text = next((one for one in self._texts if one.is_of(given)), None) or Text(given)
        if len(self._texts) == MOST_TEXTS and text not in self._texts:
            self._most = self.most_bytes
        self._texts = [text, *(one for one in self._texts if one is not text)][:MOST_TEXTS]  # the latest first
        self._seen = None if version is None else (weakref.ref(given), (version, given.data_ptr()), text)
        return text

    def _new_call(self) -> None:
        """Forget everything where a scheduler has new timesteps: another call of the pipeline has begun."""
        now = [getattr(clock, "timesteps", None) for clock in self._clocks]
        if len(now) != len(self._call) or any(a is not b for a, b in zip(now, self._call, strict=True)):
            self.clear()
            self._call = now

    def __str__(self) -> str:
        what = {4: "in 4 bits", 16: "in 16 bits", None: "as computed"}[self.bits]
        lines = [
            f"keys and values of {len(self.layers)} layers {what}: computed {self.made} times, reused {self.reused}",
            "at most {:,} bytes, and {:,} of copies of texts".format(*self.most_bytes),
        ]
        lines += [f"attention by {name}, {count} times" for name, count in self.kernels.items()]
        if self.uncached:
            lines.append(f"{self.uncached} could not be kept: hooks (offloading, recorders) are on the projections")
        for why, count in Counter(self.left.values()).items():
            first = next(name for name, one in self.left.items() if one == why)
            lines.append(f"left {count}: {why} ('{first}')")
        return "\n".join(lines)
