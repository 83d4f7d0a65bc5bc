"""The work of a real model: its layers as they are called in one step, read off by hooks; no values are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..calibration.calls import Call
from ..calibration.clock import Track
from ..calibration.look import look
from ..calibration.request import Done, never_called, request_of
from ..errors import UserError
from ..hooks import hooked, input_of
from ..layers.base import holds_quantized
from ..layers.view import LayerView, find_layers
from ..pipelines.denoiser import denoiser_name, schedulers_of
from .work import Work

ATTENTION = {"to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_attn"}
FEED_FORWARD = {"ff", "ff_context", "mlp", "proj_mlp", "feed_forward"}
AFTER_ATTENTION = {"to_out", "to_add_out", "proj_attn"}
CONDITIONING = ("emb", "norm", "time", "modulation")
ENTRANCES = {"x_embedder", "context_embedder", "pos_embed", "patch_embed"}  # of pixels and tokens, not of conditions
PRODUCTS = "attention's products"


@contextmanager
def works_seen(model: nn.Module) -> Iterator[list[Work]]:
    """A list that grows with each call of a layer of `model` in the block, attention's own two products included."""
    works: list[Work] = []
    views = find_layers(model)
    if not views or holds_quantized(model):
        why = "is quantized; name its original, whose layers have the same shapes" if views else "has no layers"
        raise UserError(f"the model {why}; the accelerator's model needs Linear or Conv2d layers in full precision.")
    with hooked(model, {view.name: _hook(view, works) for view in views}), _Products(works):
        yield works


def works_of_pipeline(
    pipe: Any, num_inference_steps: int, conditioning: dict | None = None, pipeline_kwargs: dict | None = None
) -> tuple[list[Work], int]:
    """The work of the main denoiser in one step for one image, guidance included; and the steps of an image.

    The pipeline samples until its first step is over.

    Raises:
        UserError: the pipeline cannot be called so, or its denoiser is quantized.
    """
    name = denoiser_name(pipe)
    options = {"conditioning": conditioning, "pipeline_kwargs": pipeline_kwargs}
    request = request_of(pipe, [name], num_inference_steps=num_inference_steps, **options)
    bare = look(request, 0).bare
    with works_seen(request.networks[name]) as works:
        with request.watched({}, _FirstStep()):
            request.run([0], bare)
        found = merged(works)
    if not found:
        raise never_called(request, [0])
    scheduler = next(iter(schedulers_of(pipe).values()))
    return found, len(scheduler.timesteps)


def merged(works: list[Work]) -> list[Work]:
    """The same with equal ones as one, whose count is their sum; a layer that is called twice is equal to itself."""
    counts: dict[Work, int] = {}
    for work in works:
        key = replace(work, count=1)
        counts[key] = counts.get(key, 0) + work.count
    return [replace(work, count=count) for work, count in counts.items()]


def scaled(works: list[Work], images: int) -> list[Work]:
    """The same for several images at once."""

    def times(work: Work) -> Work:  # what has no weights is made for each image by itself
        return replace(work, batch=work.batch * images) if work.weights else replace(work, count=work.count * images)

    return [times(work) for work in works]


@dataclass
class _FirstStep:
    """Ends sampling after the first step."""

    seen: bool = False

    def called(self, component: str, module: nn.Module, call: Call) -> None:
        if self.seen:
            raise Done
        self.seen = True

    def stepping(self, track: Track) -> None:
        raise Done


def _hook(view: LayerView, works: list[Work]) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = input_of(args, kwargs)
        if x.numel():  # an expert of a mixture may get no token
            works.append(_work(view, x))

    return hook


def _work(view: LayerView, x: Tensor) -> Work:
    layer = view.module
    facts: dict[str, Any] = {
        "kind": kind_of(view),
        "block": block_of(view.name),
        "edge": view.role != "inner",
        "writes_attention": bool(AFTER_ATTENTION & set(view.name.split("."))),
    }
    if isinstance(layer, nn.Linear):
        rows, channels = x.numel() // x.shape[-1], x.shape[-1]
        return Work(view.name, batch=rows, outputs=layer.out_features, channels=channels, **facts)
    height, width = (_side(layer, x, axis) for axis in (0, 1))
    return Work(
        view.name,
        batch=1 if x.ndim == 3 else len(x),
        outputs=layer.out_channels // layer.groups,
        channels=layer.in_channels // layer.groups,
        height=height,
        width=width,
        kernel=(layer.kernel_size[0], layer.kernel_size[1]),
        stride=(layer.stride[0], layer.stride[1]),
        count=layer.groups,
        **facts,
    )


def _side(layer: nn.Conv2d, x: Tensor, axis: int) -> int:
    """Pixels of a convolution's output along one axis."""
    kernel = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
    size = x.shape[axis - 2]
    if layer.padding == "same":
        return size
    padding = 0 if isinstance(layer.padding, str) else layer.padding[axis]
    return (size + 2 * padding - kernel - 1) // layer.stride[axis] + 1


def kind_of(view: LayerView) -> str:
    """What a layer is for by its name: "convolution", "attention", "feed-forward", "conditioning", "projection"."""
    parts = view.name.split(".")
    if isinstance(view.module, nn.Conv2d) and view.module.kernel_size != (1, 1):
        return "convolution"
    if ATTENTION & set(parts):
        return "attention"
    if FEED_FORWARD & set(parts):
        return "feed-forward"
    if any(word in part for part in parts if part not in ENTRANCES for word in CONDITIONING):
        return "conditioning"
    return "projection"


def block_of(name: str) -> str:
    """The repeated block around a layer: its name up to the last number after a plural, as in "resnets.1"."""
    parts = name.split(".")
    places = [k for k in range(1, len(parts)) if parts[k].isdigit() and parts[k - 1].endswith("s")]
    return ".".join(parts[: places[-1] + 1]) if places else ""


class _Products(TorchFunctionMode):
    """Adds the two products of an attention, which have no weights: queries by keys, and their softmax by values."""

    def __init__(self, works: list[Work]) -> None:
        super().__init__()
        self.works = works

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = kwargs or {}
        if function is F.scaled_dot_product_attention:
            query, key, value = (
                args[k] if k < len(args) else given[name] for k, name in enumerate(("query", "key", "value"))
            )
            self._add(query, key, value)
        return function(*args, **given)

    def _add(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        heads = query.numel() // (query.shape[-1] * query.shape[-2])
        if not heads:
            return
        last = self.works[-1].name.rpartition(".")[0] if self.works else ""
        keys = key.shape[-2]
        facts: dict[str, Any] = {"kind": PRODUCTS, "batch": query.shape[-2], "count": heads, "weights": False}
        facts["block"] = block_of(last)
        self.works.append(Work(f"{last} scores", outputs=keys, channels=query.shape[-1], **facts))
        self.works.append(Work(f"{last} values", outputs=value.shape[-1], channels=keys, **facts))


def works_of_call(model: nn.Module, call: Callable[[], object]) -> list[Work]:
    """The work of one call of a model, values or none: on the meta device shapes are enough."""
    with torch.no_grad(), works_seen(model) as works:
        call()
    return merged(works)
