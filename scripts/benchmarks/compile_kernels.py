"""Compile SVDQuant's kernels ahead of time for GPUs that are not here; print registers, spills and shared memory.

    python scripts/benchmarks/compile_kernels.py [--capability 80 89 90 100 120] [--rank 32]
        [--nonlinearity gelu_tanh]

Calls go through the op's own code on tensors without data, with the settings that kernels/tuned/ has for each compute
capability; where a kernel would be launched, it is compiled for that GPU instead. Exit status 1 if one does not fit.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ptq4dm.kernels.runtime import hopper
from ptq4dm.kernels.runtime import settings as tuning
from ptq4dm.kernels.runtime.launch import Launch
from ptq4dm.kernels.w4 import from_codes as svdq_codes
from ptq4dm.kernels.w4 import layer as svdq_linear
from ptq4dm.kernels.w4 import product_w4a4 as svdq_w4a4
from ptq4dm.kernels.w4 import product_w4a4_hopper as svdq_w4a4_hopper
from ptq4dm.kernels.w4 import product_w4a8 as svdq_gemm
from ptq4dm.kernels.w4 import product_w4a8_hopper as svdq_w4a8_hopper
from ptq4dm.kernels.w4 import reference as svdq

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes that one program may have
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32",
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
    """Whether ptxas says that it makes Hopper's matrix instructions wait for one another."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [TOOLS / "ptxas", f"-arch=sm_{target}a", "-v", file.name, "-o", "/dev/null"]
        return "instructions are serialized" in subprocess.run(command, capture_output=True, text=True).stderr


def resources(binary: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes it spills)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        out = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", out)
    return int(found[1]), int(found[2])


def calls(rank: int, nonlinearity: str) -> None:
    """Every step of every kernel once, of few rows and of many; codes that are handed over, normed and joined."""
    n, k = 3072, 3072

    def empty(*size, dtype=torch.bfloat16):
        return torch.empty(*size, dtype=dtype, device="meta")

    for name in svdq_linear.MODES:
        fp8 = name == svdq_linear.FP8
        if fp8 and tuning.capability(torch.device("meta")) < (8, 9):
            continue
        for rows in (16, 4608):
            layer = [empty(n, k // 2, dtype=torch.uint8), empty(n, k // 64), empty(k)]
            branch = [empty(rank, k), empty(n, rank)] if rank and name != svdq_linear.WEIGHT_ONLY else [None, None]
            svdq_linear.rows_through(name, empty(rows, k), *layer, *branch, empty(n), 0.0, nonlinearity)
        if name != svdq_linear.WEIGHT_ONLY:
            norm = (empty(1, k), empty(1, k), 1e-6)
            codes = svdq_codes.codes_through(name, empty(rows, k), None, layer[2], branch[0], 0.0, norm)
            svdq_codes.product_through(name, *codes, *layer[:2], branch[1], empty(n), nonlinearity)
            down = empty(rank, 5 * k) if rank else None
            svdq_codes.codes_through(name, empty(rows, k), empty(rows, 4 * k), empty(5 * k), down, 0.0, None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capability", type=int, nargs="+", choices=list(SHARED), default=[80, 89, 90, 100, 120])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--nonlinearity", choices=list(svdq.NONLINEARITIES), default="")
    args = parser.parse_args()
    failed = False
    for target in args.capability:

        def compile_instead(kernel, grid=None, warmup=None, target=target, **options):
            nonlocal failed
            binary = compiled(kernel, target, options)
            registers, spilled = resources(binary.asm["cubin"])
            problem = "  DOES NOT FIT" * (binary.metadata.shared > SHARED[target])
            problem += "  COMPILES TO A TRAP" * (
                "\ttrap;" in binary.asm["ptx"]
            )  # too much tensor memory on Blackwell
            if target == 90 and serialized(binary.asm["ptx"], target):
                problem += "  MATRIX INSTRUCTIONS SERIALIZED"
            failed |= bool(problem)
            print(
                f"sm_{target}  {kernel.fn.__name__:20} {registers:4} registers {spilled:5} bytes spilled "
                f"{binary.metadata.shared:7} bytes shared{problem}",
                flush=True,
            )

        JITFunction.run = compile_instead
        Launch.__call__ = lambda launch, *tensors: launch.through_triton(tensors)  # the rest asks a GPU
        tuning.forget()
        for module in (tuning, svdq_linear, hopper):
            module.capability = lambda device, target=target: divmod(target, 10)
        for module in (svdq_gemm, svdq_w4a4, svdq_w4a4_hopper, svdq_w4a8_hopper):
            module.multiprocessors = lambda device: 132
        calls(args.rank, args.nonlinearity)
    sys.exit(failed)


if __name__ == "__main__":
    main()
