"""LayerView: what a quantization method sees of a model's Linear and Conv2d layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .modules import is_quantized


@dataclass
class LayerView:
    """One layer as a matrix product Y[M, N] = X[M, K] W[N, K]^T.

    role: "first" (reads the model's input channels), "last" (writes its output channels) or "inner".
    """

    name: str
    module: nn.Module
    role: str = "inner"

    @property
    def weight(self) -> Tensor:
        """W [N, K]: a convolution's rows are its output channels, K = C/groups * kh * kw."""
        return self.module.weight.flatten(1)


def find_layers(model: nn.Module, skip: Sequence[str] = ()) -> list[LayerView]:
    """The layers that can be quantized, in the model's own order.

    skip: names or shell patterns (`*.to_q`) of modules to leave out, with everything below them.
    """
    views = []
    for name, module in model.named_modules():
        if type(module) not in (nn.Linear, nn.Conv2d) or is_quantized(module) or _matches(name, skip):
            continue
        if isinstance(module, nn.Conv2d) and not _zero_padded(module):
            continue
        views.append(LayerView(name, module, _role(model, module)))
    return views


def _matches(name: str, patterns: Sequence[str]) -> bool:
    parts = name.split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatch.fnmatch(prefix, pattern) for prefix in prefixes for pattern in patterns)


def _zero_padded(conv: nn.Conv2d) -> bool:
    even_same = conv.padding == "same" and any(
        d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
    )
    return conv.padding_mode == "zeros" and not even_same


def _role(model: nn.Module, module: nn.Module) -> str:
    """By the channels of the model's config, with or without a patch: no forward pass is needed to know."""
    config = getattr(model, "config", {})
    patch = config.get("patch_size") or 1
    area = patch * patch if isinstance(patch, int) else 1
    inputs = config.get("in_channels")
    outputs = config.get("out_channels") or inputs
    is_linear = isinstance(module, nn.Linear)
    reads = module.in_features if is_linear else module.in_channels
    writes = module.out_features if is_linear else module.out_channels
    if inputs and reads in {inputs, inputs * area}:
        return "first"
    if outputs and writes in {outputs, outputs * area, 2 * outputs * area}:
        return "last"
    return "inner"
