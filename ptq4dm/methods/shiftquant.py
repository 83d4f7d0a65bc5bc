"""What `ptq4dm train --norm l1` leaves: a model in floats whose norms are another function than its class has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..calibration.store import CalibrationStore
from ..errors import UserError
from ..layers.plan import LayerPlan
from ..layers.view import LayerView
from ..quantization.recipe import QuantConfig, register


@register("shiftquant")
@dataclass(repr=False)
class TrainedConfig(QuantConfig):
    """What such a model is saved with, so that it loads with its norms, and not without ptq4dm: no layer is packed,
    and its plan names norms alone. Any recipe quantizes it, and its plan then names them, too."""

    packs_while_loading: ClassVar[bool] = False
    loaded_only: ClassVar[bool] = True
    norms_only: ClassVar[bool] = True

    def resolve(
        self, model: nn.Module, views: list[LayerView], store: CalibrationStore | None
    ) -> dict[str, LayerPlan]:
        raise UserError("a trained model is floats; quantize it with a recipe, such as RTNConfig.")
