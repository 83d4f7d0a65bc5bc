"""Compile the kernels ahead of time for GPUs that are not here; print registers, spills and shared memory.

    python scripts/benchmarks/compile_kernels.py [--quick] [--capability 80 89 90 100 120] [--rank 32]
        [--nonlinearity gelu_tanh]

Calls go through the op's own code on tensors without data, with the settings that kernels/tuned/ has for each compute
capability; where a kernel would be launched, it is compiled for that GPU instead. No GPU is needed. --quick compiles
each kernel once or twice, for a check of every change. Exit status 1 if one does not compile or fit, or if
there is none.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ptq4dm.kernels.attention import codes8
from ptq4dm.kernels.attention import layer8 as attention8
from ptq4dm.kernels.attention import product as attention
from ptq4dm.kernels.attention.rotary import Rotary
from ptq4dm.kernels.blocks import floats_triton
from ptq4dm.kernels.formats.kv4 import KV4
from ptq4dm.kernels.formats.nonlinearities import NONLINEARITIES
from ptq4dm.kernels.lut import layer as lut
from ptq4dm.kernels.lut import unpack as bcq_unpack
from ptq4dm.kernels.runtime import settings
from ptq4dm.kernels.shift import l1_groups, l1_rows, over_rows, rounding, turned, weight_gradient
from ptq4dm.kernels.w4 import from_codes, int4_codes_triton, integer, layer, progressive_triton
from ptq4dm.kernels.w4.int4_codes import peak
from ptq4dm.kernels.w4.int4_floats import FLOATS
from ptq4dm.kernels.w8a8 import norm, quantize, steps
from ptq4dm.kernels.w8a8.window import same_window

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes that one program may have
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "launch_pdl", "maxnreg")


def signature(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if hasattr(value, "layout"):  # Gluon's descriptor, which knows how it lies in shared memory
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
    return "fp32" if isinstance(value, float) else "i32"


def compiled(kernel: JITFunction, target: int, options: dict):
    names = [parameter.name for parameter in kernel.params]
    values = {name: options[name] for name in names}
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr or values[p.name] is None}
    types = {name: "constexpr" if name in constants else signature(values[name]) for name in names}
    aligned = [
        (index,)
        for index, name in enumerate(names)
        if types[name].startswith("*") or (types[name] == "i32" and values[name] % 16 == 0)
    ]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        kernel,
        types,
        {(names.index(name),): value for name, value in constants.items()},
        {place: [["tt.divisibility", 16]] for place in aligned},
    )
    wanted = {key: options[key] for key in OPTIONS if key in options}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=wanted)


def serialized(ptx: str, target: int) -> bool:
    """Whether ptxas says that it makes Hopper's matrix instructions wait for one another.

    Triton brings two of them, of which the older one does not read the newest PTX.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for tool in ("ptxas", "ptxas-blackwell"):
            command = [TOOLS / tool, f"-arch=sm_{target}a", "-v", file.name, "-o", "/dev/null"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return "instructions are serialized" in done.stderr
    raise RuntimeError(f"no ptxas of this Triton reads its PTX: {done.stderr.strip()}")


def resources(binary: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes it spills)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        out = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", out)
    return int(found[1]), int(found[2])


def empty(*size, dtype=torch.bfloat16):
    return torch.empty(*size, dtype=dtype, device="meta")


def svdquant_calls(capability: tuple[int, int], rank: int, nonlinearity: str, quick: bool) -> None:
    """Every step of every kernel once, of few rows and of many; codes that are handed over, normed and joined."""
    n, k = 3072, 3072
    for name in layer.MODES:
        if name == layer.FP8 and capability < (8, 9):
            continue
        for rows in (16, 4608):
            weight = [empty(n, k // 2, dtype=torch.uint8), empty(n, k // 64), empty(k)]
            branch = [empty(rank, k), empty(n, rank)] if rank and name != layer.WEIGHT_ONLY else [None, None]
            layer.rows_through(name, empty(rows, k), *weight, *branch, empty(n), 0.0, nonlinearity)
            if name == layer.WEIGHT_ONLY or (quick and rows == 16):
                continue
            scale = (empty(1, k), empty(1, k), 1e-6)
            codes = from_codes.codes_through(name, empty(rows, k), None, weight[2], branch[0], 0.0, scale)
            for form, shift in (("rms", None),) if quick else (("rms", None), ("rms", scale[1]), ("layer", scale[1])):
                norm = (empty(1, k), shift, 1e-6, form)
                from_codes.codes_through(name, empty(rows, k), None, weight[2], branch[0], 0.0, norm)
            for group in (64,) if quick else (64, 256):  # rotated, too
                rotated = (None, weight[2], branch[0], 0.0, None, "", group)
                from_codes.codes_through(name, empty(rows, k), *rotated)
                if not quick:
                    from_codes.codes_through(name, empty(rows, k), None, weight[2], None, 0.0, scale, "", group)
            for gate in ("gelu",) if quick else ("gelu", "silu"):
                halves = empty(rows, k), empty(rows, k)
                from_codes.codes_through(name, *halves, weight[2], branch[0], 0.0, None, gate)
            if not quick:
                from_codes.product_through(name, *codes, *weight[:2], branch[1], empty(n), nonlinearity)
                down = empty(rank, 5 * k) if rank else None
                from_codes.codes_through(name, empty(rows, k), empty(rows, 4 * k), empty(5 * k), down, 0.0, None)


def int4_calls(quick: bool) -> None:
    """Plain 4-bit weights: a scale a row, and groups."""
    n, k = 1152, 1152
    for groups in (k // 64, k // 128)[: 1 if quick else 2]:
        scales, zeros = empty(n, groups), empty(n, groups, dtype=torch.int8)
        layer.few_rows(empty(16, k), empty(n, k // 2, dtype=torch.uint8), scales, zeros, empty(n))
    for groups, zeros in [(1, False), (k // 32, True)] if quick else [(g, z) for g in (1, 36, 9) for z in (0, 1)]:
        scales = empty(n, groups, dtype=torch.float32 if groups == 1 else torch.bfloat16)
        wzeros = empty(n, groups, dtype=torch.int8) if zeros else None
        packed = empty(n, k // 2, dtype=torch.uint8), scales, wzeros, k
        int4_codes_triton.int4_codes(*packed, peak(wzeros))
        for dtype in (torch.bfloat16,) if quick else FLOATS:
            int4_codes_triton.int4_floats(*packed, dtype)


def block_calls(quick: bool) -> None:
    """Weights in blocks: of 4 bits with offsets, and of 8 without."""
    n, k = 1152, 1152
    for packed in (True, False):
        codes = empty(n, k // 2, dtype=torch.uint8) if packed else empty(n, k, dtype=torch.int8)
        scales = empty(n, k // 32, dtype=torch.float32)
        for dtype in (torch.bfloat16,) if quick else FLOATS:
            floats_triton.floats(codes, scales, scales if packed else None, 0, k, dtype)


def attention_calls(quick: bool) -> None:
    """Queries of an image over a prompt, and of a video over a longer one with padding."""
    for rows, tokens, width in [(4096, 77, 40), (4096, 300, 72)] if quick else [
        (4096, 77, 40), (1024, 77, 64), (4096, 300, 72), (16384, 512, 128)
    ]:  # fmt: skip
        grid = empty(2, 16, tokens), empty(2, 16, tokens)
        kv = KV4(empty(2, 16, tokens, width // 2, dtype=torch.uint8), *grid)
        mask = empty(2, 16, 1, tokens, dtype=torch.float32) if tokens > 77 else None
        attention.attention(empty(2, rows, 16, width).transpose(1, 2), kv, kv, mask, width**-0.5)


def attention8_calls(capability: tuple[int, int], quick: bool) -> None:
    """Attention on 8-bit operands of FLUX, of smaller heads, and of a video."""
    if capability < (8, 9):
        return
    for kind, width in (("int8", 128),) if quick else (("int8", 128), ("e4m3", 128), ("int8", 64), ("e4m3", 40)):
        q = empty(1, 4608, 24, width).transpose(1, 2)
        attention8.through(attention8.kernel_name(torch.device("cuda"), width), q, q, q, width**-0.5, kind)
        long = empty(1, 32760, 40, width).transpose(1, 2)
        attention8.through(attention8.kernel_name(torch.device("cuda"), width), long, long, long, width**-0.5, kind)
        norm, places = empty(width), empty(9216, width, dtype=torch.float32)
        for words in (None, (q, q, q, norm, norm)):
            codes8.quantize8(q, q, q, 0.1, torch.int8, rotary=Rotary(norm, norm, places, places, 1e-6, words))


def integer_calls(quick: bool) -> None:
    """Progressive and grouped weights, and rows of two widths, of few rows and of many; a scale a row, and groups."""
    n, k = 3072, 3072
    int8 = functools.partial(empty, dtype=torch.int8)
    qweight, channel = empty(n, k // 2, dtype=torch.uint8), empty(n, dtype=torch.float32)
    for rows in (16, 4608):
        for size in (128,) if quick else (k, 128, 64, 32):
            groups = n, k // size
            zeros = None if size == 64 else int8(*groups)
            tokens = integer.tokens_through(empty(rows, k))
            operands = qweight, int8(*groups), zeros, channel, empty(n)
            integer.progressive_through(empty(rows, k), *operands)
            integer.progressive_of_tokens(*tokens, *operands, k, torch.bfloat16, "gelu_tanh")
            integer.grouped_through(empty(rows, k), qweight, empty(*groups), zeros, empty(n))
            if groups[1] > 1:
                outputs, wide = n - 192, 192
                mixed = empty(outputs, groups[1]), None if zeros is None else int8(outputs - wide, groups[1])
                index = empty(wide, dtype=torch.int32)
                integer.row_mix_through(empty(rows, k), qweight, *mixed, index, empty(outputs))
        zeros = None if rows == 16 else int8(n, 1)
        integer.grouped_through(empty(rows, k), qweight, channel[:, None], zeros, None)
    progressive_triton.codes(qweight, int8(n, k // 128), int8(n, k // 128), k // 128, k, int8(n, k))
    codebook_calls(quick)


def codebook_calls(quick: bool) -> None:
    """Levels of a codebook, of the whole weight and of each output: looked up in the products, and unpacked."""
    n, k = 3072, 3072
    qweight = empty(n, k // 2, dtype=torch.uint8)
    for tables, size in [(1, 128), (n, k)] if quick else [(t, size) for t in (1, n) for size in (k, 128, 64, 32)]:
        levels, scales = empty(tables, 16, dtype=torch.int8), empty(n, k // size)
        for rows in (16, 4608):
            integer.grouped_through(empty(rows, k), qweight, scales, None, empty(n), levels=levels)
        progressive_triton.codes(qweight, None, None, 1, k, empty(n, k, dtype=torch.int8), levels)
        int4_codes_triton.int4_codes(qweight, scales, None, k, 1.0, levels)
        int4_codes_triton.int4_floats(qweight, scales, None, k, torch.bfloat16, levels)
        for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16):
            half = empty(n, k // 64, dtype=dtype)
            layer.few_rows(empty(16, k, dtype=dtype), qweight, half, None, empty(n), levels)


def lut_calls(quick: bool) -> None:
    """Binary-coded weights by look-ups and by planes, of few rows and of many; a row in one group, and offsets."""
    n, k = 3072, 3072
    cases = [(3, 128, False)] if quick else [(q, size, z) for q in (2, 3, 4) for size in (k, 128, 32) for z in (0, 1)]
    for bits, size, offsets in cases:
        words, groups = empty(n // 64, k // 32, bits, 64, dtype=torch.int32), k // size
        alphas = empty(n // 64, groups, bits, 64, dtype=torch.float16)
        weight = words, alphas, empty(n // 64, groups, 64, dtype=torch.float16) if offsets else None
        for rows in (1, 16):
            for product in (lut.looked_up, lut.by_planes):
                product(empty(rows, k), *weight, empty(n), n)
        bcq_unpack.unpacked(*weight, n, k, torch.bfloat16)


def w8a8_calls(capability: tuple[int, int], quick: bool) -> None:
    """Linear layers and 3x3 convolutions, static and dynamic; a norm that hands over codes."""
    n = c = 256
    static = empty(1, dtype=torch.float32), empty(1, dtype=torch.int32)
    for form in (torch.int8, torch.float8_e4m3fn):
        if form != torch.int8 and capability < (8, 9):
            continue
        grid = static if form == torch.int8 else (static[0], None)
        scale, bias = empty(n, dtype=torch.float32), empty(n)
        steps.triton_conv2d(
            empty(128, c, 32, 32), empty(n, c, 3, 3, dtype=form), scale, bias, *grid, 8, (1, 1), (1, 1), (1, 1), 1
        )
        steps.triton_linear(empty(4608, c), empty(64, c, dtype=form), scale[:64], bias[:64], *grid, 8)  # on load
        if not quick:
            wide = empty(2048, c, dtype=form), empty(2048, dtype=torch.float32), None  # Gluon's kernel, on Hopper
            steps.triton_linear(empty(4608, c), *wide, *grid, 8)
            window = same_window(4608, 1, 1)
            layer8 = steps.Parameters(*wide, scale[:1], None)
            steps.multiply(empty(4608, c, dtype=form), window, layer8, torch.bfloat16, nonlinearity="gelu")
            for inputs in (grid, (None, None)):
                steps.triton_linear(empty(4608, c), empty(n, c, dtype=form), scale, bias, *inputs, 8)
                steps.triton_linear(empty(16, c), empty(n, c, dtype=form), scale, bias, *inputs, 8)
            window = same_window(64, 16, 16, (3, 3), (1, 1), (1, 1), (1, 1))
            codes = quantize.quantize(empty(64, c, 8, 8), *grid, 8, form, (1, 1), 2)
            layer8 = steps.Parameters(empty(n, c, 3, 3, dtype=form), scale, bias, *grid)
            steps.multiply(codes, window, layer8, torch.bfloat16, empty(64, n), empty(64, 16, 16, n))
        else:
            steps.triton_linear(empty(4608, c), empty(n, c, dtype=form), scale, bias, None, None, 8)
        image = empty(64, 32, 32, c)
        norm.group_norm_quantize(image, empty(c), empty(c), 32, 1e-5, True, *grid, 8, form, (1, 1))
    norm.group_norm(image, empty(c), empty(c), 32, 1e-5, True)
    parts = {"factors": empty(c, dtype=torch.float32), "offsets": empty(c, dtype=torch.float32)}
    zero = empty(1, dtype=torch.int32)
    quantize.quantize(empty(64, c, 8, 8), scale[:1], zero, 8, torch.int8, (1, 1), **parts)


def shift_calls(quick: bool) -> None:
    """Tensors in codes, of images and of tokens, and what is summed over rows: both ways to a weight's gradient."""
    for size, c, n, kernel in (
        [(32, 128, 128, 3)] if quick else [(32, 128, 128, 3), (16, 3, 128, 3), (1, 256, 1024, 1)]
    ):
        padding = (kernel // 2, kernel // 2)
        window = same_window(128, size, size, (kernel, kernel), (1, 1), padding, (1, 1))
        gradient, x = (empty(128, size, size, channels, dtype=torch.int8) for channels in (n, c))
        weight_gradient.weight_gradient(gradient, x, window)
        inputs, seed = empty(128, size, size, c, dtype=torch.float32), empty((), dtype=torch.int64)
        x = rounding.encode_images(inputs, 6, 3, padding, None)
        d = rounding.encode_images(empty(128, size, size, n), 6, 3, padding, seed)
        pixels = turned.turn_pixels(x.flat, x.h, x.g, 3, window)
        gradient = turned.turn_gradient(d.flat, d.h, d.g, 3, window)
        over_rows.weight_gradient(gradient, pixels, d.column_steps, x.column_steps, window)
        rounding.encode_weight(empty(n, kernel, kernel, c, dtype=torch.float32), 6, 3)
    for kernels, shape, number in [(l1_groups, (128, 1024, 128), 32), (l1_rows, (32768, 1, 256), 1)] + (
        [] if quick else [(l1_groups, (8, 4096, 320), 32), (l1_rows, (4096, 1, 3072), 1)]
    ):
        x, gamma, seed = empty(*shape), empty(shape[2], dtype=torch.float32), empty((), dtype=torch.int64)
        _, codes, stats = kernels.normalize(x, gamma, gamma, number, 1e-3, 1.25)
        kernels.gradient(x, codes, stats, gamma, seed)


def compile_for(target: int, rank: int, nonlinearity: str, quick: bool) -> list[tuple[str, str]]:
    """(line, problem or "") of every kernel; lines are printed as they come."""
    found = []

    def compile_instead(kernel, options):
        line, problem = f"sm_{target}  {kernel.fn.__name__:20}", ""
        try:
            binary = compiled(kernel, target, options)
        except Exception as error:
            problem = f"  DOES NOT COMPILE: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
        else:
            registers, spilled = resources(binary.asm["cubin"])
            line += f" {registers:4} registers {spilled:5} bytes spilled {binary.metadata.shared:7} bytes shared"
            problem += "  DOES NOT FIT" * (binary.metadata.shared > SHARED[target])
            if "\ttrap;" in binary.asm["ptx"]:  # what ptxas makes of too much tensor memory on Blackwell
                problem += "  COMPILES TO A TRAP"
            if target == 90 and serialized(binary.asm["ptx"], target):
                problem += "  MATRIX INSTRUCTIONS SERIALIZED"
        found.append((line + problem, problem))
        print(line + problem, flush=True)

    gpu = settings.Target(divmod(target, 10), 132, compile_instead)
    with settings.target(gpu):
        svdquant_calls(gpu.capability, rank, nonlinearity, quick)
        int4_calls(quick)
        block_calls(quick)
        attention_calls(quick)
        attention8_calls(gpu.capability, quick)
        integer_calls(quick)
        lut_calls(quick)
        w8a8_calls(gpu.capability, quick)
        shift_calls(quick)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capability", type=int, nargs="+", choices=list(SHARED), default=[80, 89, 90, 100, 120])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--nonlinearity", choices=list(NONLINEARITIES), default="")
    parser.add_argument("--quick", action="store_true", help="each kernel once or twice")
    args = parser.parse_args()
    if not isinstance(quantize._quantize_kernel, JITFunction):
        sys.exit("kernels are interpreted, not compiled, where TRITON_INTERPRET is set; unset it.")
    began = time.monotonic()
    work = functools.partial(compile_for, rank=args.rank, nonlinearity=args.nonlinearity, quick=args.quick)
    with ProcessPoolExecutor(min(len(args.capability), os.cpu_count() or 1)) as pool:
        of_each = list(pool.map(work, args.capability))
    found = [one for every in of_each for one in every]
    wrong = [line for line, problem in found if problem]
    wrong += [
        f"sm_{name}  NOTHING COMPILED" for name, every in zip(args.capability, of_each, strict=True) if not every
    ]
    print(f"{len(found)} kernels, {len(wrong)} of them wrong, {time.monotonic() - began:.0f} s")
    print("\n".join(wrong), end="\n" * bool(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
