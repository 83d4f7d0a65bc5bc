"""What attention in 8 bits has done: which layers it serves, by which kernels, and why others were left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch


class Attention8:
    """Attention in 8 bits of some layers; `str()` of it is a report, also after the block.

    kind: of the codes of queries and keys, "int8" or "e4m3". layers: names of the layers that are served;
    kinds: of those that have another kind. left: name
    of a layer that is not -> why. kernels: kernel -> calls in 8 bits. sixteen: why -> calls that were left as they
    were. active: whether calls are in 8 bits now. faster: whether only calls are that were measured to be faster so
    (faster.py). Calls of compiled code are not counted.
    """

    def __init__(self, kind: str, layers: Iterable[str] = ()) -> None:
        self.kind, self.active, self.faster = kind, True, False
        self.layers = list(layers)
        self.kinds: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self.kernels: Counter[str] = Counter()
        self.sixteen: Counter[str] = Counter()
        self.redirected: Callable[[str], Any] | None = None  # what stands in the way of a layer's calls, if another
        self._called: set[str] = set()
        self._reached: set[str] = set()

    def kind_of(self, name: str) -> str:
        """Of a layer."""
        return self.kinds.get(name, self.kind)

    def called(self, name: str) -> None:
        if not torch.compiler.is_compiling():
            self._called.add(name)

    def in_8(self, name: str, kernel: str) -> None:
        if not torch.compiler.is_compiling():
            self._reached.add(name)
            self.kernels[kernel] += 1

    def in_16(self, name: str, why: str) -> None:
        if not torch.compiler.is_compiling():
            self._reached.add(name)
            self.sixteen[why] += 1

    @property
    def unreached(self) -> list[str]:
        """Layers that were called and never called torch's attention: their processors compute it another way."""
        return [name for name in self.layers if name in self._called - self._reached]

    def __str__(self) -> str:
        kinds = Counter(self.kind_of(name) for name in self.layers)
        lines = [f"attention of {count} layers with queries and keys in {kind}" for kind, count in kinds.items()]
        lines += [f"in 8 bits by {name}, {count} times" for name, count in self.kernels.items()]
        lines += [f"as it was {count} times: {why}" for why, count in self.sixteen.items()]
        if self.unreached:
            lines.append(
                f"{len(self.unreached)} layers compute attention in another way than by torch's "
                f"scaled_dot_product_attention ('{self.unreached[0]}')"
            )
        for why, count in Counter(self.left.values()).items():
            first = next(name for name, one in self.left.items() if one == why)
            lines.append(f"left {count}: {why} ('{first}')")
        return "\n".join(lines)
