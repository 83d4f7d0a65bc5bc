"""The mark of a model whose layers came from a file of another tool: it is saved and loaded as our own are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UserError
from ..quantization.recipe import QuantConfig, register


@register("loaded-file")
@dataclass(repr=False)
class ImportedConfig(QuantConfig):
    """Mark of such a model; it cannot quantize anything itself."""

    packs_while_loading: ClassVar[bool] = False
    loaded_only: ClassVar[bool] = True

    def resolve(self, model: Any, views: Any, store: Any) -> dict[str, Any]:
        raise UserError("the method 'loaded-file' stands for layers read from a file; quantize with another.")
