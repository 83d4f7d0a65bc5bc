"""Learned rounding: codes trained by gradients to give what the weight gives.

As a rounder it looks at one layer: from Hessian rounding on, the least of  tr((W - Q) X^T X (W - Q)^T)  for the rows
X that the layer is fed, over codes that go up or down ("Up or Down? Adaptive Rounding", Nagel et al.,
arXiv:2004.10568). Recipes that train whole blocks (ptq4dm/reconstruction) do so by `Learning`, which is a part of
their plan.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..checks import check_fields, check_types
from ..errors import UserError
from ..evidence import LayerEvidence
from ..kernels.formats.grid import Grid
from ..options import option
from .gptq import gptq
from .optimizers import OPTIMIZERS, falling, move
from .registry import register_rounder
from .variables import VARIABLES

LOSSES = ("mse", "fisher", "cosine", "relative")
TRAINED = ("rounding", "scales", "biases", "ranges")
AUGMENTATIONS = ("qdrop", "noise", "none")
MOVES = ("up-down", "wide")
UNITS = ("block", "layer")
STARTS = ("gptq", "nearest")

STEPS = 100  # of the rounder of one layer
NEAR = 0.49  # how far from its code a weight begins at most, in codes


@dataclass
class Learning:
    """How the blocks of a model are trained to give, on calibration tuples, what they gave in full precision.

    steps: for each block. step_tuples: calibration tuples of one step.
    loss: squared error of the block's outputs ("mse"); weighted by the squared gradient of the model's answer in each
        of them ("fisher", BRECQ, arXiv:2102.05426); one minus the cosine ("cosine"); squared error over the energy of
        the tuple's outputs ("relative").
    time_weights: weights of equal parts of the time range, from the image to noise; () weights all times the same.
    train: what is trained: "rounding" of weights, their "scales", "biases", "ranges" of static inputs.
    variable: what rounding is trained by; moves: "up-down" to the two codes beside a weight, or "wide", two further.
    optimizer: of the rounding; learning_rate: None takes the optimizer's own. All rates fall to zero by a cosine.
    start: the rounding that training begins at: "gptq" (its Hessian of the layers' inputs), or "nearest"; None: gptq,
        in recipes of integer inputs nearest where those have 4 bits or fewer.
    augmentation: "qdrop": each input of the block, and each rounding of an input in it, is in full precision with
        probability 1/2 (QDrop, arXiv:2203.05740); "noise": Gaussian noise as large as the inputs' errors instead of
        them; "none".
    unit: "block", or "layer": each layer by itself.
    prediction: weight of the error that the block makes in the model's answer, beside that of its outputs; 0 leaves
        it out (PD-Quant, arXiv:2212.07048).
    correction: give the exact inputs of blocks the means and deviations of all calibration tuples, by channel and
        timestep bin (PD-Quant's distribution correction).
    """

    steps: int = option(300, "training steps of each block", low=1)
    step_tuples: int = option(8, "calibration tuples of a step", low=1)
    loss: str = option("mse", "of a block's outputs", choices=LOSSES)
    time_weights: tuple[float, ...] = option(
        (), "weights of equal parts of the time range, image to noise", low=0.0, parse=float
    )
    train: tuple[str, ...] = option(("rounding", "ranges"), "what is trained: rounding, scales, biases, ranges")
    variable: str = option("straight-through", "what rounding is trained by: sigmoid, straight-through, division")
    moves: str = option("up-down", "how far codes may move", choices=MOVES)
    optimizer: str = option("adam", "of the rounding: adam, adamw, adamax, signsgd, sgd")
    learning_rate: float | None = option(None, "of the rounding; the optimizer's own where left out", parse=float)
    start: str | None = option(
        None, "the rounding that training begins at; left out, by the width of inputs", choices=(None, *STARTS)
    )
    augmentation: str = option("none", "of what blocks are fed", choices=AUGMENTATIONS)
    unit: str = option("block", "what is trained together", choices=UNITS)
    prediction: float = option(0.0, "weight of the error in the model's answer", low=0.0)
    correction: bool = option(False, "correct the distribution of the blocks' inputs")

    def check(self) -> None:
        """Raises UserError where an option is none of its choices. Lists, as JSON has them, become tuples."""
        check_fields(self, type(self).__name__)
        self.train, self.time_weights = tuple(self.train), tuple(self.time_weights)
        VARIABLES.find(self.variable)
        OPTIMIZERS.find(self.optimizer)
        if not self.train or set(self.train) - set(TRAINED):
            raise UserError(f"train is some of {', '.join(TRAINED)}; got {', '.join(self.train) or 'nothing'}.")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise UserError(f"learning_rate must be above zero; got {self.learning_rate}.")
        if self.time_weights and not sum(self.time_weights) > 0:
            raise UserError("one of time_weights must be above zero.")

    @classmethod
    def of(cls, options: Any) -> Learning:
        """The options of a recipe that has them all."""
        return cls(**{item.name: getattr(options, item.name) for item in fields(cls)})

    @property
    def origin(self) -> str:
        """The rounding that trained codes begin at."""
        return self.start or "gptq"

    @property
    def begin(self) -> str:
        """The rounding that training begins at: that to nearest, where rounding is not trained."""
        return self.origin if "rounding" in self.train else "nearest"

    @property
    def rate(self) -> float:
        """The learning rate of the rounding: the optimizer's own is of straight-through codes that start at gptq."""
        if self.learning_rate is not None:
            return self.learning_rate
        return OPTIMIZERS.find(self.optimizer).learning_rate * VARIABLES.find(self.variable).paces[self.origin]


def learning_from(data: Any) -> Learning:
    """The options of a dict. Raises ValueError where it has one that nobody knows, or a value of another type."""
    if not isinstance(data, dict) or set(data) - {item.name for item in fields(Learning)}:
        raise ValueError("its 'learning' is no options of block training")
    options: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in data.items()}
    found = Learning(**options)
    check_types(found)
    return found


def near(steps: Tensor, first: Tensor) -> Tensor:
    """Where weights begin that are to begin at the codes `first`: as near to their own place as rounds to these."""
    return first + (steps - first).clamp(-NEAR, NEAR)


@register_rounder("learned", needs=frozenset({"rows"}), grids=("uniform", "power"))
def learned(weight: Tensor, grid: Grid, evidence: LayerEvidence) -> Tensor:
    """Codes [N, K] of weight [N, K] float32 on the grid, trained on the rows of the evidence; no output is worse than
    under Hessian rounding.

    Raises UserError where the rows hold NaN or infinity.
    """
    hessian = evidence.hessian.to(weight.device, torch.float32)
    if not hessian.isfinite().all():
        raise UserError("a layer's inputs hold NaN or infinity: no rounding fits them; calibrate anew.")
    hessian = hessian / hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    low, high = grid.ends(weight.shape[1])
    zeros = grid.low - low
    start = gptq(weight, grid, evidence)
    first = start.float() - zeros
    codes = VARIABLES["straight-through"](near(grid.steps(weight), first), low, high)

    def errors(found: Tensor) -> Tensor:
        """[N] of the outputs."""
        wrong = weight - grid.values(found)
        return ((wrong @ hessian) * wrong).sum(1)

    choice = OPTIMIZERS["adam"]
    optimizer = choice.make([codes.value], choice.learning_rate)
    with torch.enable_grad():
        for step in range(STEPS):
            gradients = torch.autograd.grad(errors(codes.soft() + zeros).sum(), [codes.value])
            move(optimizer, [codes.value], gradients, choice.learning_rate * falling(step, STEPS))
            codes.project()
    found = (codes.hard() + zeros).to(torch.int8)
    better = errors(found.float()) < errors(start.float())
    return torch.where(better[:, None], found, start)
