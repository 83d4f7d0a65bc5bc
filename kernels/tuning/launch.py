"""What launches of Linear layers share while they are searched for settings."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ..runtime.settings import best_config

DEVICE = "cuda"


class SizedLaunch:
    """A launch of a layer of N outputs and K inputs on M rows; `kernel`: its settings' name in tuned/."""

    m: int
    n: int
    k: int

    @property
    def kernel(self) -> str:
        raise NotImplementedError

    @property
    def key(self) -> list[int]:
        return [self.m, self.n, self.k]

    def current(self) -> dict | None:
        try:
            return best_config(self.kernel, torch.device(DEVICE), *self.key)
        except KeyError:
            return None


class WholeLayer(SizedLaunch):
    """A layer with all its launches, of which one product has settings; mode: of that product.

    one, cold: the layer on operands of its own, and on as many as no cache holds; each takes `config`.
    """

    mode: str

    @property
    def kernel(self) -> str:
        return f"{self.mode}.product"

    def one(self) -> Callable:
        raise NotImplementedError

    def cold(self) -> list[Callable]:
        raise NotImplementedError

    def attempt(self, setting: dict) -> None:
        self.one()(config=setting)

    def calls(self) -> Callable[[dict], list[Callable]]:
        sets = self.cold()
        return lambda setting: [functools.partial(one, config=setting) for one in sets]
