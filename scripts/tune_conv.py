"""Find the W8A8 kernel's tiles for a model's layers on this GPU, and write them where the kernels look them up.

    python scripts/bench_conv.py --tune

Candidates are compiled by a pool of processes first (Triton keeps them on disk), then timed one after another; the
file is written after every shape, so a run that is cut short has been of use.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context

import torch
from conv_cases import CODES, Case, Operands, encoded, microseconds

from ptq4dm.kernels import prepared, w8a8_configs, w8a8_launch, w8a8_quantize, w8a8_triton
from ptq4dm.kernels.tuning import record
from ptq4dm.kernels.w8a8_configs import Config

SHARED = 227 * 1024  # bytes of shared memory a program may have (Hopper)


def candidates(case: Case, on_load: bool, capability: tuple[int, int]) -> list[Config]:
    channels, n = w8a8_quantize.stored_channels(case.channels), case.outputs
    widest = max(16, 1 << (n - 1).bit_length())
    few = case.rows * n < 2**19
    tiles = [  # bm, bn, warps, stages, registers
        (128, 128, 4, 3, 0), (128, 128, 4, 4, 0), (128, 128, 8, 3, 128), (128, 128, 8, 4, 0), (256, 128, 8, 3, 0),
        (256, 128, 8, 4, 0), (256, 128, 16, 3, 0), (128, 64, 4, 4, 0), (64, 128, 4, 4, 0), (256, 64, 8, 4, 0),
        (128, 256, 8, 3, 0),
        (64, 64, 4, 4, 0), (64, 32, 4, 4, 0), (32, 64, 4, 4, 0), (128, 16, 4, 4, 0),
        (256, 16, 4, 4, 0), (64, 16, 4, 4, 0), (256, 16, 8, 3, 0),
    ]  # fmt: skip
    tiles = [t for t in tiles if t[1] <= max(widest, 16) and (t[1] >= min(64, widest) or few)]
    tiles = [t for t in tiles if (t[0] <= 128 and t[3] == 4 if few else t[0] * t[1] >= min(64 * 128, 64 * widest))]
    widths = [bk for bk in (128, 64, 32) if channels % bk == 0][: 1 if math.prod(case.window.kernel) > 1 else 2]
    modes = ["on-load"] if on_load else ["gather"]
    if not on_load and capability >= (9, 0) and max(case.window.stride) == 1:
        modes = ["tma", *modes]
    found = []
    for mode in modes:
        for bm, bn, warps, stages, registers in tiles:
            for bk in widths:
                if on_load and not few and bn < min(n, 128):
                    continue
                size = (bm * (3 if on_load else 1) + bn) * bk * stages
                if size <= SHARED:
                    found.append(Config(mode, bm, bn, bk, warps, stages, 0, registers))
    large = [c for c in found if not few and c.bm * c.bn >= 128 * 128 and c.stages == 3 and not on_load]
    found += [replace(c, programs=1) for c in large] + [replace(c, programs=2) for c in large if c.bm == 128]
    return found


def tune(cases: list[Case], budget: float, workers: int) -> None:
    """budget: seconds to stop after."""
    began = time.monotonic()
    capability = torch.cuda.get_device_capability()
    jobs: dict[str, tuple] = {}
    for case in cases:
        for form, dtype in CODES.items():
            plain = case.window.taps == 1 and case.window.padding == (0, 0)
            kinds = [True] * (plain and case.outputs <= w8a8_launch.ON_LOAD_OUTPUTS)
            kinds += [False] * (not kinds or (case.channels, case.outputs) == (128, 128))  # query, key, value: codes
            for on_load in kinds:
                channels = w8a8_quantize.stored_channels(case.channels)
                key = w8a8_configs.shape_class(dtype, case.window, channels, case.outputs, on_load)
                jobs.setdefault(key, (case, form, on_load, candidates(case, on_load, capability)))
    kernels = {  # the sizes of images and batches are not compiled in
        (form, on_load, config, case.channels, case.outputs, case.window.kernel, case.window.stride): case
        for case, form, on_load, configs in jobs.values()
        for config in configs
    }
    work = [(case, *kernel[:3]) for kernel, case in kernels.items()]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        failed = [str(error) for error in pool.map(_compile, work, chunksize=4) if error]
    print(f"{len(work)} candidates compiled, {len(failed)} not, in {time.monotonic() - began:.0f} s", flush=True)
    for reason in sorted(set(failed))[:5]:
        print("   ", reason)
    for key, (case, form, on_load, configs) in jobs.items():
        if time.monotonic() - began > budget:
            print("out of time; the rest keeps what it had")
            break
        timed = sorted(_timed(case, form, on_load, configs), key=lambda pair: pair[0])
        if not timed:
            print(f"{key}: nothing ran")
            continue
        record("w8a8", key, asdict(timed[0][1]))
        best = ", ".join(f"{t:.1f} us {_short(config)}" for t, config in timed[:3])
        print(f"{key}: {best}; default {_default_time(timed, case, form, on_load, capability)}", flush=True)


def _timed(case: Case, form: str, on_load: bool, configs: list[Config]) -> list[tuple[float, Config]]:
    operands = Operands.of(case)
    quantized = operands.quantized(form)
    inputs = operands.inputs
    inputs = [_floats(case, x) if on_load else encoded(case, quantized, x) for x in inputs]
    results = []
    for config in configs:
        try:
            results.append((microseconds(lambda x, c=config: _product(case, quantized, x, c), inputs, 7), config))
        except Exception as error:  # too much shared memory, too many registers: not a candidate here
            print(f"    {_short(config)}: {type(error).__name__} {str(error)[:80]}")
    return results


def _floats(case: Case, x: torch.Tensor) -> torch.Tensor:
    return x if case.linear else x.permute(0, 2, 3, 1)


def _product(case: Case, operands: tuple, x: torch.Tensor, config: Config) -> torch.Tensor:
    qweight, weight_scale, bias, scale, zero = operands
    weight = prepared.prepared(qweight, "rows", lambda: w8a8_launch.weight_rows(qweight))
    sums = None
    if zero is not None:
        sums = prepared.prepared(qweight, "sums", lambda: qweight.flatten(1).sum(1, dtype=torch.int32))
    out = torch.empty(case.window.batch, *case.window.output, case.outputs, dtype=torch.bfloat16, device="cuda")
    return w8a8_triton.conv2d(
        x, case.window, weight, scale, zero, weight_scale, sums, bias, None, None, out, 8, config
    )


def _compile(job) -> str | None:
    """Run a candidate once on little: the compiled kernel stays in Triton's cache. Returns what went wrong."""
    case, form, on_load, config = job
    try:
        small = replace(case, window=replace(case.window, batch=min(16, case.window.batch)))
        operands = Operands.of(small)
        quantized, x = operands.quantized(form), operands.inputs[0]
        _product(small, quantized, _floats(small, x) if on_load else encoded(small, quantized, x), config)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{_short(config)}: {type(error).__name__} {str(error)[:120]}"
    return None


def _default_time(timed, case: Case, form: str, on_load: bool, capability) -> str:
    channels = w8a8_quantize.stored_channels(case.channels)
    plain = w8a8_configs.default(CODES[form], case.window, channels, case.outputs, capability, on_load)
    return next((f"{t:.1f} us" for t, config in timed if config == plain), "not among them")


def _short(config: Config) -> str:
    return "-".join(str(value) for value in asdict(config).values())
