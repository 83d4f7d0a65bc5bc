"""Group-wise Hadamard rotations of what layers are fed, made in every call: "hadamard" (regular), "sylvester".

    y = (x H)(W H)^T        H: kernels/formats/rotation.py

No calibration and no neighbour is needed: H stands in the layer itself, which rotates its input while it quantizes it
(layers/rotated). So every layer is found whose channels divide into groups, and layers that share an input share its
rotation. ConvRot, arXiv 2512.03673, is "hadamard:256".
"""

from __future__ import annotations

from torch import nn

from ..errors import UserError
from ..kernels.formats.rotation import check_rotation, groups_of
from .base import Evidence, TransformPlan, check_holds, register_transform


def channels_of(layer: nn.Module | None) -> int:
    """The channels of a Linear or Conv2d that one output reads; 0 for other modules."""
    if layer is not None and type(layer) is nn.Linear:
        return layer.in_features
    if layer is not None and type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
        return layer.in_channels // layer.groups
    return 0


class _Online:
    """A rotation by one kind of matrix. `online`: layers change while they are packed, the float model does not."""

    name: str
    kind: str
    online = True
    needs: frozenset[str] = frozenset()

    def find(
        self, model: nn.Module, evidence: Evidence | None = None, *, group: float | None = None
    ) -> list[TransformPlan]:
        """Plans with the options `group` and `kind`, one for each size of groups.

        group: the size; None takes for each layer the largest that divides its channels.

        Raises UserError for a size that there is not, or that no layer's channels divide into.
        """
        if group is not None:
            self.check_options(group=group)
        sizes = groups_of(self.kind) if group is None else (int(group),)
        found: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            channels = channels_of(module)
            largest = max((size for size in sizes if channels and channels % size == 0), default=0)
            if largest:
                found.setdefault(largest, []).append(name)
        if not found:
            raise UserError(
                f"'{self.name}' rotates inputs whose channels divide into groups of {' or '.join(map(str, sizes))}, "
                "and the model has none."
            )
        return [TransformPlan(self.name, found[size], {"group": size, "kind": self.kind}) for size in sorted(found)]

    def check_options(self, *, group: float) -> None:
        """Raises UserError for a size that there is not."""
        try:
            check_rotation(group, self.kind)
        except ValueError as error:
            raise UserError(f"'{self.name}': {error}") from None

    def check_plan(self, plan: TransformPlan) -> None:
        """Raises UserError where a plan can be of no model."""
        check_holds(plan, {"group": int, "kind": str}, {})
        if plan.options.get("kind") != self.kind or "group" not in plan.options:
            raise UserError(f"the plan of '{plan.kind}' for {plan.modules} has no group of a {self.kind} rotation.")
        self.check_options(group=plan.options["group"])

    def check(self, model: nn.Module, *plans: TransformPlan) -> None:
        """Raises UserError where a plan does not fit the model."""
        modules = dict(model.named_modules())
        for plan in plans:
            self.check_plan(plan)
            for name in plan.modules:
                channels = channels_of(modules.get(name))
                if not channels or channels % plan.options["group"]:
                    raise UserError(
                        f"the plan of '{plan.kind}' is of another model: there is no layer '{name}' whose channels "
                        f"divide into groups of {plan.options['group']}."
                    )

    def apply(self, model: nn.Module, *plans: TransformPlan) -> None:
        """Check the plans; the layers rotate their weights when they are packed, and their inputs in every call."""
        self.check(model, *plans)


@register_transform("hadamard")
class Regular(_Online):
    """A rotation of inputs by regular Hadamard matrices, in groups of 16, 64 or 256."""

    kind = "regular"


@register_transform("sylvester")
class Sylvester(_Online):
    """A rotation of inputs by Hadamard matrices of Sylvester, in groups of 16, 32, 64, 128 or 256."""

    kind = "sylvester"
