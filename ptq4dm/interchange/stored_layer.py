"""The tensors of one layer of a safetensors file, taken one by one, with what its JSON says of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class UnknownFormatError(Exception):
    """A format that there are no layers for, as the end of a sentence about a layer."""


class StoredLayer:
    """A layer by its name in the file. Its methods raise ValueError for what is missing or not as it should be.

    tensors: all of the file; those that are taken are removed. config: the layer's JSON, {} without one.
    """

    def __init__(self, name: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        self.name, self.config, self._tensors = name, config, tensors

    @property
    def dtype(self) -> torch.dtype:
        """That of the weight."""
        return self._tensors[f"{self.name}.weight"].dtype

    def has(self, key: str) -> bool:
        return f"{self.name}.{key}" in self._tensors

    def take(self, key: str, *dtypes: torch.dtype, shape: tuple[int, ...] | None = None) -> Tensor:
        """Remove a tensor of one of these types and of this shape."""
        if not self.has(key):
            raise ValueError(f"it has no {key}")
        found = self._tensors.pop(f"{self.name}.{key}")
        if found.dtype not in dtypes:
            raise ValueError(f"its {key} is {str(found.dtype).removeprefix('torch.')}")
        if shape is not None and tuple(found.shape) != shape:
            raise ValueError(f"its {key} has shape {list(found.shape)} and should have {list(shape)}")
        return found

    def matrix(self, *dtypes: torch.dtype) -> Tensor:
        """Remove the weight, of two dimensions."""
        found = self.take("weight", *dtypes)
        if found.ndim != 2:
            raise UnknownFormatError(f"a weight of {found.ndim} dimensions, and only those of Linear layers load so")
        return found

    def scales(self, outputs: int, key: str = "weight_scale") -> Tensor:
        """Remove scales: one for all outputs or one for each -> [N] float32."""
        scale = self.take(key, *FLOATS).float().flatten()
        if len(scale) not in (1, outputs):
            raise ValueError(f"its {key} holds {len(scale)} scales for {outputs} outputs")
        return scale.expand(outputs).contiguous()

    def one(self, key: str) -> float:
        """Remove a scale of one number."""
        scale = self.take(key, *FLOATS)
        if scale.numel() != 1:
            raise ValueError(f"its {key} holds {scale.numel()} numbers")
        return float(scale)

    def option(self, key: str, default: Any) -> Any:
        """An entry of the JSON, in it or in its "params"; of the default's type."""
        inner = self.config.get("params")
        value = self.config.get(key, inner.get(key, default) if isinstance(inner, dict) else default)
        if type(value) is not type(default):
            raise ValueError(f"its {key} is {value!r}")
        return value
