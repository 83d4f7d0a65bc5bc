"""What `bench_kernels.py --tune` does: settings are compiled, in several processes at once, tried by running and
timed; the best go to kernels/tuned/."""

from __future__ import annotations

import functools
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import torch
from bench_common import operands, over, race
from bench_settings import settings_of

from ptq4dm.kernels import svdq_activation, svdq_gemm, svdq_unpack, svdq_w4a4, w4a16
from ptq4dm.kernels.svdq_linear import INT4, code_dtype, kernel_name, steps
from ptq4dm.kernels.tuning import best_config, record


def state_for(one, activation: str) -> SimpleNamespace:
    """Room for what the launches of one call hand to one another."""
    name = kernel_name(one.x.device, activation, 64)
    dtype = one.x.dtype if activation == "none" else code_dtype(name, one.x.device)
    rows = svdq_activation.empty_activation(one.x, activation, 0 if one.down is None else len(one.down), dtype)
    return SimpleNamespace(
        name=name,
        mode=activation,
        rows=(one.x, None, None) if activation == "none" else rows,
        weight=svdq_unpack.empty_weight(one.qweight, dtype, activation),
        out=one.x.new_empty(len(one.x), len(one.qweight)),
    )


def run(step: str, one, setting: dict | None, state) -> None:
    """One launch of a call; what those before it left is in `state`."""
    rows = (one.x, one.smooth, one.down, state.mode, 0.0, state.rows)
    if step == "prepare":
        svdq_unpack.prepare(*rows, one.qweight, one.wscales, state.weight, setting)
    elif step == "activation":
        svdq_activation.quantize_activation(*rows, setting)
    elif step == "unpack":
        svdq_unpack.unpack(one.qweight, one.wscales, state.weight, state.mode, setting)
    elif step == "product":
        product = svdq_w4a4.product if state.name == INT4 else svdq_gemm.product
        product(state.rows, state.weight, one.up, one.bias, state.out, setting)
    elif step == "short":
        codes, scale, branch = state.rows
        w4a16.short_product(codes, scale, one.qweight, one.wscales, branch, one.up, one.bias, state.out, setting)
    else:
        torch.nn.functional.linear(one.x, state.weight[0], one.bias)


def chosen(one, activation: str) -> dict[str, dict | None]:
    """step -> its settings, of the launches of one call."""
    sizes = (one.x.device, len(one.x), len(one.qweight), one.x.shape[1])
    name = kernel_name(one.x.device, activation, 64)
    return {
        step: None if step == "cublas" else best_config(f"{activation}.{step}", *sizes)
        for step in steps(name, len(one.x))
    }


def tune(sets: list, activation: str) -> None:
    """Time every setting on the shape of `sets`; put the best of each launch into the file of this GPU."""
    one, sizes = sets[0], [len(sets[0].x), len(sets[0].qweight), sets[0].x.shape[1]]
    state = state_for(one, activation)
    for step, setting in chosen(one, activation).items():
        if setting is None:
            continue
        timed = []
        for setting in compiled(one, activation, step, settings_of(step, state.name, sizes[0], sizes[2])):
            calls = over(sets, lambda one, step=step, setting=setting: run(step, one, setting, state))
            timed.append((race({"": calls}, 5)[""], setting))
        if not timed:
            raise SystemExit(f"no setting of {step} runs on this GPU")
        timed.sort(key=lambda pair: pair[0])
        for microseconds, setting in timed[:4]:
            print(f"    {step} {microseconds:7.1f} us  {json.dumps(setting)}", flush=True)
        record(f"{activation}.{step}", sizes, timed[0][1])


def compiled(one, activation: str, step: str, settings: list[dict]) -> list[dict]:
    """Those settings that compile and run here, tried in other processes, which leave them in Triton's cache."""
    sizes = (len(one.x), len(one.qweight), one.x.shape[1], 0 if one.down is None else len(one.down))
    answers = pool().map(try_one, [(sizes, activation, step, setting) for setting in settings])
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
    sizes, activation, step, setting = task
    try:
        one, state = _here(sizes, activation)
        run(step, one, setting, state)
        torch.cuda.synchronize()
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem).splitlines()[0][:120]}"
    return ""
