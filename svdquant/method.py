"""SVDQuant: "Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models", Li et al., arXiv:2411.05007.

1. Trace the model: which layers share an input, which are fed tokens, which embeddings.
2. Block by block, capture what the layers are fed on calibration tuples; quantize each group: `group`.
3. Layers that are no matrix product over tokens, or do not divide into groups, stay at 8 bits or in full precision.

No model is named: roles come from the calls and from shapes, and `roles` overrides them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..allocation.roles import ROLES, BlockRoles, allocate
from ..calibration.trace import trace
from ..errors import UserError
from ..kernels.w4.reference import ACTIVATIONS
from ..layers.plan import LayerPlan
from ..layers.view import LayerView
from ..options import number_or_word, option
from ..quantization.input_grids import int8_grid
from ..quantization.recipe import QuantConfig, register
from ..rounding import ROUNDERS
from . import packing  # noqa: F401, registers the format
from .layers.plan import SVDQPlan

GROUP_SIZES = (16, 32, 64, 128)


@register("svdquant")
@dataclass(repr=False)
class SVDQuantConfig(QuantConfig):
    """SVDQuant W4A4 or W4A8, with everything else of the model in 8 bits or kept.

    A plan of this method gives the same codes, bit for bit, with the same store, num_tuples and seed: rounding looks
    at calibration inputs.

    rank: of the low-rank branch; 0 leaves it out.
    group_size: inputs per weight scale (and per activation scale of int4).
    activations: "int4" (per token and group), "int8" or "fp8" (per token).
    smoothing: "search"; "exhaustive" (the authors' whole grid on the enclosing module's output: slow); "none"; or a
        number, alpha, with beta = 1 - alpha.
    rounding: "gptq", "nearest" or another of rounding.ROUNDERS. refinements: most turns of branch and rounding.
    num_tuples: calibration tuples used, evenly from the store.
    unsigned: lift inputs that are the outputs of GELU or SiLU above zero and round them to 0..15 (int4 only), as the
        authors do. Off: on dit-cifar10 it costs 4 dB of same-seed PSNR (zeros then lie between two codes), and
        Nunchaku Lite checkpoints cannot hold such layers.
    roles: shell pattern of layer names -> "w4", "weight-only" (4-bit codes, inputs as they are), "int8", "keep"; the
        first that fits counts. Otherwise: token-wise Linear and 1x1 Conv2d layers of repeated blocks are "w4"; layers
        of blocks that are fed an embedding and widen it at least twice (adaLN) "weight-only"; other layers of blocks
        and all larger convolutions "int8"; the rest "keep".
    """

    rank: int = option(32, "of the low-rank branch", low=0, high=1024)
    group_size: int = option(64, "inputs per scale", choices=GROUP_SIZES)
    activations: str = option("int4", "format of inputs", choices=ACTIVATIONS[:3])
    smoothing: str | float = option("search", "search, exhaustive, none, or alpha", parse=number_or_word)
    rounding: str = option("gptq", "how weights are rounded")
    refinements: int = option(10, "most turns of branch and rounding", low=0, high=100_000)
    num_tuples: int = option(32, "calibration tuples used", low=1)
    unsigned: bool = option(False, "lift the outputs of GELU and SiLU above zero (int4)")
    roles: dict[str, str] = option({}, "layer pattern -> role", flag=False)
    seed: int = option(0, "of the rows that are kept", flag=False, low=0)

    def __post_init__(self):
        super().__post_init__()
        if self.plan is None and self.unsigned and self.activations != "int4":
            raise UserError(
                f"unsigned lifts int4 inputs, and with activations='{self.activations}' would change nothing; leave "
                "it out, or take activations='int4'."
            )
        ROUNDERS.find(self.rounding)
        number = isinstance(self.smoothing, (int, float)) and 0 <= self.smoothing <= 1
        if not number and self.smoothing not in ("search", "exhaustive", "none"):
            raise UserError(
                f"smoothing must be search, exhaustive, none or a number in [0, 1]; got {self.smoothing!r}."
            )
        if wrong := set(self.roles.values()) - set(ROLES):
            raise UserError(f"unknown role '{min(wrong)}'; choose from {', '.join(ROLES)}.")

    packs_while_loading: ClassVar[bool] = False

    @property
    def needs_calibration(self) -> bool:
        return True

    def resolve(self, model: nn.Module, views: list[LayerView], store) -> dict[str, object]:
        """Roles from how the layers are called, and a plan for each: SVDQPlan, or LayerPlan in 8 bits."""
        roles = BlockRoles(trace(model, views, store.calls), self.group_size, self.roles)
        roles.check(views)
        four: dict[str, SVDQPlan] = {}

        def w4(view: LayerView) -> SVDQPlan:
            lender = next((name for name in four if name in roles.traced[view.name].shares), "")
            four[view.name] = self._w4(lender)
            return four[view.name]

        def int8(view: LayerView) -> LayerPlan:
            seen = roles.traced.get(view.name)
            if seen is None or not seen.tokens:
                return LayerPlan()
            scale, zero = int8_grid(view, store, 8, "lp", 2.4)
            return LayerPlan("int8", 8, 8, "lp", 2.4, scale, zero)

        plans = allocate(views, {"w4": w4, "weight-only": lambda _: self._weight_only(), "int8": int8}, roles)
        if not any(isinstance(plan, SVDQPlan) for plan in plans.values()):
            raise UserError(f"no layer of the model can take 4 bits in groups of {self.group_size}; see `roles`.")
        return plans

    def _weight_only(self) -> SVDQPlan:
        return SVDQPlan(
            rank=0, group_size=self.group_size, activation="none", alpha=0.0, beta=0.0, rounding=self.rounding,
            seed=self.seed,
        )  # fmt: skip

    def _w4(self, lender: str) -> SVDQPlan:
        alpha = beta = None
        if self.smoothing == "none":
            alpha = beta = 0.0
        elif not isinstance(self.smoothing, str):
            alpha, beta = float(self.smoothing), 1 - float(self.smoothing)
        return SVDQPlan(
            rank=self.rank, group_size=self.group_size, activation=self.activations, alpha=alpha, beta=beta,
            lender=lender, rounding=self.rounding, refinements=self.refinements,
            shift=None if self.unsigned and self.activations == "int4" else 0.0, seed=self.seed,
            search="exhaustive" if self.smoothing == "exhaustive" else "finalists",
        )  # fmt: skip
