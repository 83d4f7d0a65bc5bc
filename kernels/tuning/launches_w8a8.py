"""The W8A8 kernel's tiles for a model's layers, to be searched: one launch for each shape class and operand type."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import triton

from ..runtime.integers import next_power_of_2
from ..w8a8.configs import GLUON, Config, choose, shape_class
from ..w8a8.layer import REFERENCE, kernel_name
from ..w8a8.steps import ON_LOAD_OUTPUTS, Parameters, multiply
from ..w8a8.window import stored_channels
from .cases import CODES, Case, Operands, encoded

DEVICE = "cuda"
FEW_IMAGES = 16  # enough to see whether a candidate runs


@dataclass(frozen=True)
class W8A8Launch:
    """form: of the codes, "int8" or "fp8"; on_load: the input is quantized as it is loaded, else it is codes."""

    case: Case
    form: str
    on_load: bool

    kernel = "w8a8"

    @property
    def key(self) -> str:
        return shape_class(*self._sizes, self.on_load)

    @property
    def _sizes(self) -> tuple:
        channels = stored_channels(self.case.channels)
        return CODES[self.form], self.case.window, channels, self.case.outputs

    def settings(self) -> list[dict]:
        found = candidates(self.case, self.on_load, torch.cuda.get_device_capability(), shared_memory())
        return [asdict(config) for config in found]

    def current(self) -> dict:
        return asdict(choose(*self._sizes, torch.device(DEVICE), self.on_load))

    def compiled_as(self, setting: dict) -> tuple:
        """The sizes of images and batches are not compiled in, and of the outputs only that 16 divides them."""
        case, setting = self.case, tuple(sorted(setting.items()))
        aligned = case.outputs % 16 == 0
        return (self.form, self.on_load, setting, case.channels, aligned, case.window.kernel, case.window.stride)

    def attempt(self, setting: dict) -> None:
        few = replace(self.case.window, batch=min(FEW_IMAGES, self.case.window.batch))
        (x,), call = _operands(replace(self, case=replace(self.case, window=few)), 1)
        call(x, Config(**setting))

    def calls(self) -> Callable[[dict], list[Callable]]:
        inputs, call = _operands(self, None)
        return lambda setting: [functools.partial(call, x, Config(**setting)) for x in inputs]


def shared_memory() -> int:
    """Bytes that a program may have on this GPU."""
    utils = triton.runtime.driver.active.utils
    return utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]


def launches(cases: list[Case]) -> list[W8A8Launch]:
    """One for each shape class and each type of codes that this GPU multiplies."""
    found: dict[str, W8A8Launch] = {}
    for case in cases:
        for form, dtype in CODES.items():
            if kernel_name(torch.device(DEVICE), dtype=dtype) == REFERENCE:
                continue
            plain = case.window.taps == 1 and case.window.padding == (0, 0)
            kinds = [True] * (plain and case.outputs <= ON_LOAD_OUTPUTS)
            kinds += [False] * (not kinds or case.linear)  # a Linear gets codes, too, from a fused or compiled norm
            for on_load in kinds:
                launch = W8A8Launch(case, form, on_load)
                found.setdefault(launch.key, launch)
    return list(found.values())


def candidates(case: Case, on_load: bool, capability: tuple[int, int], shared: int) -> list[Config]:
    """Tiles worth a try; shared: bytes of shared memory that a program may have."""
    few = case.rows * case.outputs < 2**19
    if case.window.taps == 1 and not on_load and not few:
        tiles = _of_many_rows(case)
    else:
        tiles = _of_windows(case, on_load, few)
    tma = capability >= (9, 0) and max(case.window.stride) == 1
    kept = [c for c in tiles if (c.mode != "tma" or tma) and _shared(c) <= shared]
    if capability[0] == 9 and case.window.rows_of_pixels and not on_load and not few:
        kept += [replace(GLUON, band=band) for band in (4, 8, 16)]
    return list(dict.fromkeys(kept))


def _of_many_rows(case: Case) -> list[Config]:
    """1x1 windows of codes, which memory bounds: of K there are but a few steps, so that a tile's first loads and its
    store take as long as its products. They overlap with another tile's, in a program that works off many or among
    the programs of a multiprocessor; what `programs` says is what registers and shared memory have room for."""
    tiles = [  # mode, bm, bn, bk, warps, stages, programs, registers
        ("tma", 128, 128, 128, 4, 3, 2), ("tma", 128, 128, 64, 4, 4, 2), ("tma", 128, 128, 128, 8, 3, 2, 128),
        ("tma", 128, 256, 128, 8, 4, 1), ("tma", 256, 128, 128, 8, 3, 1),
        ("tma", 64, 128, 128, 4, 2, 3), ("tma", 128, 64, 128, 4, 2, 3),
        ("tma", 128, 128, 128, 4, 3), ("tma", 64, 128, 128, 4, 3),
        ("tma", 128, 64, 128, 4, 3),
        ("gather", 128, 128, 128, 4, 3), ("gather", 128, 128, 64, 4, 4), ("gather", 256, 128, 64, 8, 3),
        ("gather", 128, 256, 64, 8, 3), ("gather", 64, 128, 128, 4, 3), ("gather", 64, 128, 64, 4, 4),
        ("gather", 128, 64, 64, 4, 4),
    ]  # fmt: skip
    widest, depth = _widest(case.outputs), _depths(case.channels)[0]
    every = [Config(*tile) for tile in tiles]
    return [replace(c, bn=min(c.bn, widest), bk=min(c.bk, depth)) for c in every]


def _of_windows(case: Case, on_load: bool, few: bool) -> list[Config]:
    """Convolutions, inputs quantized on load, and few outputs."""
    widest = _widest(case.outputs)
    tiles = [  # bm, bn, warps, stages, registers
        (128, 128, 4, 3, 0), (128, 128, 4, 4, 0), (128, 128, 8, 3, 128), (128, 128, 8, 4, 0), (256, 128, 8, 3, 0),
        (256, 128, 8, 4, 0), (256, 128, 16, 3, 0), (128, 64, 4, 4, 0), (64, 128, 4, 4, 0), (256, 64, 8, 4, 0),
        (128, 256, 8, 3, 0),
        (64, 64, 4, 4, 0), (64, 32, 4, 4, 0), (32, 64, 4, 4, 0), (128, 16, 4, 4, 0),
        (256, 16, 4, 4, 0), (64, 16, 4, 4, 0), (256, 16, 8, 3, 0),
    ]  # fmt: skip
    tiles = [t for t in tiles if t[1] <= widest and (t[1] >= min(64, widest) or few)]
    tiles = [t for t in tiles if (t[0] <= 128 and t[3] == 4 if few else t[0] * t[1] >= min(64 * 128, 64 * widest))]
    if on_load and not few:
        tiles = [t for t in tiles if t[1] >= min(case.outputs, 128)]
    found = [
        Config(mode, bm, bn, bk, warps, stages, 0, registers)
        for mode in (["on-load"] if on_load else ["tma", "gather"])
        for bm, bn, warps, stages, registers in tiles
        for bk in _depths(case.channels)[: 2 if on_load else 1]
    ]
    large = [c for c in found if not few and c.bm * c.bn >= 128 * 128 and c.stages == 3 and not on_load]
    return found + [replace(c, programs=1) for c in large] + [replace(c, programs=2) for c in large if c.bm == 128]


def _widest(outputs: int) -> int:
    """The outputs that a tile needs to have them all."""
    return max(16, next_power_of_2(outputs))


def _depths(channels: int) -> list[int]:
    """The steps in K that divide it, the largest first."""
    return [bk for bk in (128, 64, 32) if stored_channels(channels) % bk == 0]


def _shared(config: Config) -> int:
    """Bytes of the tiles that are on their way; an input to be quantized on load is of two bytes, and codes."""
    c = config
    return (c.bm * (3 if c.mode == "on-load" else 1) + c.bn) * c.bk * c.stages


@functools.lru_cache(maxsize=1)
def _operands(launch: W8A8Launch, copies: int | None) -> tuple[list[torch.Tensor], Callable]:
    """(inputs as the kernel gets them, its call with one of them and a Config)."""
    case = launch.case
    operands = Operands.of(case, copies)
    quantized = operands.quantized(launch.form)
    inputs = [_floats(case, x) if launch.on_load else encoded(case, quantized, x) for x in operands.inputs]
    return inputs, functools.partial(_product, case, quantized)


def _floats(case: Case, x: torch.Tensor) -> torch.Tensor:
    return (x[:, :, None, None] if case.linear else x).permute(0, 2, 3, 1)


def _product(case: Case, operands: tuple, x: torch.Tensor, config: Config) -> torch.Tensor:
    return multiply(x, case.window, Parameters(*operands), torch.bfloat16, config=config)
