"""What the columns look at: a case's model, its calls and outputs, and its model quantized, each made once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import ptq4dm

from .classes.case import Case

FLOAT = "float"
FORMATS = {
    "W8A8": lambda: ptq4dm.PTQ4DMConfig(objective="max"),  # what is swept are classes, not ways to find ranges
    "SVDQuant": lambda: ptq4dm.SVDQuantConfig(activations="int8", rank=8, num_tuples=4, refinements=0),
}
CALLS, BATCH = 8, 2  # of calibration
TEST = 1000  # the seed of the call that is compared


class Wrong(Exception):
    """A cell that ran and gave what it must not give."""


class Subject:
    """A case, with what its columns share. `folder` is empty and its own."""

    def __init__(self, case: Case, folder: Path, seed: int = 0) -> None:
        self.case, self.folder, self.seed = case, folder, seed
        self._recorded: Any = None
        self._models: dict[str, nn.Module | Exception] = {}

    def call(self, model: nn.Module, number: int = TEST) -> list[Tensor]:
        """The floating outputs of one call; always with new arguments, for models that write into theirs."""
        return outputs(self._call(model, number))

    def _call(self, model: nn.Module, number: int) -> Any:
        args, kwargs = self.case.make_call(BATCH, 10_000 * self.seed + number)
        with torch.no_grad():
            return model(*args, **kwargs)

    def recorded(self) -> tuple[Any, list[list[Tensor]]]:
        """Recorded calls of the float model, and what it gave; UserError where they cannot be recorded."""
        if self._recorded is None:
            model = self.case.make_model()
            with ptq4dm.record(model) as calls:
                given = [self.call(model, number) for number in range(CALLS)]
            self._recorded = calls, given
        return self._recorded

    def model(self, kind: str) -> nn.Module:
        """The model as it is or in one of FORMATS, made once; what went wrong is raised again each time."""
        if kind not in self._models:
            try:
                self._models[kind] = self._made(kind)
            except Exception as error:
                self._models[kind] = error
        found = self._models[kind]
        if isinstance(found, Exception):
            raise found
        return found

    def _made(self, kind: str) -> nn.Module:
        model = self.case.make_model()
        if kind != FLOAT:
            calls, _ = self.recorded()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ptq4dm.quantize(model, FORMATS[kind](), calls)
        return model

    def error(self, kind: str) -> float:
        """The relative error of a format's outputs against float, of the worst output."""
        return distance(self.call(self.model(kind)), self.call(self.model(FLOAT)))


def outputs(result: Any) -> list[Tensor]:
    """The floating tensors in what a model gave; Wrong where there is none or one is not finite."""
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not tensors:
        raise Wrong("the model gave no tensor")
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise Wrong("outputs are not finite")
    return [tensor.detach().clone() for tensor in tensors]


def distance(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """max over tensors of |found - right| / |right|; Wrong where shapes differ."""
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in right]:
        raise Wrong(f"outputs of other shapes: {[tuple(t.shape) for t in found]}, {[tuple(t.shape) for t in right]}")
    pairs = zip(found, right, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)) for a, b in pairs)


def must_equal(found: Sequence[Tensor], right: Sequence[Tensor], what: str) -> None:
    """Wrong unless all tensors are the same to the bit."""
    if (error := distance(found, right)) or not all(torch.equal(a, b) for a, b in zip(found, right, strict=True)):
        raise Wrong(f"{what} differs by {error:.1e}")


def must_be_within(error: float, bound: float, what: str = "relative error") -> None:
    if not error <= bound:
        raise Wrong(f"{what} {error:.2g} is above {bound:g}")
