"""One block of a model, trained to give in few bits what it gives in full precision.

1. Its calls on calibration tuples are captured twice: in full precision, which also gives the targets, and behind the
   part of the model that is quantized already (items.py).
2. Some hundred steps: a batch of tuples, what it is fed mixed from both (QDrop), the loss of its outputs, and where
   asked for the error in the model's own answer; codes of weights and ends of input ranges move (steps.py, soft.py).
3. Codes become whole numbers, the layers are packed, and the block's error is measured as they compute it.

AdaRound, BRECQ (arXiv:2102.05426), QDrop (arXiv:2203.05740) and PD-Quant (arXiv:2212.07048) are of this form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.evidence import substituted
from ..calibration.record import samples_of
from ..errors import UserError
from ..hooks import computing
from ..layers.registry import empty_quantized
from ..layers.rounded import RoundedLayer
from ..pipelines.denoiser import evaluation_mode
from ..rounding.learned import Learning
from .items import Item, fed, items_of, outputs_of
from .losses import block_loss
from .soft import FixedLayer, SoftLayer
from .steps import train
from .tuples import Tuples

TINY = 1e-30


@dataclass
class BlockTask:
    """A block to train, and what is known when it is its turn.

    name: of its module in the model, or of one layer. plans: layer -> its plan, of the layers that are trained;
    fixed: packed layers of the block that are not. before: quantized layers of the blocks before it; some of them
    may lie in the module, or be called after it.
    evidence: layer -> what it is fed, for roundings and objectives that look at it.
    """

    name: str
    plans: Mapping[str, Any]
    fixed: Mapping[str, nn.Module]
    before: Mapping[str, nn.Module]
    evidence: Mapping[str, Any]


@dataclass
class BlockFigures:
    """What training did. flips: share of codes that are not the nearest, by layer; error, nearest, start: the block's
    squared error over the energy of its outputs, trained, with weights rounded to nearest, and where training began.
    A block that training made worse is left as it began."""

    flips: dict[str, float]
    error: float
    nearest: float
    start: float


@dataclass
class _Measured:
    """relative: the block's squared error over the energy of its outputs; loss: the loss of its training; prediction:
    the squared error in the model's answer, where that is trained."""

    relative: float
    loss: float
    prediction: float


