"""What a step of the grouped W4A8 product's loop does, in the order of the compiled instructions, and how much of it.

    python scripts/benchmarks/loop_order.py [--rows 4096] [--layer 3072,3072]

The kernel is compiled for Hopper with the setting that is shipped, and disassembled; no GPU is needed. Printed is the
loop that has the matrix instructions: runs of one kind of work, and how many programs' registers fit on one
multiprocessor, which has 65,536. What stands behind the wait for the products of a program does not run beside them,
but beside those of the other programs there. This is an order, and no time: bench_overlap.py has times of the parts.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile

import torch
import triton
from compile_kernels import TOOLS, compiled, empty, resources
from triton.runtime.jit import JITFunction

from ptq4dm.errors import UserError, run
from ptq4dm.kernels.runtime import settings
from ptq4dm.kernels.w4 import integer
from ptq4dm.kernels.w4.products import product_grouped

REGISTERS = 65536  # of a multiprocessor
KINDS = {
    "LOP3": "unpacking", "PRMT": "unpacking", "IGMMA": "product", "UTMALDG": "load of a later step",
    "I2FP": "conversion", "I2F": "conversion", "FFMA": "multiply-add", "WARPGROUP.DEPBAR": "wait for products",
}  # fmt: skip


def instructions(listing: str) -> tuple[list[str], dict[str, int]]:
    """(instructions without their predicates, label -> number of the instruction behind it) of a disassembly."""
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(found)
        elif one := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?\s*(.*?);", line):
            found.append(one[1].strip())
    return found, labels


def loop(listing: str) -> list[str]:
    """The shortest loop around all matrix instructions. Raises UserError where there is none."""
    found, labels = instructions(listing)
    products = [number for number, one in enumerate(found) if "MMA." in one.split()[0]]
    jumps = [
        (labels[jump[1]], number)
        for number, one in enumerate(found)
        if (jump := re.match(r"BRA.*?(\.L\w+)", one)) and labels.get(jump[1], number) < number
    ]
    around = [(start, end) for start, end in jumps if products and start <= products[0] and products[-1] <= end]
    if not around:
        raise UserError("the listing has no loop with matrix instructions.")
    start, end = min(around, key=lambda ends: ends[1] - ends[0])
    return found[start : end + 1]


def order(steps: list[str]) -> list[tuple[str, int]]:
    """(kind of work, instructions) one after the other; kinds that are not named are left out, and end no run."""
    runs: list[tuple[str, int]] = []
    for one in steps:
        name = one.split()[0]
        kind = KINDS.get(".".join(name.split(".")[:2]), KINDS.get(name.split(".")[0]))
        if kind is None:
            continue
        if runs and runs[-1][0] == kind:
            runs[-1] = kind, runs[-1][1] + 1
        else:
            runs.append((kind, 1))
    return runs


def listing_of(rows: int, outputs: int, inputs: int) -> tuple[str, int, int]:
    """(disassembly, registers of a thread, threads of a program) of the grouped product."""
    found = []

    def instead(kernel: JITFunction, options: dict) -> None:
        if kernel is product_grouped._grouped_kernel:
            binary = compiled(kernel, 90, options).asm["cubin"]
            found.append((binary, resources(binary)[0], 32 * options["num_warps"]))

    groups = outputs, inputs // 128
    weight = empty(outputs, inputs // 2, dtype=torch.uint8), empty(*groups), empty(*groups, dtype=torch.int8)
    with settings.target(settings.Target((9, 0), 132, instead)):
        integer.grouped_through(empty(rows, inputs), *weight, None)
    binary, registers, threads = found[0]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    return done.stdout, registers, threads


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--layer", default="3072,3072", help="N,K: K a multiple of 128")
    args = parser.parse_args(words)
    outputs, _, inputs = args.layer.partition(",")
    if not (outputs.isdecimal() and inputs.isdecimal() and int(outputs) and int(inputs) and int(inputs) % 128 == 0):
        raise UserError(f"--layer is N,K, K a multiple of 128, such as 3072,3072; got '{args.layer}'.")
    if args.rows < 1:
        raise UserError(f"--rows must be 1 or more, not {args.rows}.")
    if not isinstance(product_grouped._grouped_kernel, JITFunction):
        raise UserError("kernels are interpreted, not compiled, where TRITON_INTERPRET is set; unset it.")
    listing, registers, threads = listing_of(args.rows, int(outputs), int(inputs))
    steps = loop(listing)
    print(f"Triton {triton.__version__}, sm_90: {len(steps)} instructions a step, {registers} registers a thread,")
    print(f"{threads} threads a program: registers for {REGISTERS // (registers * threads)} on a multiprocessor")
    for kind, count in order(steps):
        print(f"{count:5} {kind}")


if __name__ == "__main__":
    run(main)
