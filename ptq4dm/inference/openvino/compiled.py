"""A model of OpenVINO compiled for this CPU: called with tensors of torch, and asked what its products run in."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .signal_stack import lasting_signal_stack
from .tracing import MARK, Layers

INTEGERS, FOUR_BITS = ("i8", "u8"), ("i4", "u4")
KEYS = ("layerType", "originalLayersNames", "runtimePrecision", "primitiveType")
PRODUCTS = ("Convolution", "FullyConnected", "MatMul", "Subgraph")
HINTS = {"float32": "f32", "bfloat16": "bf16"}


def installed() -> str:
    """OpenVINO's version; "" where it is not installed."""
    try:
        import openvino
    except ImportError:
        return ""
    return openvino.__version__.partition("-")[0]


def has_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16."""
    with lasting_signal_stack():
        return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _core() -> Any:
    import openvino

    return openvino.Core()


class Compiled:
    """A model for tensors of these sizes. What is no product of integers is computed in `precision`, of HINTS.

    Raises RuntimeError where OpenVINO cannot compile it.
    """

    def __init__(self, model: Any, precision: str, tensors: list[Tensor]) -> None:
        import openvino

        model = model.clone()
        if len(model.inputs) != len(tensors):
            raise RuntimeError(f"it looks at {len(model.inputs)} of {len(tensors)} tensors")
        shapes = [openvino.PartialShape(list(tensor.shape)) for tensor in tensors]
        model.reshape(dict(zip(model.inputs, shapes, strict=True)))
        options = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # inputs that the plan leaves as floats are not rounded
        }
        with lasting_signal_stack():
            self.compiled = _core().compile_model(model, "CPU", options)
            self.request = self.compiled.create_infer_request()

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Outputs that own their memory. One call at a time."""
        arrays = [tensor.detach().contiguous().numpy() for tensor in tensors]
        self.request.infer(dict(enumerate(arrays)), share_inputs=True)
        outputs = range(len(self.compiled.outputs))
        return [torch.from_numpy(self.request.get_output_tensor(i).data.copy()) for i in outputs]

    def products(self, layers: Collection[str]) -> dict[str, tuple[str, str]]:
        """Name of each of these layers -> (what its product runs in, as "u8" or "bf16", OpenVINO's kernel of it).

        It is read from the graph that is executed. Of products that unpack weights of 4 bits OpenVINO keeps no
        names: they are not in it, and counted by `unpacked`.
        """
        found: dict[str, tuple[str, str]] = {}
        for facts in self._products():
            for original in facts["originalLayersNames"].split(","):
                if original.startswith(MARK):
                    name = original.removeprefix(MARK).partition("/")[0]
                    if name not in layers:  # a layer that is called twice has two names, by numbers
                        name = name.rpartition("_")[0]
                    found[name] = facts["runtimePrecision"], facts["primitiveType"]
        return found

    def unpacked(self) -> int:
        """How many products unpack weights of 4 bits."""
        return sum(facts["runtimePrecision"] in FOUR_BITS for facts in self._products())

    def _products(self) -> list[dict[str, str]]:
        nodes = [node.get_rt_info() for node in self.compiled.get_runtime_model().get_ops()]
        facts = [{key: str(info[key].astype(str)) for key in KEYS} for info in nodes]
        return [one for one in facts if one["layerType"] in PRODUCTS]


def product_lines(layers: Layers, compiled: Compiled) -> list[str]:
    """How many quantized layers run in products of integers, by which kernels; how many do not, and why."""
    products = compiled.products(layers)
    integer = [name for name in layers if products.get(name, ("", ""))[0] in INTEGERS]
    kernels = ", ".join(sorted({products[name][1] for name in integer}))
    lines = [f"{len(integer)} of {len(layers)} quantized layers in products of int8" + (kernels and f": {kernels}")]
    if unpacked := compiled.unpacked():
        lines.append(f"{unpacked} products unpack weights of 4 bits")
    for planned, why in ((True, "though {} of integers"), (False, "as {} inputs of floats, or scales of groups")):
        floats = [name for name, (_, form) in layers.items() if name not in integer and form.integer == planned]
        if len(floats) == 1:
            lines.append(f"'{floats[0]}' runs in floats, {why.format('its plan is' if planned else 'its plan has')}")
        elif floats:
            told = why.format("their plans are" if planned else "their plans have")
            lines.append(f"{len(floats)} layers run in floats, {told}; the first is '{floats[0]}'")
    return lines
