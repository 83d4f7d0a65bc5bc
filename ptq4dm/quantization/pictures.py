"""Pictures of what a method did to a layer: a method that has one registers it under its name.

A picture is of one quantized layer beside the weight that it was made from, or of what the recipe found out about the
whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ..errors import UserError
from .recipe import QuantConfig


@dataclass(frozen=True)
class Picture:
    """What a method can draw of a layer.

    shows: what there is to see, with its article ("a low-rank branch").
    fits: whether a layer of this plan can be drawn. expected: whether a recipe without a plan makes such layers.
    draw: (original weight, quantized layer, title, path) -> a PNG.
    whole: (recipe that was resolved, path) -> a PNG of all layers, in place of `draw`.
    """

    shows: str
    fits: Callable[[object], bool]
    expected: Callable[[QuantConfig], bool]
    draw: Callable[[Tensor, nn.Module, str, str | Path], None] | None = None
    whole: Callable[[QuantConfig, str | Path], None] | None = None

    def draw_one(
        self, model: nn.Module, weights: dict[str, Tensor], layers: Sequence[str], name: str | None, path: str | Path
    ) -> None:
        """Draw the layer `name`, or the first of `layers` that can be drawn.

        weights: those of the model before it was quantized, by parameter name.

        Raises:
            UserError: that layer, or no layer, can be drawn.
        """
        drawable = [layer for layer in layers if self.fits(model.get_submodule(layer).plan)]
        if not drawable or (name and name not in drawable):
            raise UserError(f"--plot draws {self.shows}, which {f'{name!r}' if name else 'no layer'} has.")
        name = name or drawable[0]
        assert self.draw is not None  # else `whole` draws
        self.draw(weights[f"{name}.weight"], model.get_submodule(name), name, path)


PICTURES: dict[str, Picture] = {}


def picture_of(config: QuantConfig) -> Picture:
    """The picture that a recipe, or the plan that it follows, has.

    Raises:
        UserError: nothing of it can be drawn.
    """
    picture = PICTURES.get(config.method)
    if picture is None:
        drawn = ", ".join(f"{one.shows} ({name})" for name, one in PICTURES.items())
        raise UserError(f"--plot has nothing to draw of the method '{config.method}'; it draws {drawn}.")
    if config.plan is None:
        possible = picture.expected(config)
    else:
        possible = any(picture.fits(plan) for plan in config.plan.layers.values())
    if not possible:
        raise UserError(f"--plot draws {picture.shows}, which no layer of this recipe has.")
    if picture.whole is not None and config.plan is not None:
        raise UserError(f"--plot draws {picture.shows}, which a plan that is followed does not know.")
    return picture
