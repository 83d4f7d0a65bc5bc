"""What a plan says of a rotated input; and how the plan of a layer becomes that of a rotated one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import UserError
from ...kernels.formats.rotation import check_rotation
from ...transforms.base import TransformPlan, is_online
from ..choices import check_groups

Rotated = Callable[[Any, int, str], Any]
"""(plan, group, kind) -> the plan of the same layer with a rotated input."""

ROTATED: dict[type, Rotated] = {}
"""The class of a plan -> what makes one of a rotated input of it."""


@dataclass
class RotatedChoices:
    """What plans of a rotated input share, beside the plan of the format that they are of.

    hadamard_group: inputs that are rotated together, of a convolution channels of one pixel. hadamard_kind: "regular"
        or "sylvester", as kernels/formats/rotation.py has them.
    """

    hadamard_group: int = 64
    hadamard_kind: str = "regular"

    def check(self) -> None:
        """Raises ValueError where a choice is out of its range, or does not go with another."""
        super().check()  # type: ignore[misc]  # the format's, which comes after this class
        check_rotation(self.hadamard_group, self.hadamard_kind)

    def check_layer(self, layer: nn.Module) -> None:
        """Raises ValueError where the channels of a float layer do not divide into groups."""
        super().check_layer(layer)  # type: ignore[misc]
        check_groups(layer, self.hadamard_group)

    @property
    def groups_text(self) -> str:
        return f"{super().groups_text} {rotation_text(self.hadamard_group, self.hadamard_kind)}"  # type: ignore[misc]


def rotation_text(group: int, kind: str) -> str:
    """A rotation in the words of reports."""
    return f"hadamard {group}" if kind == "regular" else f"{kind} {group}"


def with_rotations(plans: Mapping[str, Any], transforms: Iterable[TransformPlan]) -> dict[str, Any]:
    """The plans of layers, by name, with the rotations of their inputs that transforms say; others as they are.

    Raises UserError where a format has no layers of rotated inputs, or no layer of the plan would be rotated.
    """
    made = dict(plans)
    for transform in transforms:
        if not is_online(transform.kind):
            continue
        group, kind = transform.options["group"], transform.options["kind"]
        for name in transform.modules:
            if name in plans:
                made[name] = _rotated(name, plans[name], group, kind)
    return made


def _rotated(name: str, plan: Any, group: int, kind: str) -> Any:
    make = ROTATED.get(type(plan))
    if make is None:
        raise UserError(
            f"layer '{name}' is of format '{plan.format}', which has no rotated inputs; leave hadamard and sylvester "
            "out of transforms, or choose other options."
        )
    return make(plan, group, kind)