class BlockTraining:
    """The training of one block on calibration tuples, which stand before it.

    predictions: of the model in full precision on each batch (items.predictions_of), for Learning.prediction. seed:
    of all that is drawn.
    """

    def __init__(
        self,
        model: nn.Module,
        block: BlockTask,
        learning: Learning,
        tuples: Tuples,
        predictions: Sequence[Tensor] = (),
        seed: int = 0,
    ) -> None:
        self.model, self.block, self.learning = model, block, learning
        self.module = model.get_submodule(block.name)
        self.tuples, self.predictions = tuples, predictions
        self.draw = torch.Generator("cpu").manual_seed(seed)
        self.device = next(self.module.parameters()).device
        self.drop = torch.Generator(self.device).manual_seed(seed)
        self.drops_inputs = False  # whether soft layers leave some of their inputs exact, in this call

    def run(self) -> tuple[dict[str, nn.Module], BlockFigures]:
        """(the trained layers by name, what training did).

        Raises UserError where a layer's format cannot be trained, or calibration never calls the block.
        """
        block = self.block
        # No mode of the caller's may keep tensors from having gradients.
        with torch.inference_mode(False), torch.no_grad(), evaluation_mode(self.model):
            soft = {name: self._soft(name, plan) for name, plan in block.plans.items()}
            packed = {**block.before, **block.fixed}
            fixed = {name: FixedLayer(self.model.get_submodule(name), layer, name) for name, layer in packed.items()}
            items = items_of(
                self.model, block.name, self.tuples, block.before, self.learning, self.draw, self.predictions
            )
            nearest = self._measured(items, {name: one.untrained(one.nearest) for name, one in soft.items()})
            if not math.isfinite(nearest.loss + nearest.prediction):
                raise UserError(
                    f"'{block.name}' gives NaN or infinity on the calibration data, so it cannot be trained; collect "
                    "again, from a model that gives finite numbers."
                )
            with torch.enable_grad(), self._computing({**soft, **fixed}), _repeatable(self.device):
                self._train(list(soft.values()), items, nearest)
            start = {name: (one.untrained(one.begin), one.moved(one.begin)) for name, one in soft.items()}
            began = self._measured(items, {name: layer for name, (layer, _) in start.items()})
            done = {name: one.packed() for name, one in soft.items()}
            error = self._measured(items, {name: layer for name, (layer, _) in done.items()})
            if not error.relative <= began.relative:  # training made it worse, so it is left out
                done, error = start, began
            layers: dict[str, nn.Module] = {name: layer for name, (layer, _) in done.items()}
        for name, layer in layers.items():
            layer.train(self.model.get_submodule(name).training)
        flips = {name: share for name, (_, share) in done.items()}
        return layers, BlockFigures(flips, error.relative, nearest.relative, began.relative)

    def _soft(self, name: str, plan: Any) -> SoftLayer:
        module = self.model.get_submodule(name)
        layer = empty_quantized(module, plan, module.weight.device)
        if not isinstance(layer, RoundedLayer):
            raise UserError(f"layer '{name}': rounding 'learned' does not serve format '{plan.format}'.")
        return SoftLayer(module, layer, name, self.learning, self.block.evidence.get(name))

    @contextmanager
    def _computing(self, layers: Mapping[str, SoftLayer | FixedLayer]) -> Iterator[None]:
        """The block's layers compute as these do."""

        def forward(layer: SoftLayer | FixedLayer) -> Any:
            return lambda input: layer.forward(input, self.drop if self.drops_inputs else None)

        with computing(self.model, {name: forward(layer) for name, layer in layers.items()}):
            yield

    @torch.no_grad()
    def _measured(self, items: list[Item], layers: dict[str, nn.Module]) -> _Measured:
        """How wrong the block is behind the quantized part, as these layers compute."""
        wrong = energy = loss = prediction = 0.0
        with substituted(self.model, {**self.block.before, **self.block.fixed, **layers}):
            module = self.model.get_submodule(self.block.name)
            for item in items:
                outputs = outputs_of(module, item.noisy, item)
                loss += float(self._loss(outputs, item))
                for y, t in zip(outputs, item.targets, strict=True):
                    wrong += float((y.float() - t.float()).square().sum(dtype=torch.float64))
                    energy += float(t.float().square().sum(dtype=torch.float64))
                if self.learning.prediction:
                    with self.tuples.at(item.place, self.block.before):
                        prediction += float(self._prediction(item))
        count = len(items)
        return _Measured(wrong / energy if energy else 0.0, max(loss / count, TINY), max(prediction / count, TINY))

    def _train(self, layers: list[SoftLayer], items: list[Item], nearest: _Measured) -> None:
        def loss(item: Item, penalty: Callable[[], Tensor]) -> Tensor:
            """Of one step: each term is 1 where weights are rounded to nearest."""
            learning = self.learning
            self.drops_inputs = learning.augmentation == "qdrop"
            outputs = outputs_of(self.module, fed(item, learning.augmentation, self.drop), item)
            self.drops_inputs = False
            found = self._loss(outputs, item) / nearest.loss
            if learning.prediction:
                with self.tuples.at(item.place, self.block.before):
                    found = found + learning.prediction * self._prediction(item) / nearest.prediction
            return found + penalty()

        train(layers, items, self.learning, loss, self.draw, self.drop)

    def _loss(self, outputs: list[Tensor], item: Item) -> Tensor:
        return block_loss(self.learning.loss, outputs, item.targets, item.weights, item.fisher)

    def _prediction(self, item: Item) -> Tensor:
        """The squared error of the model's answer, behind the quantized part and before an exact rest."""
        assert item.call is not None
        found = samples_of(self.model(*item.call.args, **item.call.kwargs), item.batch)
        return block_loss("mse", [found], item.answer, item.weights)


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """Sums in one order on a GPU, so that the same seed gives the same codes."""
    if device.type != "cuda":
        yield
        return
    in_order = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with in_order, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield
