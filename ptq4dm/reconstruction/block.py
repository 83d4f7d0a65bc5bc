"""One block of a model, trained to give in few bits what it gives in full precision.

1. Its calls on calibration tuples are captured twice: in full precision, which also gives the targets, and behind the
   part of the model that is quantized already.
2. Some hundred steps: a batch of tuples, what it is fed mixed from both (QDrop), the loss of its outputs, and where
   asked for the error in the model's own answer; the codes of weights and the ends of input ranges move.
3. Codes become whole numbers, the layers are packed, and the block's error is measured as they compute it.

AdaRound, BRECQ (arXiv:2102.05426), QDrop (arXiv:2203.05740) and PD-Quant (arXiv:2212.07048) are of this form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..calibration.calls import Calls
from ..calibration.evidence import Evidence, substituted
from ..calibration.record import answers, ready, tensors_of
from ..errors import UserError
from ..layers.registry import empty_quantized, quantized_copy
from ..layers.rounded import RoundedLayer
from ..pipelines.denoiser import evaluation_mode
from ..rounding.learned import Learning
from ..rounding.optimizers import OPTIMIZERS, falling, move
from .losses import block_loss, row_weights
from .soft import FixedLayer, SoftLayer

WARM_UP = 0.2  # the share of steps before soft codes are driven to whole numbers
SHARPNESS = (20.0, 2.0)  # of that penalty, at first and at the end
PENALTY = 1.0  # its weight against the loss, which is 1 where weights are rounded to nearest
TINY = 1e-30
RANGE_RATE, SCALE_RATE = 1e-3, 1e-3  # learning rates of what is trained in logarithms; biases as scales


@dataclass
class Item:
    """One call of the block: leaves of its arguments in full precision and behind quantized layers, its outputs."""

    batch: Calls
    exact: list
    noisy: list
    structure: pytree.TreeSpec
    targets: list[Tensor]
    weights: Tensor
    fisher: list[Tensor] | None = None
    answer: list[Tensor] = field(default_factory=list)


@dataclass
class BlockFigures:
    """What training did. flips: share of codes that are not the nearest, by layer; error, nearest: the block's
    squared error over the energy of its outputs, trained and with weights rounded to nearest."""

    flips: dict[str, float]
    error: float
    nearest: float


@dataclass
class Measured:
    """relative: the block's squared error over the energy of its outputs; loss: the loss of its training; prediction:
    the squared error in the model's answer, where that is trained."""

    relative: float
    loss: float
    prediction: float


class BlockTraining:
    """The training of one block.

    module: its name in the model, or that of one layer. plans: layer -> its plan, of the layers that are trained;
    fixed: packed layers of the block that are not. batches: calibration calls, one call of the model each.
    before: quantized layers of the blocks before it. evidence: of the layers' inputs, for objectives that look.
    """

    def __init__(
        self,
        model: nn.Module,
        module: str,
        plans: Mapping[str, Any],
        learning: Learning,
        batches: list[Calls],
        *,
        fixed: Mapping[str, nn.Module] | None = None,
        before: Mapping[str, nn.Module] | None = None,
        evidence: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.name, self.module = model, module, model.get_submodule(module)
        self.plans, self.learning, self.batches = plans, learning, batches
        self.fixed, self.before, self.evidence = dict(fixed or {}), dict(before or {}), evidence or {}
        self.draw = torch.Generator("cpu").manual_seed(seed)
        self.device = next(self.module.parameters()).device
        self.drop = torch.Generator(self.device).manual_seed(seed)

    def run(self) -> tuple[dict[str, nn.Module], BlockFigures]:
        """(the trained layers by name, what training did)."""
        with evaluation_mode(self.model):
            items = self.items()
            nearest = self._measured(items, self._nearest())
            soft = {name: self._soft(name, plan) for name, plan in self.plans.items()}
            with torch.enable_grad(), self._computing(soft) as drops, _repeatable(self.device):
                self._train(soft, items, drops, nearest)
            done = {name: one.packed() for name, one in soft.items()}
            layers: dict[str, nn.Module] = {name: layer for name, (layer, _) in done.items()}
            error = self._measured(items, layers)
        flips = {name: share for name, (_, share) in done.items()}
        return layers, BlockFigures(flips, error.relative, nearest.relative)

    # --- what it is trained on ---------------------------------------------------------------------------------

    @torch.no_grad()
    def items(self) -> list[Item]:
        """The calls of the block, one for each batch."""
        found = []
        for batch in self.batches:
            seen = Evidence(self.model, [], [self.name], [batch])
            if not seen.calls(self.name):  # an expert that gets no token of this batch
                continue
            exact, structure = pytree.tree_flatten(seen.calls(self.name)[0])
            noisy = exact
            if self.before:
                behind = Evidence(self.model, [], [self.name], [batch], before=self.before).calls(self.name)
                noisy = pytree.tree_flatten(behind[0])[0] if behind else exact
            weights = row_weights(batch, self.learning.time_weights, self.device)
            found.append(Item(batch, exact, noisy, structure, seen.outputs(self.name)[0], weights))
            if self.learning.loss == "fisher":
                found[-1].fisher = self._fisher(batch)
            if self.learning.prediction:
                found[-1].answer = [t.detach() for t in tensors_of(answers(self.model, batch)[0])]
        if not found:
            raise UserError(f"'{self.name}' was not called during calibration.")
        if self.learning.loss == "fisher":
            mean = torch.stack([one.mean() for item in found for one in item.fisher or []]).mean().clamp(min=1e-30)
            for item in found:
                item.fisher = [one / mean for one in item.fisher or []]
        return found

    @torch.enable_grad()
    def _fisher(self, batch: Calls) -> list[Tensor]:
        """Squared gradients of <r, answer>, r drawn from a normal law, in the block's outputs."""
        kept: list[Tensor] = []

        def hook(_: nn.Module, args: tuple, output: Any) -> Any:
            leaves, structure = pytree.tree_flatten(output)
            for i, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    leaves[i] = leaf.detach().requires_grad_()
                    kept.append(leaves[i])
            return pytree.tree_unflatten(leaves, structure)

        handle = self.module.register_forward_hook(hook)
        try:
            call = ready(batch, self.model)
            answer = tensors_of(self.model(*call.args, **call.kwargs))[0]
        finally:
            handle.remove()
        direction = torch.randn(answer.shape, generator=self.draw).to(answer)
        gradients = torch.autograd.grad((answer * direction).sum(), kept, allow_unused=True)
        return [
            torch.zeros_like(one) if gradient is None else gradient.float().square()
            for one, gradient in zip(kept, gradients, strict=True)
        ]

    # --- the block with its layers computing in few bits -------------------------------------------------------

    def _soft(self, name: str, plan: Any) -> SoftLayer:
        module = self.model.get_submodule(name)
        layer = empty_quantized(module, plan, module.weight.device)
        if not isinstance(layer, RoundedLayer):
            raise UserError(f"layer '{name}': rounding 'learned' does not serve format '{plan.format}'.")
        return SoftLayer(module, layer, name, self.learning, self.evidence.get(name))

    def _nearest(self) -> dict[str, nn.Module]:
        """The layers with their weights rounded to nearest, under the same grids."""
        found = {}
        for name, plan in self.plans.items():
            module = self.model.get_submodule(name)
            found[name] = quantized_copy(module, replace(plan, rounding="nearest"), name, self.evidence.get(name))
        return found

    @contextmanager
    def _computing(self, soft: dict[str, SoftLayer]) -> Iterator[dict[str, Any]]:
        """The block's layers compute as soft ones; in the dict "drop" says whether roundings of inputs are drawn."""
        drops: dict[str, Any] = {"drop": None}
        fixed = {name: FixedLayer(self.model.get_submodule(name), layer, name) for name, layer in self.fixed.items()}
        computing: dict[str, SoftLayer | FixedLayer] = {**soft, **fixed}
        modules = {name: self.model.get_submodule(name) for name in computing}

        def forward(layer: SoftLayer | FixedLayer) -> Any:
            return lambda input: layer.forward(input, drops["drop"])

        try:
            for name, module in modules.items():
                module.forward = forward(computing[name])
            yield drops
        finally:
            for module in modules.values():
                vars(module).pop("forward", None)

    @torch.no_grad()
    def _measured(self, items: list[Item], layers: dict[str, nn.Module]) -> Measured:
        """How wrong the block is behind the quantized part, as these layers compute."""
        wrong = energy = loss = prediction = 0.0
        with substituted(self.model, {**self.fixed, **layers}):
            module = self.model.get_submodule(self.name)
            for item in items:
                outputs = self._outputs(module, item.noisy, item)
                loss += float(block_loss(self.learning.loss, outputs, item.targets, item.weights, item.fisher))
                for y, t in zip(outputs, item.targets, strict=True):
                    wrong += float((y.float() - t.float()).square().sum(dtype=torch.float64))
                    energy += float(t.float().square().sum(dtype=torch.float64))
                if self.learning.prediction:
                    prediction += float(self._prediction(item))
        count = len(items)
        return Measured(wrong / energy if energy else 0.0, max(loss / count, TINY), max(prediction / count, TINY))

    def _outputs(self, module: nn.Module, leaves: list, item: Item) -> list[Tensor]:
        args, kwargs = pytree.tree_unflatten(leaves, item.structure)
        return tensors_of(module(*args, **kwargs))

    # --- training ----------------------------------------------------------------------------------------------

    def _train(self, soft: dict[str, SoftLayer], items: list[Item], drops: dict[str, Any], nearest: Measured) -> None:
        learning = self.learning
        codes = [layer.codes for layer in soft.values() if layer.codes is not None]
        roundings = [one.value for one in codes]
        ranges = [end for layer in soft.values() for end in layer.input.ends]
        scales = [one for layer in soft.values() for one in layer.others()]
        choice = OPTIMIZERS.find(learning.optimizer)
        groups = [  # what is trained, its optimizer and its learning rate
            (tensors, make(tensors, lr=rate), rate)
            for tensors, make, rate in (
                (roundings, choice.make, learning.rate),
                (ranges, torch.optim.Adam, RANGE_RATE),
                (scales, torch.optim.Adam, SCALE_RATE),
            )
            if tensors
        ]
        if not groups:
            return
        order: list[int] = []
        for step in range(learning.steps):
            order = order or torch.randperm(len(items), generator=self.draw).tolist()
            item = items[order.pop()]
            drops["drop"] = self.drop if learning.augmentation == "qdrop" else None
            outputs = self._outputs(self.module, self._fed(item), item)
            loss = block_loss(learning.loss, outputs, item.targets, item.weights, item.fisher) / nearest.loss
            if learning.prediction:
                drops["drop"] = None
                loss = loss + learning.prediction * self._prediction(item) / nearest.prediction
            done = step / learning.steps
            if codes and done >= WARM_UP:
                sharpness = SHARPNESS[1] + (SHARPNESS[0] - SHARPNESS[1]) * (1 - (done - WARM_UP) / (1 - WARM_UP))
                loss = loss + PENALTY * torch.stack([one.penalty(sharpness) for one in codes]).mean()
            tensors = [tensor for group, _, _ in groups for tensor in group]
            gradients = list(torch.autograd.grad(loss, tensors, allow_unused=True))
            for group, optimizer, rate in groups:
                own = tuple(_given(gradients.pop(0), tensor) for tensor in group)
                move(optimizer, group, own, rate * falling(step, learning.steps))
            for one in codes:
                one.project()

    def _prediction(self, item: Item) -> Tensor:
        """The squared error of the model's answer, behind the quantized part and before an exact rest."""
        with substituted(self.model, self.before):
            call = ready(item.batch, self.model)
            found = tensors_of(self.model(*call.args, **call.kwargs))
        return block_loss("mse", found[:1], item.answer[:1], item.weights)

    def _fed(self, item: Item) -> list:
        """Leaves of the block's arguments for one step."""
        kind = self.learning.augmentation
        if kind == "none":
            return item.noisy
        return [
            self._mixed(exact, noisy, kind) if _differ(exact, noisy) else noisy
            for exact, noisy in zip(item.exact, item.noisy, strict=True)
        ]

    def _mixed(self, exact: Tensor, noisy: Tensor, kind: str) -> Tensor:
        if kind == "qdrop":
            draw = torch.rand(exact.shape, generator=self.drop, device=self.device)
            return torch.where(draw < 0.5, exact, noisy)
        size = (noisy.float() - exact.float()).square().mean().sqrt()
        noise = torch.randn(exact.shape, generator=self.drop, device=self.device) * size
        return exact + noise.to(exact.dtype)


def _differ(exact: Any, noisy: Any) -> bool:
    both = isinstance(exact, Tensor) and isinstance(noisy, Tensor) and exact.is_floating_point()
    return both and exact.shape == noisy.shape and exact is not noisy


def _given(gradient: Tensor | None, tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if gradient is None else gradient


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """Sums in one order on a GPU, so that the same seed gives the same codes."""
    if device.type != "cuda":
        yield
        return
    in_order = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with in_order, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield
