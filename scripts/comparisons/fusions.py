"""What `ptq4dm.fuse` finds in diffusers' transformers: the table of ptq4dm/handed/README.md.

    python scripts/comparisons/fusions.py --output scripts/results/fusions.jsonl       # a CPU: some minutes
    python scripts/comparisons/fusions.py --classes WanTransformer3DModel --forms svdq

Tiny models of the real classes with random weights (scripts/sweep/classes) are quantized, fused and called twice; the
first call finds out who reads what. Kernels are taken to be there, and the ops are their reference.

    linear      quantized Linear layers
    norms       norms that are quantized with what reads them, and how many layers that is
    gates       layers that are quantized with the gated activation before them
    shared      layers beside these whose input is quantized once for several
    whole       modules fused as a whole, such as GELU in the product before it, or FLUX's blocks
    made        codes made in a step, of those that are made without fusing: one for each of these layers
    difference  from the unfused model, as a share of what quantizing costs
    compiled    whether the fused model, or each of its blocks, is one graph for torch.compile, with the same answer
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from conditions import commit
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sweep import subject  # noqa: E402
from sweep.classes.catalogue import CASES  # noqa: E402

import ptq4dm  # noqa: E402
from ptq4dm.errors import run  # noqa: E402
from ptq4dm.files.atomic import replacing  # noqa: E402
from ptq4dm.handed import gates, norms, value  # noqa: E402
from ptq4dm.inference.blocks import repeated_blocks  # noqa: E402
from ptq4dm.layers.base import is_quantized  # noqa: E402
from ptq4dm.layers.fusing import parts as fused_parts  # noqa: E402

CLASSES = {  # label of the sweep -> models that are of it
    "PixArtTransformer2DModel": "PixArt",
    "Transformer2DModel (continuous)": "SD, SDXL",
    "SD3Transformer2DModel (3.5, dual attention)": "SD 3, 3.5",
    "FluxTransformer2DModel": "FLUX.1",
    "Flux2Transformer2DModel": "FLUX.2",
    "QwenImageTransformer2DModel": "Qwen-Image",
    "ZImageTransformer2DModel": "Z-Image",
    "WanTransformer3DModel": "Wan 2.1",
    "WanTransformer3DModel (a time for each token)": "Wan 2.2, 5 B",
    "LTXVideoTransformer3DModel": "LTX-Video",
}
FORMS = {
    "svdq": lambda: ptq4dm.SVDQuantConfig(activations="int8", rank=8, num_tuples=2, smoothing=0.5, refinements=0,
                                          rounding="nearest"),
    "w8a8": lambda: ptq4dm.RTNConfig(activations="dynamic"),
    "progressive": lambda: ptq4dm.QoQConfig(rounding="nearest", group_size=32, rotation=None, smoothing="none"),
}  # fmt: skip


class Counted:
    """Takes this device for one with kernels, and counts what is read and what is made."""

    def __init__(self, count: bool = True) -> None:
        self.count = count

    def __enter__(self):
        self.reads = self.made = 0
        self.before = norms.on_kernels, fused_parts.on_kernels, value.Handed.codes_for
        norms.on_kernels = fused_parts.on_kernels = lambda _: True
        whole = self.before[2]

        def counted(handed, layer):
            before = len(handed.made)
            codes = whole(handed, layer)
            self.reads += codes is not None
            self.made += len(handed.made) - before
            return codes

        if self.count:  # which torch.compile could not trace
            value.Handed.codes_for = counted
        return self

    def __exit__(self, *error):
        norms.on_kernels, fused_parts.on_kernels, value.Handed.codes_for = self.before


def measure(label: str, form: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        case = CASES[label]
        one = subject.Subject(case, Path(folder))
        model, exact = one.model(form), one.call(one.model(subject.FLOAT))
        plain = one.call(model)
        report = ptq4dm.fuse(model)
        with Counted():
            one.call(model)  # finds out who reads what
        with Counted() as count:
            answer = one.call(model)
        with Counted(count=False):
            compiled = compiles(one, model, answer)
    found = {name: notes for name, notes in report.handed.items() if notes.settled()}
    readers = {
        name: {layer for reads in notes.readers.values() for _, layer in reads} for name, notes in found.items()
    }
    under = [name for name in found if type(model.get_submodule(name)) in norms.NORMS.values()]
    halves = [name for name in found if type(model.get_submodule(name)) in gates.GATES.values()]
    normed, gated = ({layer for name in names for layer in readers[name]} for names in (under, halves))
    shared = {layer for name in found if name not in (*under, *halves) for layer in readers[name]} - normed - gated
    whole = Counter(kind for name, kind in report.kinds.items() if name not in report.handed)
    linear = [one for one in model.modules() if isinstance(one, nn.Linear) and is_quantized(one)]
    differences = zip(answer, plain, exact, strict=True)
    return {
        "class": label, "model": CLASSES.get(label, ""), "form": form, "linear": len(linear), "norms": len(under),
        "normed": len(normed), "gates": len(gated), "shared": len(shared), "whole": dict(whole),
        "made": count.made, "read": count.reads,
        "difference": max(float((a - b).norm() / (b - c).norm()) for a, b, c in differences),
        "compiled": compiled,
    }  # fmt: skip


def compiles(one, model: nn.Module, answer: list) -> str:
    """ "yes", or the first words of what went wrong."""
    torch._dynamo.reset()
    blocks = repeated_blocks(model) or [model]
    try:
        for block in blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        found = one.call(model)
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem).splitlines()[0][:60]}"
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()
    same = all((a - b).norm() <= 1e-3 * b.norm() for a, b in zip(found, answer, strict=True))
    return "yes" if same else "another answer"


COLUMNS = ("model", "class", "linear", "norms", "gates", "shared", "whole", "made", "compiled")


def table(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        whole = ", ".join(f"{count} {kind}" for kind, count in row["whole"].items()) or "-"
        norm = f"{row['norms']} for {row['normed']}" if row["norms"] else "-"
        made = f"{row['made']} of {row['read']}" if row["read"] else "-"
        cells = [row["model"], f"`{row['class']}`", row["linear"], norm, row["gates"] or "-", row["shared"] or "-"]
        lines.append("| " + " | ".join(map(str, [*cells, whole, made, row["compiled"]])) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--classes", nargs="+", default=list(CLASSES), metavar="CLASS", help="labels of the sweep")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--output", type=Path, default=Path("out/fusions.jsonl"))
    args = parser.parse_args()
    unknown = [label for label in args.classes if label not in CASES]
    if unknown:
        raise ptq4dm.UserError(f"'{unknown[0]}' is no class of the sweep: scripts/sweep/classes has them.")
    subject.FORMATS.update(FORMS)
    rows = []
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for form in args.forms:
        for label in args.classes:
            rows.append(measure(label, form) | {"commit": commit(), "torch": torch.__version__})
            print(json.dumps(rows[-1]), flush=True)
            with replacing(args.output) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for form in args.forms:
        print(f"\n{form}\n\n" + table([row for row in rows if row["form"] == form]))


if __name__ == "__main__":
    run(main)
