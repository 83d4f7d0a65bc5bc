"""The launches of an SVDQuant layer, one by one, with operands: to be searched for settings, checked and timed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from ..formats import int4
from ..runtime.settings import best_config
from ..w4 import activation, unpack
from ..w4.layer import INT4, MODES, WEIGHT_ONLY, code_dtype, kernel_name, steps
from ..w4.products import product_short, product_w4a4, product_w4a8
from .candidates_w4 import settings_of
from .launch import DEVICE, SizedLaunch

COLD = 256 << 20  # bytes that one round over the sets of a shape moves at least: four times the L2 of an H200
NAMES = {mode: name for name, mode in MODES.items()}
SHAPES = {  # M, N, K
    "flux-qkv": (4608, 9216, 3072),
    "flux-out": (4608, 3072, 3072),
    "flux-up": (4608, 12288, 3072),
    "flux-down": (4608, 3072, 12288),
    "pixart-fc1": (4096, 4608, 1152),
    "sdxl-ff": (4096, 10240, 1280),
    "adaln-1": (1, 18432, 3072),
    "adaln-16": (16, 18432, 3072),
}


@dataclass(frozen=True)
class SVDQLaunch(SizedLaunch):
    """One launch of a layer of N outputs and K inputs on M rows; mode: as in w4.layer.MODES."""

    m: int
    n: int
    k: int
    rank: int
    mode: str
    step: str

    @property
    def kernel(self) -> str:
        return f"{self.mode}.{self.step}"

    def settings(self) -> list[dict]:
        return settings_of(self.step, NAMES[self.mode], self.m, self.k)

    def compiled_as(self, setting: dict) -> tuple:
        return self, *sorted(setting.items())

    def attempt(self, setting: dict) -> None:
        one, state = _one(self.m, self.n, self.k, self.rank, self.mode)
        run(self.step, one, setting, state)

    def calls(self) -> Callable[[dict], list[Callable]]:
        """Launches of a layer are timed in their order: each finds what the one before it left."""
        sets, state = _cold(self.m, self.n, self.k, self.rank, self.mode)
        return lambda setting: [functools.partial(run, self.step, one, setting, state) for one in sets]


def launches(m: int, n: int, k: int, rank: int, mode: str) -> list[SVDQLaunch]:
    """The launches that serve a layer of this activation format on this GPU.

    Raises ValueError where none does: `w4.layer.kernel_name` says.
    """
    name = kernel_name(torch.device(DEVICE), mode, int4.GROUP)
    if name not in MODES:
        raise ValueError(f"no kernel for {mode} activations on this device.")
    rank = 0 if name == WEIGHT_ONLY else rank
    return [SVDQLaunch(m, n, k, rank, MODES[name], step) for step in steps(name, m) if step != "cublas"]


def operands(m: int, n: int, k: int, rank: int, seed: int) -> SimpleNamespace:
    """Inputs with a few wide columns, a weight and its 4-bit form, smoothing, branch and bias, in bf16."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, device=DEVICE)

    width = normal(k).exp()
    weight = normal(n, k) / k**0.5
    codes, wscales = int4.quantize_groups(weight, int4.GROUP, torch.bfloat16)
    return SimpleNamespace(
        x=(normal(m, k) * width).bfloat16(),
        weight=weight.bfloat16(),
        qweight=int4.pack_int4(codes, int4.GROUP),
        wscales=wscales,
        smooth=width.sqrt().bfloat16(),
        down=(normal(rank, k) / k**0.5).bfloat16() if rank else None,
        up=(normal(n, rank) / rank**0.5).bfloat16() if rank else None,
        bias=normal(n).bfloat16(),
    )


def sets_for(m: int, n: int, k: int, rank: int) -> list[SimpleNamespace]:
    """As many sets of operands as no cache holds: each call finds its own in memory."""
    return [operands(m, n, k, rank, seed) for seed in range(cold_sets(m, n, k))]


def cold_sets(m: int, n: int, k: int) -> int:
    """How many sets of 16-bit inputs and a 4-bit weight no cache holds."""
    return min(16, math.ceil(COLD / (2 * m * k + n * k // 2)))


def state_for(one, mode: str) -> SimpleNamespace:
    """Room for what the launches of one call hand to one another."""
    name = NAMES[mode]
    dtype = one.x.dtype if mode == "none" else code_dtype(name, one.x.device)
    rows = activation.empty_activation(one.x, mode, 0 if one.down is None else len(one.down), dtype)
    return SimpleNamespace(
        name=name,
        mode=mode,
        rows=(one.x, None, None) if mode == "none" else rows,
        weight=unpack.empty_weight(one.qweight, dtype, mode),
        out=one.x.new_empty(len(one.x), len(one.qweight)),
    )


def run(step: str, one, setting: dict | None, state) -> None:
    """One launch of a call; what those before it left is in `state`."""
    rows = (one.x, one.smooth, one.down, state.mode, 0.0, state.rows)
    if step == "prepare":
        unpack.prepare(*rows, one.qweight, one.wscales, state.weight, setting)
    elif step == "activation":
        activation.quantize_activation(*rows, setting)
    elif step == "unpack":
        unpack.unpack(one.qweight, one.wscales, state.weight, state.mode, setting)
    elif step == "product":
        product = product_w4a4.product if state.name == INT4 else product_w4a8.product
        product(state.rows, state.weight, one.up, one.bias, state.out, setting)
    elif step == "short":
        codes, scale, branch = state.rows
        product_short.short_product(
            codes, scale, one.qweight, one.wscales, branch, one.up, one.bias, state.out, setting
        )
    else:
        torch.nn.functional.linear(one.x, state.weight[0], one.bias)


def chosen(one, mode: str) -> dict[str, dict | None]:
    """step -> its settings, of the launches of one call."""
    sizes = (one.x.device, len(one.x), len(one.qweight), one.x.shape[1])
    return {
        step: None if step == "cublas" else best_config(f"{mode}.{step}", *sizes)
        for step in steps(NAMES[mode], len(one.x))
    }


@functools.lru_cache(maxsize=1)
def _one(m: int, n: int, k: int, rank: int, mode: str) -> tuple:
    one = operands(m, n, k, rank, seed=0)
    return one, state_for(one, mode)


@functools.lru_cache(maxsize=1)
def _cold(m: int, n: int, k: int, rank: int, mode: str) -> tuple:
    sets = sets_for(m, n, k, rank)
    return sets, state_for(sets[0], mode)
