"""SVDQuant: "Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models", Li et al., arXiv:2411.05007.

1. Trace the model: which layers share an input, which are fed tokens, which embeddings.
2. Block by block, capture what the layers are fed on calibration tuples; quantize each group: `group`.
3. Layers that are no matrix product over tokens, or do not divide into groups, stay at 8 bits or in full precision.

No model is named: roles come from the calls and from shapes, and `roles` overrides them.

With evidence="none" there are no calls: roles are estimated from the model's structure (allocation/structure.py), and
each layer is quantized from its weight alone (layers/data_free.py), also while a model loads.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..allocation.roles import ROLES, BlockRoles, allocate
from ..allocation.structure import estimate
from ..calibration.trace import trace
from ..errors import UserError
from ..kernels.w4.reference import ACTIVATIONS
from ..layers.plan import LayerPlan
from ..layers.view import LayerView
from ..options import is_given, number_or_word, option
from ..quantization.input_grids import int8_grid
from ..quantization.recipe import QuantConfig, register
from ..rounding import ROUNDERS
from ..transforms.named import named
from . import packing  # noqa: F401, registers the format
from .layers.plan import SUBSPACES, SVDQPlan

GROUP_SIZES = (16, 32, 64, 128)
EVIDENCE = ("store", "calls", "none")
MOST_CALLS = 1000


@register("svdquant")
@dataclass(repr=False)
class SVDQuantConfig(QuantConfig):
    """SVDQuant W4A4 or W4A8, with everything else of the model in 8 bits or kept.

    A plan of this method gives the same codes, bit for bit, with the same store, num_tuples and seed: rounding looks
    at calibration inputs.

    rank: of the low-rank branch; 0 leaves it out.
    group_size: inputs per weight scale (and per activation scale of int4).
    activations: "int4" (per token and group), "int8" or "fp8" (per token).
    smoothing: "search", where nothing is said; "exhaustive" (the authors' whole grid on the enclosing module's
        output: slow); "none"; or a number, alpha, with beta = 1 - alpha.
    rounding: "gptq", where nothing is said; "nearest" or another of rounding.ROUNDERS. refinements: most turns of
        branch and rounding.
    num_tuples: calibration tuples used, evenly from the store.
    unsigned: lift inputs that are the outputs of GELU or SiLU above zero and round them to 0..15 (int4 only), as the
        authors do. Off: on dit-cifar10 it costs 4 dB of same-seed PSNR (zeros then lie between two codes), and
        Nunchaku Lite checkpoints cannot hold such layers.
    evidence: "store", what layers are fed in calibration; "calls", the first `num_calls` calls of each network's own
        use, which run in full precision, and in the last of which it is quantized (a store, or recorded calls, take
        their place); they are of a few times alone, so grids of 8-bit inputs are made in each call, and "weight-only"
        layers have 8 bits; or "none", weights alone: no calibration, no smoothing, rounding to nearest, "weight-only"
        layers in 8 bits; found in seconds. A store then only measures errors.
    subspace: what the branch holds: "weight", the paper's; or "inputs", the directions in which inputs are largest,
        which are left out of what is rounded (group.py).
    roles: shell pattern of layer names -> "w4", "weight-only" (4-bit codes, inputs as they are), "int8", "keep"; the
        first that fits counts. Otherwise: token-wise Linear and 1x1 Conv2d layers of repeated blocks are "w4"; layers
        of blocks that are fed an embedding and widen it at least twice (adaLN) "weight-only"; other layers of blocks
        and all larger convolutions "int8"; the rest "keep".
    """

    rank: int = option(32, "of the low-rank branch", low=0, high=1024)
    group_size: int = option(64, "inputs per scale", choices=GROUP_SIZES)
    activations: str = option("int4", "format of inputs", choices=ACTIVATIONS[:3])
    smoothing: str | float | None = option(
        None, "search, exhaustive, none, or alpha; left out, search, and none without evidence", parse=number_or_word
    )
    rounding: str | None = option(None, "how weights are rounded; left out, gptq, and nearest without evidence")
    refinements: int = option(10, "most turns of branch and rounding", low=0, high=100_000)
    num_tuples: int = option(32, "calibration tuples used", low=1)
    unsigned: bool = option(False, "lift the outputs of GELU and SiLU above zero (int4)")
    evidence: str = option("store", "what codes are found by: a calibration store, calls, or none", choices=EVIDENCE)
    num_calls: int = option(
        4,
        "evidence calls: of the model that are waited for (each --batch-size images, else 1)",
        low=1,
        high=MOST_CALLS,
    )
    subspace: str = option("weight", "what the branch holds: of the weight, or of the inputs", choices=SUBSPACES)
    roles: dict[str, str] = option({}, "layer pattern -> role", flag=False)
    seed: int = option(0, "of the rows that are kept", flag=False, low=0)

    def __post_init__(self):
        super().__post_init__()
        if self.plan is None and self.unsigned and self.activations != "int4":
            raise UserError(
                f"unsigned lifts int4 inputs, and with activations='{self.activations}' would change nothing; leave "
                "it out, or take activations='int4'."
            )
        if self.plan is None and self.unsigned and (self.rotates or self.subspace == "inputs"):
            raise UserError(
                "unsigned lifts the outputs of GELU and SiLU, and inputs that are rotated or left without their "
                "largest directions are none; leave it out, or transforms and subspace."
            )
        if self.plan is None and self.evidence != "calls" and is_given(self, "num_calls"):
            raise UserError("num_calls is of calls that are waited for; take evidence='calls', or leave it out.")
        alone = self.evidence == "none"
        if self.plan is None and self.subspace == "inputs" and (alone or not self.rank):
            raise UserError(
                "subspace='inputs' keeps directions of inputs in the branch: it looks at what layers are fed, and "
                "needs a rank; take evidence='store' and rank=32, or leave it out."
            )
        if self.smoothing is None:
            self.smoothing = "none" if alone else "search"
        if self.rounding is None:
            self.rounding = "nearest" if alone else "gptq"
        ROUNDERS.find(self.rounding)
        if self.plan is None and alone and self._asks_inputs:
            raise UserError(
                "evidence='none' rounds to nearest, and smooths and lifts nothing; leave out rounding, smoothing and "
                "unsigned, or take evidence='store', which knows what layers are fed."
            )
        looking = [text for text in self.transforms if named(text)[0].needs]
        if self.plan is None and alone and looking:
            raise UserError(
                f"evidence='none' looks at no calibration, and the transform '{looking[0]}' does; leave it out, or "
                "take evidence='store'."
            )
        number = isinstance(self.smoothing, (int, float)) and 0 <= self.smoothing <= 1
        if not number and self.smoothing not in ("search", "exhaustive", "none"):
            raise UserError(
                f"smoothing must be search, exhaustive, none or a number in [0, 1]; got {self.smoothing!r}."
            )
        if wrong := set(self.roles.values()) - set(ROLES):
            raise UserError(f"unknown role '{min(wrong)}'; choose from {', '.join(ROLES)}.")

    @property
    def _asks_inputs(self) -> bool:
        """Whether choices are made that look at what layers are fed."""
        return self.unsigned or self.smoothing != "none" or self.rounding != "nearest"

    @property
    def _layer_evidence(self) -> str:
        """The same for layers, which are fed alike by a store and by calls."""
        return "none" if self.evidence == "none" else "store"

    @property
    def packs_while_loading(self) -> bool:  # type: ignore[override]  # here an option decides
        """Whether each layer can be packed as its weight arrives."""
        return self.evidence == "none"

    @property
    def needs_calibration(self) -> bool:
        return self.evidence != "none" or super().needs_calibration

    @property
    def awaited_calls(self) -> int:
        return self.num_calls if self.evidence == "calls" else 0

    @property
    def looks_at_tuples(self) -> bool:
        return self.evidence != "none"

    def otherwise(self, loading: bool = False) -> str:
        needed = self.unsigned or self.smoothing not in ("search", "none") or self.rounding not in ("gptq", "nearest")
        ways = [] if loading or self.evidence == "calls" else ["evidence='calls'"]
        ways += [] if needed or super().needs_calibration else ["evidence='none'"]
        return f", or choose {' or '.join(ways)}" if ways else ""

    def resolve(self, model: nn.Module, views: list[LayerView], store) -> dict[str, object]:
        """Roles from how the layers are called, and a plan for each: SVDQPlan, or LayerPlan in 8 bits."""
        alone, calibrated = self.evidence == "none", self.evidence == "store"
        called = estimate(model, views) if alone else trace(model, views, store.calls)
        roles = BlockRoles(called, self.group_size, self.roles)
        roles.check(views)
        four: dict[str, SVDQPlan] = {}

        def w4(view: LayerView) -> SVDQPlan:
            lender = next((name for name in four if name in called[view.name].shares), "")
            four[view.name] = self._w4(lender)
            return four[view.name]

        def int8(view: LayerView) -> LayerPlan:
            seen = called.get(view.name)
            if not calibrated or seen is None or not seen.tokens:
                return LayerPlan()
            scale, zero = int8_grid(view, store, 8, "lp", 2.4)
            return LayerPlan("int8", 8, 8, "lp", 2.4, scale, zero)

        def weight_only(view: LayerView) -> object:
            # In 4 bits, what makes scales and shifts costs more than all other layers together where it is rounded to
            # nearest, or by inputs that the first steps alone give.
            return int8(view) if not calibrated and not view.matches(tuple(self.roles)) else self._weight_only()

        plans = allocate(views, {"w4": w4, "weight-only": weight_only, "int8": int8}, roles)
        if not any(isinstance(plan, SVDQPlan) for plan in plans.values()):
            raise UserError(f"no layer of the model can take 4 bits in groups of {self.group_size}; see `roles`.")
        return plans

    def _weight_only(self) -> SVDQPlan:
        return SVDQPlan(
            rank=0, group_size=self.group_size, activation="none", alpha=0.0, beta=0.0, rounding=self.rounding,
            seed=self.seed, evidence=self._layer_evidence,
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
            search="exhaustive" if self.smoothing == "exhaustive" else "finalists", evidence=self._layer_evidence,
            subspace=self.subspace,
        )  # fmt: skip
