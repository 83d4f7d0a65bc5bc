"""`weight` of a quantized layer: the facts of the float weight that the codes took the place of, not its values.

Tools ask `layer.weight` for a shape, a dtype or a device: where an adapter goes, what an input is cast to. These get
the answers of the float weight. Whoever wants values gets one sentence, but for a few uses in which the dequantized
weight is what is meant: a product by it outside of the layer (models that hand `layer.weight` to F.linear), a part of
it for such a product, and the sum of it and a change of the same shape (DoRA's norm).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import UserError

PRODUCTS = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.multi_head_attention_forward}
PARTS = {Tensor.__getitem__, Tensor.chunk, Tensor.split, Tensor.narrow, torch.chunk, torch.split, torch.narrow}
SUMS = {Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add}
SELF = {Tensor.data.__get__, Tensor.detach, torch.detach}
LIKE = {  # new tensors, made like it
    torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like,
    Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor,
}  # fmt: skip
NO_FACTS = {Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.share_memory_}


class QuantizedWeight(Tensor):
    """Shape, dtype and device of a quantized layer's float weight; it has no memory and cannot be changed."""

    layer: Any  # a QuantizedLayer
    _is_hf_initialized = True  # transformers asks which weights of a loaded model have no values yet

    @staticmethod
    def __new__(cls, layer: Any) -> QuantizedWeight:
        facts = {"dtype": layer.model_dtype, "device": layer.qweight.device, "requires_grad": False}
        weight = Tensor._make_wrapper_subclass(cls, layer.weight_shape, **facts)
        weight.layer = layer
        return weight

    def values(self) -> Tensor:
        """The dequantized weight in the model's dtype, made anew."""
        return self.layer.dequantized_weight().to(self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in SELF:
            return args[0]
        if func in PRODUCTS or func in PARTS or (func in SUMS and _same_shape(args)) or _copies(func, args):
            return func(*tree_map(_values, args), **tree_map(_values, kwargs))
        if func in LIKE:
            return func(*tree_map(_empty, args), **tree_map(_empty, kwargs))
        if func in NO_FACTS or _sets(func, args):
            refuse(args)
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)  # facts; what needs values comes to __torch_dispatch__
        except (RuntimeError, NotImplementedError):
            refuse((args, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        refuse((args, kwargs or {}))

    def __repr__(self, **_: Any) -> str:
        facts = f"{tuple(self.shape)}, dtype={self.dtype}, device='{self.device}'"
        return f"QuantizedWeight({facts}, of {type(self.layer).__name__} {self.layer.plan})"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __deepcopy__(self, memo: dict) -> NoReturn:
        refuse(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse(self)


def refuse(arguments: Any) -> NoReturn:
    """Raise the one error for whoever wants values of a weight that is among the arguments."""
    found: list[QuantizedWeight] = []
    tree_map(lambda leaf: found.append(leaf) if isinstance(leaf, QuantizedWeight) else None, arguments)
    what = "a quantized layer"
    if found:
        what = f"{type(found[0].layer).__name__} ({found[0].layer.plan})"
    raise UserError(
        f"the weight of {what} is kept as codes and cannot be computed with or changed; call the layer, take "
        "layer.dequantized_weight() for values, or do this to the model in full precision and quantize it then."
    )


def _values(leaf: Any) -> Any:
    return leaf.values() if isinstance(leaf, QuantizedWeight) else leaf


def _empty(leaf: Any) -> Any:
    """A tensor of the same facts in the memory of one element."""
    if not isinstance(leaf, QuantizedWeight):
        return leaf
    return torch.empty((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)


def _same_shape(args: tuple) -> bool:
    """Whether a sum is that of a weight and its change: not that of a weight and a number, or of a bias."""
    return len(args) == 2 and all(isinstance(arg, Tensor) for arg in args) and args[0].shape == args[1].shape


def _sets(func: Any, args: tuple) -> bool:
    """Whether an attribute is set: only that the weight takes no gradient is true anyway."""
    name = getattr(func, "__name__", "")
    return name in ("__set__", "set_", "requires_grad_") and not (len(args) == 2 and args[1] is False)


def _copies(func: Any, args: tuple) -> bool:
    """Whether values are written into a part of a float tensor: a layer that takes the place of this one grows."""
    return func is Tensor.__setitem__ and not isinstance(args[0], QuantizedWeight)


class StateDict(OrderedDict):
    """The tensors of a model with quantized layers. Asked for one, it also knows `<layer>.weight`, which is not among
    them: diffusers' LoRA loader of FLUX reads shapes off there."""

    layers: dict[str, nn.Module]

    def __missing__(self, key: str) -> Tensor:
        if key not in self:
            raise KeyError(key)
        return QuantizedWeight(self.layers[key])

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self.layers

    def __reduce__(self) -> tuple:
        return OrderedDict, (list(self.items()),)


def answer_for_weights(model: nn.Module, state_dict: OrderedDict, prefix: str, local_metadata: dict) -> OrderedDict:
    """A hook of `state_dict()` that makes a StateDict of what it gives."""
    known = StateDict(state_dict)
    known._metadata = getattr(state_dict, "_metadata", None)  # type: ignore[attr-defined]
    known.layers = {
        f"{prefix}{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(getattr(type(module), "weight", None), property) and hasattr(module, "dequantized_weight")
    }
    return known
