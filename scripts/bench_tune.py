"""The settings that `bench_kernels.py --tune` tries, and the trying: each is compiled, in several processes at once,
checked by running and timed; the best go to kernels/tuned/."""

from __future__ import annotations

import functools
import itertools
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from bench_common import operands, over, race

from ptq4dm.kernels import svdq_activation, svdq_gemm, svdq_unpack
from ptq4dm.kernels.tuning import FOLDER, best_config, forget, slug

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.float8_e4m3fn}


def prepare_settings(k: int) -> list[dict]:
    """BM, BK, KEEP, STAGES, warps of the activation's programs; bytes of codes that an unpacking one reads."""
    shapes = [(16, 128, 4, 4), (16, 256, 3, 4), (16, 256, 4, 4), (16, 256, 4, 8), (16, 512, 3, 8), (16, 512, 2, 4)]
    shapes += [(32, 128, 4, 4), (32, 128, 5, 4), (32, 256, 3, 4), (32, 256, 3, 8), (64, 128, 3, 8), (16, 1024, 2, 8)]
    settings = [
        dict(FUSED=True, BM=bm, BK=bk, KEEP=0, STAGES=stages, num_warps=warps, UNPACK_BYTES=size, PDL=False)
        for (bm, bk, stages, warps), size in itertools.product(shapes, (8192, 16384))
        if bk <= k
    ]
    settings += [
        dict(FUSED=True, BM=16, BK=bk, KEEP=-(-k // bk), STAGES=1, num_warps=warps, UNPACK_BYTES=8192, PDL=False)
        for bk, warps in ((128, 4), (256, 8), (512, 8))
        if k <= 1536
    ]
    return settings + [one | dict(FUSED=False, UNPACK_BYTES=4096) for one in settings if one["UNPACK_BYTES"] == 8192]


def product_settings() -> list[dict]:
    """Tiles, stages, warps and programs for each multiprocessor; the order of the tiles; the last wave cut or not."""
    common = dict(TMA=True, PDL=False, PIECES=2, PER_SM=1)
    large = [
        dict(BM=128, BN=256, BK=128, num_stages=3, num_warps=8),
        dict(BM=128, BN=256, BK=64, num_stages=4, num_warps=8),
    ]
    large += [
        dict(BM=128, BN=256, BK=64, num_stages=5, num_warps=8),
        dict(BM=256, BN=128, BK=128, num_stages=3, num_warps=8),
    ]
    settings = [common | one | dict(TAIL=tail, BAND=8) for one in large for tail in (True, False)]
    settings += [common | large[0] | dict(TAIL=True, BAND=band) for band in (4, 16, 64)]
    two = [dict(BK=128, num_stages=2), dict(BK=64, num_stages=4), dict(BK=64, num_stages=3)]
    settings += [common | one | dict(BM=128, BN=128, num_warps=4, PER_SM=2, TAIL=False, BAND=16) for one in two]
    settings += [common | dict(BM=64, BN=256, BK=64, num_stages=3, num_warps=4, PER_SM=2, TAIL=True, BAND=16)]
    settings += [common | dict(BM=128, BN=128, BK=128, num_stages=4, num_warps=8, TAIL=False, BAND=8)]
    return settings


def state_for(one, activation: str):
    rank = 0 if one.down is None else len(one.down)
    rows = svdq_activation.empty_activation(one.x, activation, rank, DTYPES[activation])
    return (
        rows,
        svdq_unpack.empty_weight(one.qweight, DTYPES[activation]),
        one.x.new_empty(len(one.x), len(one.qweight)),
    )


def run_prepare(one, activation, setting, state):
    given = (one.x, one.smooth, one.down, activation, 0.0, state[0])
    svdq_unpack.prepare(*given, one.qweight, one.wscales, state[1], setting)


def run_product(one, activation, setting, state):
    svdq_gemm.product(state[0], state[1], one.up, one.bias, state[2], setting)


KERNELS = {"prepare": (run_prepare, prepare_settings), "product": (run_product, lambda k: product_settings())}


def tune(sets: list, activation: str) -> None:
    """Time every setting on the shape of `sets`; put the best of each kernel into the file of this GPU."""
    n, k = len(sets[0].qweight), sets[0].x.shape[1]
    m = len(sets[0].x)
    state = state_for(sets[0], activation)
    for kernel, (run, settings) in KERNELS.items():
        timed = []
        for setting in compiled(sets[0], activation, kernel, settings(k)):
            calls = over(sets, lambda one, run=run, setting=setting: run(one, activation, setting, state))
            timed.append((race({"": calls}, 5)[""], setting))
        if not timed:
            raise SystemExit(f"no setting of {kernel} runs on this GPU")
        timed.sort(key=lambda pair: pair[0])
        for microseconds, setting in timed[:4]:
            print(f"    {kernel} {microseconds:7.1f} us  {json.dumps(setting)}", flush=True)
        record(f"{activation}.{kernel}", [m, n, k, timed[0][1]])
    overlap(sets, activation, state, [m, n, k])
    forget()


def overlap(sets: list, activation: str, state, sizes: list[int]) -> None:
    """Whether the product's programs should be launched before the others have ended (programmatic launch)."""
    if torch.cuda.get_device_capability() < (9, 0):
        return
    forget()
    chosen = {kernel: best_config(f"{activation}.{kernel}", sets[0].x.device, *sizes) for kernel in KERNELS}

    def both(one, early):
        for kernel, (run, _) in KERNELS.items():
            run(one, activation, chosen[kernel] | {"PDL": early}, state)

    times = race({early: over(sets, lambda one, early=early: both(one, early)) for early in (False, True)})
    print(f"    launched one after the other {times[False]:.1f} us, overlapping {times[True]:.1f} us", flush=True)
    for kernel in KERNELS:
        record(f"{activation}.{kernel}", [*sizes, chosen[kernel] | {"PDL": times[True] < times[False]}])


def compiled(one, activation: str, kernel: str, settings: list[dict]) -> list[dict]:
    """Those settings that compile and run here, tried in other processes, which leave them in Triton's cache."""
    sizes = (len(one.x), len(one.qweight), one.x.shape[1], 0 if one.down is None else len(one.down))
    answers = pool().map(try_one, [(sizes, activation, kernel, setting) for setting in settings])
    good = []
    for setting, problem in zip(settings, answers, strict=True):
        if problem:
            print(f"    left out: {problem}  {json.dumps(setting)}", flush=True)
        else:
            good.append(setting)
    return good


@functools.cache
def pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=get_context("spawn"))


@functools.lru_cache(maxsize=1)
def _here(sizes: tuple, activation: str):
    one = operands(*sizes, seed=0)
    return one, state_for(one, activation)


def try_one(task) -> str:
    sizes, activation, kernel, setting = task
    try:
        one, state = _here(sizes, activation)
        KERNELS[kernel][0](one, activation, setting, state)
        torch.cuda.synchronize()
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem).splitlines()[0][:120]}"
    return ""


def tuned_file() -> Path:
    return FOLDER / f"{slug(torch.cuda.get_device_name())}.json"


def record(kernel: str, entry: list) -> None:
    """Put one entry into the file of this GPU, in the place of an older one for the same sizes."""
    path = tuned_file()
    table = json.loads(path.read_text()) if path.is_file() else {"device": torch.cuda.get_device_name()}
    table[kernel] = [old for old in table.get(kernel, []) if old[:3] != entry[:3]] + [entry]
    path.write_text(formatted(table))


def formatted(table: dict) -> str:
    """One line for each entry, so that a change of one shows as one."""
    parts = [
        f" {json.dumps(key)}: {json.dumps(value)}"
        if isinstance(value, str)
        else f" {json.dumps(key)}: [\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"
        for key, value in table.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"
