"""LayerView: what a quantization method sees of a model's Linear and Conv2d layers."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import UserError


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

    def matches(self, patterns: Sequence[str]) -> bool:
        """Whether one of the names or shell patterns is of this layer, or of a module that it is in."""
        return self.pattern(patterns) is not None

    def pattern(self, patterns: Sequence[str]) -> str | None:
        """The first of the names or shell patterns that is of this layer, or of a module that it is in."""
        parts = self.name.split(".")
        prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return next((p for p in patterns if any(fnmatch.fnmatch(prefix, p) for prefix in prefixes)), None)


def find_layers(model: nn.Module, skip: Sequence[str] = ()) -> list[LayerView]:
    """The layers that can be quantized, in the model's own order; those of an IP-Adapter are not the model's own, and
    a language model's head stays as it is (`heads_of`).

    skip: names or shell patterns (`*.to_q`) of modules to leave out, with everything below them.
    """
    heads = heads_of(model)
    views = [
        LayerView(name, module)
        for name, module in model.named_modules()
        if name not in heads and (type(module) is nn.Linear or (type(module) is nn.Conv2d and _zero_padded(module)))
    ]
    _mark_edges(getattr(model, "config", None), views)
    unmatched = [pattern for pattern in skip if not any(view.matches([pattern]) for view in views)]
    if unmatched:
        raise UserError(f"'{unmatched[0]}' in modules_to_not_convert names no layer of the model; see `ptq4dm info`.")
    return [view for view in views if not (view.matches(skip) or in_ip_adapter(view.name))]


def heads_of(model: nn.Module) -> set[str]:
    """Names of the Linear layers that stay as they are: a language model's head, which a text encoder does not even
    run, and layers whose weight is that of another module, such as a table of embeddings."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    owners: dict[int, int] = {}
    modules = dict(model.named_modules())
    for module in modules.values():
        weight = module._parameters.get("weight")
        owners[id(weight)] = owners.get(id(weight), 0) + 1
    return {
        name
        for name, module in modules.items()
        if type(module) is nn.Linear and (module is head or owners[id(module._parameters.get("weight"))] > 1)
    }


def in_ip_adapter(name: str) -> bool:
    """Whether a module belongs to an IP-Adapter of diffusers, which comes and goes while the model stays."""
    parts = name.split(".")
    return "image_projection_layers" in parts or ("processor" in parts and bool({"to_k_ip", "to_v_ip"} & {*parts}))


def _zero_padded(conv: nn.Conv2d) -> bool:
    even_same = conv.padding == "same" and any(
        d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
    )
    return conv.padding_mode == "zeros" and not even_same


def _mark_edges(config: object, views: list[LayerView]) -> None:
    """Find the layers at the model's ends by the channels of its config: no forward pass is needed to know.

    Other layers may happen to be as wide, so of all that fit one is taken, by where diffusers' models have it:
    outside the repeated blocks; the first a convolution if there is one, the last a child of the model itself.
    """
    if not isinstance(config, Mapping) or not config.get("in_channels"):
        return
    inputs = config["in_channels"]
    outputs = config.get("out_channels") or inputs
    patch = config.get("patch_size") or 1
    area = patch * patch if isinstance(patch, int) else math.prod(patch)

    def first(item: tuple[int, LayerView]) -> tuple:
        order, view = item
        linear, nested = isinstance(view.module, nn.Linear), "." in view.name
        return _repeated(view.name), linear, _reads(view) != inputs, nested, order

    def last(item: tuple[int, LayerView]) -> tuple:
        order, view = item
        return _repeated(view.name), "." in view.name, -order

    readers = [item for item in enumerate(views) if _reads(item[1]) in (inputs, inputs * area)]
    writers = [item for item in enumerate(views) if _writes(item[1]) in (outputs, outputs * area, 2 * outputs * area)]
    if readers:
        min(readers, key=first)[1].role = "first"
    if writers:
        min(writers, key=last)[1].role = "last"


def _reads(view: LayerView) -> int:
    return view.module.in_features if isinstance(view.module, nn.Linear) else view.module.in_channels


def _writes(view: LayerView) -> int:
    return view.weight.shape[0]


def _repeated(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def matrix_like(module: nn.Module) -> bool:
    """Whether a layer is one matrix product over tokens: a Linear, or a 1x1 convolution of stride 1."""
    if type(module) is nn.Linear:
        return True
    plain = {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0), "groups": 1}
    return type(module) is nn.Conv2d and all(getattr(module, name) == value for name, value in plain.items())
