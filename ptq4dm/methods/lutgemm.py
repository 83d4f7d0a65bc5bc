"""LUT-GEMM: "LUT-GEMM: Quantized Matrix Multiplication based on LUTs for Efficient Inference in Large-Scale
Generative Language Models", Park et al., arXiv:2206.09557.

1. Weights are sums of sign planes times scales of groups (section 3.1): a greedy start, then rounds of least squares
   for the scales and of nearest sums for the signs. Uniform grids are such sums, too, with an offset (3.2).
2. Inputs stay floats. Their sums with all patterns of signs are made once and looked up (3.3): kernels/lut.

The paper's layers are those of a language model that writes one token after another. What a diffusion model has of
layers of few rows are those fed an embedding of the time, the class or a pooled text, of which a sample has one:
modulation (adaLN), embeddings. This quantizes these; `rest` is a recipe for the others.

Plain least squares make all weights of a layer smaller, the large ones most: an error that has the direction of the
weight itself, and that a model feels far more than its size says. So errors of weights count by their magnitude here
(`emphasis`): the authors' code has such weights as an option, the exponent 1 is by our measurement.

Fitted planes have the smaller error of the weights at 2 and 3 bits, and not of the model. What helps are the inputs
of calibration, which are no part of the paper: codes by Hessian rounding (gptq), then rounds in which scales, offsets
and codes are fitted to what the layer puts out (`refits`; ptq4dm/rounding/refit.py). They start at the planes of a
uniform grid: fitted ones end in a smaller error on one model and in a larger one on another. A sample gives these
layers one row alone: they need more tuples than others (`num_tuples`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..budgets.candidates import mixable, recipe_of
from ..calibration.store import CalibrationStore
from ..calibration.trace import Traced, trace
from ..errors import UserError
from ..kernels.formats.bcq import MOST_BITS, ROUNDS
from ..layers.binary.bcq import MOST_EMPHASIS, BCQPlan
from ..layers.plan import GROUP_SIZES
from ..layers.view import LayerView
from ..options import option, whole_or_row
from ..quantization.recipe import QuantConfig, register
from ..registry import load_late
from ..rounding.registry import ROUNDERS

PLANES = ("fitted", "uniform")
REFITS = 4
FITTED = 1  # bits up to which planes are fitted where nothing is said


@register("lutgemm")
@dataclass(repr=False)
class LUTGEMMConfig(QuantConfig):
    """LUT-GEMM for the Linear layers that are fed one row a sample, and a recipe for the others.

    bits: sign planes of a weight.
    group_size: inputs under one set of scales, 32, 64 or 128; None gives each output one. A layer whose inputs do not
        divide into groups gets the largest smaller ones that they divide into, or one set an output; the report says
        which.
    planes: "fitted"; "uniform", those of an affine uniform grid; left out, fitted at 1 bit alone.
        Both are where refits start.
    rounds: of the fit, after its greedy start.
    emphasis: in the fit squared errors count by |w|^emphasis; 0 is plain least squares.
    rounding: of codes on the grid: "gptq", by calibration inputs, or "nearest", the paper's.
    refits: rounds after gptq in which scales, offsets and codes are fitted to what layers put out; left out, 4 after
        gptq and none after nearest.
    num_tuples: calibration tuples that rounding and refits look at; these layers get one row of each.
    rest: a recipe for the other layers, as text ("rtn activations=dynamic") or as a config; None keeps their
        precision. It has no transforms, no training of blocks and no plan.

    Which layers those are is seen in calibration calls.
    """

    packs_while_loading: ClassVar[bool] = False
    bits: int = option(3, "sign planes of a weight", low=1, high=MOST_BITS)
    group_size: int | None = option(
        128, "inputs that share scales: 32, 64 or 128; row: all of an output", parse=whole_or_row, choices=GROUP_SIZES
    )
    planes: str | None = option(
        None, "fitted, or uniform: those of a uniform grid; left out, fitted at 1 bit and uniform above"
    )
    rounds: int = option(ROUNDS, "of the fit of planes, after its greedy start", low=0)
    emphasis: float = option(1.0, "errors of weights count by |w| to this power", low=0, high=MOST_EMPHASIS)
    rounding: str = option("gptq", "how codes are chosen: nearest, or gptq by calibration inputs")
    refits: int | None = option(None, "rounds that fit planes to outputs; 4 after gptq", low=0, parse=int)
    num_tuples: int = option(256, "calibration tuples that roundings look at", low=1)
    rest: Any = option(None, "a recipe for all other layers, 'method option=value ...'", parse=str)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.planes not in (None, *PLANES):
            raise UserError(f"planes must be one of {', '.join(PLANES)}; got {self.planes!r}.")
        if self.planes == "uniform" and (self.rounds, self.emphasis) != (ROUNDS, type(self).emphasis):
            raise UserError("rounds and emphasis are of fitted planes, and change nothing of a uniform grid.")
        if "binary" not in ROUNDERS.find(self.rounding).grids:
            raise UserError(f"rounding '{self.rounding}' does not serve planes; take nearest or gptq.")
        if self.refits and self.rounding == "nearest":
            raise UserError("refits look at what layers are fed, and rounding 'nearest' does not; take gptq.")
        BCQPlan(weight_bits=self.bits, group_size=self.group_size, rounding=self.rounding).check()
        self.rest = _rest(self.rest)

    @property
    def needs_calibration(self) -> bool:
        return True

    def resolve(self, model: nn.Module, views: list[LayerView], store: CalibrationStore | None) -> dict[str, Any]:
        """A BCQPlan for each layer of few rows, and what `rest` says of the others, in the model's order."""
        if store is None:
            raise UserError("LUTGEMMConfig looks at how layers are called: pass a store from ptq4dm.collect(pipe).")
        traced = trace(model, views, store.recorded())
        few = {view.name: self._plan(view) for view in views if few_rows(view, traced.get(view.name))}
        others = [view for view in views if view.name not in few]
        rest = {} if self.rest is None else self.rest.resolve(model, others, store)
        return {view.name: (few | rest)[view.name] for view in views if view.name in few or view.name in rest}

    def _plan(self, view: LayerView) -> BCQPlan:
        inputs = view.weight.shape[1]
        sizes = sorted((size for size in GROUP_SIZES if size and size <= (self.group_size or 0)), reverse=True)
        group_size = next((size for size in sizes if inputs % size == 0), None)
        uniform = (self.planes or ("fitted" if self.bits <= FITTED else "uniform")) == "uniform"
        return BCQPlan(
            weight_bits=self.bits, group_size=group_size, rounds=self.rounds, emphasis=self.emphasis,
            uniform=uniform, rounding=self.rounding, refits=self._refits(),
        )  # fmt: skip

    def _refits(self) -> int:
        if self.refits is None:
            return 0 if self.rounding == "nearest" else REFITS
        return self.refits

    def packing_options(self) -> dict[str, Any]:
        """What `rest` looks at; all layers look at the tuples of the recipe that wants more."""
        found = {} if self.rest is None else self.rest.packing_options()
        return found | {"num_tuples": max(self.num_tuples, found.get("num_tuples", 0))}

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"rest": None if self.rest is None else self.rest.summary()}

    to_diff_dict = to_dict

    def summary(self) -> dict[str, Any]:
        found = super().summary()
        return found if self.rest is None else found | {"rest": self.rest.summary()}


def few_rows(view: LayerView, seen: Traced | None) -> bool:
    """Whether a layer is a Linear inside of the model that is fed one row a sample."""
    return type(view.module) is nn.Linear and view.role == "inner" and seen is not None and not seen.tokens


def _rest(rest: Any) -> QuantConfig | None:
    """A recipe of text, a dict or a config. Raises UserError where it cannot be mixed with another."""
    load_late()
    if rest is None:
        return None
    if isinstance(rest, str):
        return _untrained(recipe_of(rest, "rest"))
    recipe = QuantConfig.from_dict(rest) if isinstance(rest, dict) else rest
    if not isinstance(recipe, QuantConfig):
        raise UserError(f"rest is a recipe, such as RTNConfig() or 'rtn activations=dynamic'; got {rest!r}.")
    return _untrained(mixable(recipe, f"rest '{recipe.method}'"))


def _untrained(recipe: QuantConfig) -> QuantConfig:
    if isinstance(recipe, LUTGEMMConfig):
        raise UserError("rest is of the layers that LUT-GEMM leaves; take another recipe, such as 'qoq'.")
    if recipe.learning() is not None:
        raise UserError("rest trains whole blocks, which have one format; take a recipe that rounds layer by layer.")
    return recipe
