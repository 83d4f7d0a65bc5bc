"""A denoiser as a model of OpenVINO: traced by torch, with each quantized layer as its form (forms.py).

Nothing is rounded anew: the constants of the model are the layers' own codes and scales. OpenVINO knows a product of
integers by what it finds around it,

    FakeQuantize(x; low, high, levels) -> MatMul or Convolution <- Multiply(Convert(int8 codes), scales)

and that is what the two operations, which stand for them while torch traces, are turned into.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ...layers.base import is_quantized
from .forms import Form, Weight, form_of

MARK = "ptq4dm:"
"""What the names of products begin with in OpenVINO's graphs; the name of the layer follows."""

Layers = dict[str, tuple[nn.Module, Form]]
_served: ContextVar[list[tuple[nn.Module, Form]]] = ContextVar("served")

LIBRARY = torch.library.Library("ptq4dm_traced", "DEF")
LIBRARY.define("grid(Tensor x, float low, float high, int levels) -> Tensor")
LIBRARY.define("product(Tensor x, int index) -> Tensor")


def _grid(x: Tensor, low: float, high: float, levels: int) -> Tensor:
    step = (high - low) / (levels - 1)
    return torch.round((x.clamp(low, high) - low) / step) * step + low


def _product(x: Tensor, index: int) -> Tensor:
    layer, form = _served.get()[index]
    weight = form.weight.dequantized()
    if weight.ndim == 4:
        return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.linear(x, weight)


LIBRARY.impl("grid", _grid, "CompositeExplicitAutograd")
LIBRARY.impl("product", _product, "CompositeExplicitAutograd")


def served_layers(model: nn.Module) -> Layers:
    """Name -> (layer, its form), of all quantized layers. Raises UserError, naming them, for those without one."""
    found: Layers = {}
    refused = []
    for name, layer in model.named_modules():
        if not is_quantized(layer):
            continue
        try:
            found[name] = layer, form_of(layer)
        except ValueError as error:
            refused.append(f"'{name}' {error}")
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise UserError(f"OpenVINO cannot serve this model: layer {refused[0]}{more}; run it by its own kernels.")
    return found


@contextmanager
def as_forms(layers: Layers) -> Iterator[None]:
    """The layers compute by their forms meanwhile."""
    token = _served.set(list(layers.values()))
    try:
        for index, (layer, form) in enumerate(layers.values()):
            layer.forward = _forward(index, form)
        yield
    finally:
        for layer, _ in layers.values():
            vars(layer).pop("forward", None)
        _served.reset(token)


def _forward(index: int, form: Form) -> Callable[[Tensor], Tensor]:
    ops = torch.ops.ptq4dm_traced

    def forward(input: Tensor) -> Tensor:
        return form.forward(input, ops.grid, lambda x: ops.product(x, index))

    return forward


class Traced(nn.Module):
    """A model as a function of tensors alone that gives a tuple of tensors."""

    def __init__(self, model: nn.Module, call: Callable[[list[Tensor]], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.call(list(tensors))


def converted(
    model: nn.Module, layers: Layers, call: Callable[[list[Tensor]], tuple[Tensor, ...]], tensors: list[Tensor]
) -> Any:
    """The openvino.Model of call(tensors), which runs the model. RuntimeError where OpenVINO or torch cannot."""
    import openvino
    from openvino.frontend.pytorch import ConversionExtension

    numbered = [(name, *one) for name, one in layers.items()]
    extensions = [
        ConversionExtension("ptq4dm_traced::grid", _grid_node),
        ConversionExtension("ptq4dm_traced::product", lambda context: _product_node(context, numbered)),
    ]
    with as_forms(layers), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # sizes are a conversion's own
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, by which OpenVINO traces
        traced = Traced(model, call).eval()
        try:
            return openvino.convert_model(traced, example_input=tuple(tensors), extension=extensions)
        except Exception as error:  # OpenVINO's own are of several classes, that it does not show
            raise RuntimeError(str(error)) from error


def _grid_node(context: Any) -> Any:
    import numpy as np
    from openvino import opset13 as opset

    low, high, levels = (context.get_values_from_const_input(i) for i in (1, 2, 3))
    low, high = (opset.constant(np.array(end, np.float32)) for end in (low, high))
    return opset.fake_quantize(context.get_input(0), low, high, low, high, levels).outputs()


def _product_node(context: Any, layers: list[tuple[str, nn.Module, Form]]) -> Any:
    from openvino import opset13 as opset

    x, (name, layer, form) = context.get_input(0), layers[context.get_values_from_const_input(1)]
    weight = _weight_node(form.weight)
    if form.weight.codes.ndim == 4:
        stride, padding, dilation = (list(one) for one in (layer.stride, layer.padding, layer.dilation))
        if layer.groups > 1:
            count, channels, *window = form.weight.codes.shape
            shape = [layer.groups, count // layer.groups, channels, *window]
            weight = opset.reshape(weight, opset.constant(shape), False)
            node = opset.group_convolution(x, weight, stride, padding, padding, dilation)
        else:
            node = opset.convolution(x, weight, stride, padding, padding, dilation)
    else:
        node = opset.matmul(x, weight, False, True)
    node.set_friendly_name(MARK + name)
    return node.outputs()


def _weight_node(weight: Weight) -> Any:
    """scales (codes - zeros), with codes as stored: 4 bits where the codes have no more."""
    import numpy as np
    import openvino
    from openvino import opset13 as opset

    codes, (outputs, groups) = weight.codes, weight.scales.shape
    shape = list(codes.shape)
    tail = [1] * (len(shape) - 1)
    if groups > 1:
        shape, tail = [outputs, groups, shape[1] // groups], [groups, 1]
    kind = {4: openvino.Type.i4, 8: openvino.Type.i8}[weight.bits]
    node = opset.constant(codes.numpy().reshape(shape), kind)
    node = opset.convert(node, "f32")
    if weight.zeros is not None:
        zeros = opset.constant(weight.zeros.numpy().astype(np.int8).reshape(outputs, *tail))
        node = opset.subtract(node, opset.convert(zeros, "f32"))
    node = opset.multiply(node, opset.constant(weight.scales.numpy().astype(np.float32).reshape(outputs, *tail)))
    if groups > 1:
        node = opset.reshape(node, opset.constant(list(codes.shape)), False)
    return node
