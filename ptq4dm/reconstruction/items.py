"""What a block is trained on: its calls on calibration tuples, in full precision and behind quantized blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..calibration.calls import Call, Calls
from ..calibration.record import answers, ready, samples_of, tensors_of
from ..errors import UserError
from ..pipelines.denoiser import evaluation_mode
from ..rounding.learned import Learning
from .correction import corrected, moments_of
from .losses import row_weights
from .tuples import Tuples, first_call


@dataclass
class Item:
    """One call of the block, in which each unit of `batch` has its rows.

    exact, noisy: leaves of its arguments in full precision, and behind the quantized part. targets: its outputs in
    full precision. weights: [R] of the rows. fisher: squared gradients of the model's answer in each output, of mean
    1. answer, call: the model's samples in full precision and its call, on its device, where those are asked for.
    place: the number of its batch.
    """

    batch: Calls
    exact: list
    noisy: list
    structure: pytree.TreeSpec
    targets: list[Tensor]
    weights: Tensor
    fisher: list[Tensor] | None = None
    answer: list[Tensor] = field(default_factory=list)
    call: Call | None = None
    place: int = 0


def predictions_of(model: nn.Module, batches: list[Calls]) -> list[Tensor]:
    """What a model in full precision gives on each batch; on the CPU, for they are kept while blocks are trained."""
    with torch.inference_mode(False), torch.no_grad(), evaluation_mode(model):
        return [samples_of(answers(model, batch)[0], batch).cpu() for batch in batches]


@torch.no_grad()
def items_of(
    model: nn.Module,
    name: str,
    tuples: Tuples,
    before: Mapping[str, nn.Module],
    learning: Learning,
    draw: torch.Generator,
    predictions: Sequence[Tensor] = (),
) -> list[Item]:
    """The calls of a block, one for each batch; an expert has none where it gets no token.

    tuples: they stand before the block. before: quantized layers of the blocks before. draw: of the directions of
        `fisher`. predictions: of each batch, as `predictions_of` gives them, where `learning` asks for the error in
        them.

    Raises UserError where calibration never calls the block.
    """
    module = model.get_submodule(name)
    device = next(module.parameters()).device
    found = []
    for place, batch in enumerate(tuples.batches):
        call = first_call(tuples.exact, place, name)
        if call is None:
            continue
        exact, structure = pytree.tree_flatten(call)
        noisy = exact
        if before:
            behind = first_call(tuples.behind, place, name, before)
            seen = exact if behind is None else pytree.tree_flatten(behind)[0]
            # An expert may be sent other tokens behind the quantized part, which have no targets.
            noisy = seen if _shapes(seen) == _shapes(exact) else exact
        weights = row_weights(batch, learning.time_weights, device)
        found.append(Item(batch, exact, noisy, structure, [], weights, place=place))
        if learning.loss == "fisher":
            with tuples.exact.resumed(place):
                found[-1].fisher = _fisher(model, module, batch, draw)
        if learning.prediction:
            found[-1].answer, found[-1].call = [predictions[place].to(device)], ready(batch, model)
    if not found:
        raise UserError(f"'{name}' was not called during calibration.")
    if learning.correction:
        moments = moments_of(name, tuples.reference)
        for item, exact in zip(found, corrected([(one.batch, one.exact) for one in found], moments), strict=True):
            item.exact = exact
    for item in found:
        item.targets = outputs_of(module, item.exact, item)
    if learning.loss == "fisher":
        mean = torch.stack([one.mean() for item in found for one in item.fisher or []]).mean().clamp(min=1e-30)
        for item in found:
            item.fisher = [one / mean for one in item.fisher or []]
    return found


def outputs_of(module: nn.Module, leaves: list, item: Item) -> list[Tensor]:
    """The tensors that a block gives, called with these leaves of arguments."""
    args, kwargs = pytree.tree_unflatten(leaves, item.structure)
    return tensors_of(module(*args, **kwargs))


def fed(item: Item, augmentation: str, draw: torch.Generator) -> list:
    """The leaves of arguments for one step: "none", "qdrop" or "noise", as in Learning."""
    if augmentation == "none":
        return item.noisy
    mixed = _dropped if augmentation == "qdrop" else _with_noise
    return [
        mixed(exact, noisy, draw) if _differ(exact, noisy) else noisy
        for exact, noisy in zip(item.exact, item.noisy, strict=True)
    ]


def _shapes(leaves: list) -> list:
    return [leaf.shape if isinstance(leaf, Tensor) else None for leaf in leaves]


def _dropped(exact: Tensor, noisy: Tensor, draw: torch.Generator) -> Tensor:
    return torch.where(torch.rand(exact.shape, generator=draw, device=exact.device) < 0.5, exact, noisy)


def _with_noise(exact: Tensor, noisy: Tensor, draw: torch.Generator) -> Tensor:
    size = (noisy.float() - exact.float()).square().mean().sqrt()
    noise = torch.randn(exact.shape, generator=draw, device=exact.device) * size
    return exact + noise.to(exact.dtype)


def _differ(exact: Any, noisy: Any) -> bool:
    both = isinstance(exact, Tensor) and isinstance(noisy, Tensor) and exact.is_floating_point()
    return both and exact.shape == noisy.shape and exact is not noisy


@torch.enable_grad()
def _fisher(model: nn.Module, module: nn.Module, batch: Calls, draw: torch.Generator) -> list[Tensor]:
    """Squared gradients of <r, answer>, r drawn from a normal law, in the block's outputs: the diagonal of J^T J."""
    kept: list[Tensor] = []

    def hook(_: nn.Module, args: tuple, output: Any) -> Any:
        leaves, structure = pytree.tree_flatten(output)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                leaves[i] = leaf.detach().requires_grad_()
                kept.append(leaves[i])
        return pytree.tree_unflatten(leaves, structure)

    handle = module.register_forward_hook(hook)
    try:
        call = ready(batch, model)
        answer = samples_of(model(*call.args, **call.kwargs), batch)
    finally:
        handle.remove()
    direction = torch.randn(answer.shape, generator=draw).to(answer.device)
    gradients = torch.autograd.grad((answer.float() * direction).sum(), kept, allow_unused=True)
    return [
        torch.zeros_like(one) if gradient is None else gradient.float().square()
        for one, gradient in zip(kept, gradients, strict=True)
    ]
