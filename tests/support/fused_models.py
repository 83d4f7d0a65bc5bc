"""Fused models where no kernels are: their ops are the reference, and calls of them are counted."""

import contextlib

import torch

import denoisers
import ptq4dm
from ptq4dm.calibration.record import replay
from ptq4dm.layers.fusing import parts

DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
NAMES = {  # what is fused of denoisers.pair(kind)
    "flux": {DOUBLE, f"{DOUBLE}.ff.net.0", f"{DOUBLE}.ff_context.net.0", SINGLE},
    "dit": {f"transformer_blocks.{i}{part}" for i in range(2) for part in ("", ".ff.net.0")},
}


def take_for_served(patch):
    """Take this device for one that has kernels."""
    patch.setattr(parts, "on_kernels", lambda _: True)


@contextlib.contextmanager
def fused_here(monkeypatch, ops):
    """Take this device for one that has kernels; ops: (module, name) of those whose calls are counted. Yields their
    names as they are called."""
    seen = []

    def counted(module, name):
        op = getattr(module, name)

        def call(*args):
            seen.append(name)
            return op(*args)

        return call

    with monkeypatch.context() as patch:
        take_for_served(patch)
        for module, name in ops:
            patch.setattr(module, name, counted(module, name))
        yield seen


def adapters_are_called(model, calls, monkeypatch, ops):
    """Of a DiT: fused, with adapters on two layers of its first block, it gives the unfused answer, and the other
    block alone makes codes."""
    ptq4dm.fuse(model)
    block = model.transformer_blocks[0]
    block.attn1.to_v = denoisers.Doubled(block.attn1.to_v)
    block.ff.net[0].proj = denoisers.Doubled(block.ff.net[0].proj)
    with fused_here(monkeypatch, ops) as seen:
        answer = replay(model, calls)
    assert seen.count("svdq_codes") == 2  # the other block's
    ptq4dm.unfuse(model)
    assert (answer - replay(model, calls)).norm() < 1e-3 * answer.norm()


def cost(answer, other, exact):
    """In units of what quantizing costs."""
    return float((answer - other).norm() / (other - exact).norm())


def compiled_whole(kind, model, calls, monkeypatch):
    """(answers before, answers compiled, the ops that the compiler saw): each block, or the model, one graph."""
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    with monkeypatch.context() as patch:
        take_for_served(patch)
        eager = replay(model, calls)
        # of FLUX block by block, which diffusers finds by the names of their classes
        (model.compile_repeated_blocks if kind == "flux" else model.compile)(fullgraph=True, backend=backend)
        answer = replay(model, calls)
    torch._dynamo.reset()
    return eager, answer, seen
