"""torchao's and GemLite's linear layers beside ours, where they are installed.

torchao 0.18: fp8 by rows with the input quantized at run time (compiled by torch, which fuses that), int4 weights in
groups of 64 through tinygemm. GemLite 0.6: fp8 by rows likewise, int4 weights in groups of 64, autotuned by itself.
None has a low-rank branch. What does not build, run or come near to the bf16 product is left out, and told.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from bench_common import error
from torch import nn
from torch.nn import functional as F

from ptq4dm.kernels.formats import int4
from ptq4dm.kernels.tuning.stopwatch import graph_of

GROUP_SIZE = 64
LIMIT = 0.3  # relative error: rounding to 4 bits without smoothing has 0.1 to 0.2


def linear_of(one) -> nn.Linear:
    n, k = one.weight.shape
    layer = nn.Linear(k, n, device="meta")
    layer.weight, layer.bias = (nn.Parameter(t.clone(), requires_grad=False) for t in (one.weight, one.bias))
    return layer


def torchao_layers(sets: list, config, compiled: bool) -> list[Callable]:
    from torchao.quantization import quantize_

    product = (
        torch.compile(lambda x, weight, bias: F.linear(x, weight, bias), dynamic=False) if compiled else F.linear
    )
    calls = []
    for one in sets:
        model = nn.Sequential(linear_of(one))
        quantize_(model, config)
        if type(model[0].weight.data) is torch.Tensor:
            raise ValueError(f"torchao left the weight {list(one.weight.shape)} as it was")
        calls.append(functools.partial(product, one.x, model[0].weight, model[0].bias))
    return calls


def torchao_fp8(sets: list) -> list[Callable]:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    return torchao_layers(sets, config, compiled=True)


def torchao_int4(sets: list) -> list[Callable]:
    from torchao.quantization import Int4WeightOnlyConfig

    config = Int4WeightOnlyConfig(
        group_size=GROUP_SIZE, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )
    return torchao_layers(sets, config, compiled=False)


def gemlite_fp8(sets: list) -> list[Callable]:
    from gemlite.helper import A8W8_fp8_dynamic

    build = A8W8_fp8_dynamic(device=sets[0].x.device, dtype=torch.bfloat16)
    return [functools.partial(build.from_linear(linear_of(one)), one.x) for one in sets]


def gemlite_int4(sets: list) -> list[Callable]:
    """GemLite's weights are (code - zero) scale with codes of 0..15."""
    from gemlite.helper import A16W4_HQQ_INT

    build = A16W4_HQQ_INT(device=sets[0].x.device, dtype=torch.bfloat16)
    calls = []
    for one in sets:
        codes, scales = int4.quantize_groups(one.weight, GROUP_SIZE, torch.bfloat16)
        layer = build.from_weights((codes + 8).to(torch.uint8), scales, torch.full_like(scales, 8), one.bias)
        calls.append(functools.partial(layer, one.x))
    return calls


BUILDERS = {
    "torchao fp8": torchao_fp8,
    "torchao int4": torchao_int4,
    "gemlite fp8": gemlite_fp8,
    "gemlite int4": gemlite_int4,
}


def installed(sets: list) -> dict[str, list[Callable]]:
    """name -> calls, one for each set, of those that are installed and right."""
    found = {}
    for name, build in BUILDERS.items():
        try:
            calls = build(sets)
            graph_of(calls[:1])
            distance = error(calls[0](), F.linear(sets[0].x, sets[0].weight, sets[0].bias))
        except ModuleNotFoundError as problem:
            if problem.name != name.split()[0]:  # of its own modules, one is missing
                print(f"    left out: {name}: {problem}")
        except Exception as problem:
            print(f"    left out: {name}: {type(problem).__name__} {str(problem)[:200]}")
        else:
            if distance < LIMIT:
                found[name] = calls
            else:
                print(f"    left out: {name}: its relative error is {distance:.2f}")
    return found
