"""Quantized layers: codes, scales and bias, nothing else.

They subclass nn.Linear and nn.Conv2d so that tools that look for those types (LoRA adapters, offloading) find
them; `weight` tells the facts of the float weight (weight.py), of which no copy exists. A format is a pair of classes
that add `_allocate`, `pack`, `forward`, `dequantized_weight` and `kernel_name` to those here, and a line of
registry.py. `forward`'s argument is called `input`, as in nn.Linear: some models call their layers by keyword.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .weight import QuantizedWeight


class QuantizedLayer:
    """What all quantized layers share; a format's classes inherit from this first, then from nn.Linear or nn.Conv2d.

    They have `qweight`, the codes; `dequantized_weight()`, float32 and made anew in each call; and `kernel_name()`,
    the kernel that serves the layer where its codes are now. All tensors are nn.Parameters without gradient, so that
    device maps with offloading move them. A model's `dtype` is that of its first floating parameter: so `bias` or,
    where there is none, `like` is registered before scales and codes.

    plan: the choices that the layer was made by, of the class that its format registered.
    kept: names of the floating tensors that keep their dtype whatever the model is converted to.
    scales: names of the tensors that are finite and above zero in every file (stored.py checks it).
    like: [1] zero in the model's dtype, in layers without a bias; else None.
    """

    plan: Any
    kept: tuple[str, ...] = ()
    scales: tuple[str, ...] = ()
    qweight: Tensor
    bias: nn.Parameter | None
    like: nn.Parameter | None
    training: bool

    def __new__(cls, layer: Any = None, *sizes: Any, **options: Any) -> Any:
        """peft makes a convolution's adapters as `type(layer)(inputs, outputs, ...)`: those are float layers."""
        return nn.Conv2d(layer, *sizes, **options) if isinstance(layer, int) else super().__new__(cls)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """What `.to()` and `.half()` go through: kept tensors move but stay what they are, and nothing becomes an
        8-bit float (diffusers' layerwise casting would store scales so)."""
        kept = [getattr(self, name) for name in self.kept]

        def careful(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            keep = any(tensor is one for one in kept) or new.dtype.itemsize == 1
            return tensor.to(new.device) if keep and new.dtype != tensor.dtype else new

        return super()._apply(careful, recurse)  # type: ignore[misc]  # nn.Module's, which comes after this class

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise UserError(
                "a quantized layer has codes and no weight that could be set; quantize the changed model."
            )
        super().__setattr__(name, value)

    def _allocate_bias(self, layer: nn.Module, bias: bool, device: torch.device | str | None) -> None:
        """Room for a bias in the dtype of the float layer or, without one, `like`."""
        outputs, dtype = self.weight_shape[0], (layer.weight if layer.bias is None else layer.bias).dtype
        self.bias = frozen(outputs, dtype=dtype, device=device) if bias else None
        self.like = None if bias else nn.Parameter(torch.zeros(1, dtype=dtype, device=device), requires_grad=False)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Files of versions before `like` have none: it is zero anyway."""
        if self.like is not None and f"{prefix}like" not in state_dict:
            state_dict[f"{prefix}like"] = torch.zeros_like(self.like)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def stored_dtypes(self, name: str) -> tuple[torch.dtype, ...]:
        """The dtypes that a file may have for a tensor of the layer: the one that it is allocated with."""
        return (getattr(self, name).dtype,)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError where a file's tensors disagree with the plan. For formats that have more to say than
        `scales`; called on an empty layer, with tensors of the right names, dtypes and shapes."""

    def check_codes(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError where a file's codes are not on the grid; for formats with codes to spare."""

    @property
    def model_dtype(self) -> torch.dtype:
        """The dtype of the model around the layer: that of the weight before it was quantized."""
        first = self.like if self.bias is None else self.bias
        return torch.get_default_dtype() if first is None else first.dtype

    @property
    def added(self) -> Tensor | None:
        """What is added to the product [N]: the bias, and what a format has to say beside it."""
        return self.bias

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The float weight's shape."""
        if isinstance(self, nn.Conv2d):
            return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return (self.out_features, self.in_features)  # type: ignore[attr-defined]  # nn.Linear's

    @property
    def weight(self) -> Tensor:
        """Shape, dtype and device of the float weight; whoever wants values is told where they are (weight.py)."""
        if torch.compiler.is_compiling():  # a plain tensor; where facts alone are read, it falls out of the graph
            return self.dequantized_weight().to(self.model_dtype)
        return QuantizedWeight(self)

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """The codes by the name that makes peft ask for `dequantize()` where it needs values: for DoRA."""
        return self.qweight

    def dequantize(self) -> Tensor:
        """The dequantized weight in the model's dtype."""
        return self.dequantized_weight().to(self.model_dtype)

    def dequantized_weight(self) -> Tensor:
        """The float32 weight that the codes stand for, made anew in each call."""
        raise NotImplementedError

    def kernel_name(self) -> str:
        """The kernel that serves this layer where its codes are now."""
        raise NotImplementedError

    def why_not_fused(self) -> str:
        """Why fused forward passes (fuse.py) cannot have the layer, as the end of a sentence; "" where they can."""
        return f"is {self.plan}, for which there are no fused kernels"

    def why_not_in_blocks(self) -> str:
        """The same of the blocks in fusing/blocks.py.

        Classes that these take say `in_blocks = True`, and have `input_codes(x, more, norm)`, which layers of one
        `codes_key` share, and `multiply(x or codes, nonlinearity)`.
        """
        return f"is {self.plan}, for which there are no fused kernels"

    def has_block_kernels(self) -> bool:
        """Whether kernels serve those blocks where the layer is."""
        return False

    takes_norms = False  # whether `encode` takes over a norm, or a gate, that lies before the layer

    def codes_key(self) -> Any:
        """What decides about the codes of an input: layers of one key, a layer or a tuple, read the same codes. None
        where the layer takes none."""
        return None

    def encode(self, x: Tensor, norm: tuple | None, dtype: torch.dtype, gate: tuple | None = None) -> Any:
        """Codes of x [..., K], or of a norm of it as kernels/w4/from_codes.py has it, for layers of the same key.

        dtype: of their outputs. gate: (tensor like x, name of the function of it) that x is multiplied by, or None.
        """
        raise NotImplementedError

    def _float_layer(self) -> nn.Module:
        """A float layer of the same shape, without tensors."""
        raise NotImplementedError

    def kernels(self) -> dict[str, str]:
        """The kernels that serve this layer, by the rows of its input: {"all rows": name}, or one name for few rows
        and one for more."""
        return {"all rows": self.kernel_name()}

    def kernels_text(self) -> str:
        """The kernels in a few words, for reports."""
        return ", ".join(name if rows == "all rows" else f"{name} ({rows})" for rows, name in self.kernels().items())

    def dequantized(self) -> nn.Module:
        """A float layer with the dequantized weight, in the model's dtype."""
        layer = self._float_layer()
        layer.weight = nn.Parameter(self.dequantize())
        layer.bias = self.bias
        return layer.train(self.training)

    def put(self, **values: Tensor) -> None:
        """Set tensors of the layer to these values, as parameters without gradient."""
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value.detach(), requires_grad=False))


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """x [..., K] float -> [..., N] in x's dtype."""

    def __init__(self, linear: nn.Linear, plan: Any, device: torch.device | str | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.plan = plan
        self._allocate_bias(linear, linear.bias is not None, device)
        self._allocate(self.weight_shape, device)

    def _float_layer(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, bias=False, device="meta")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.plan}"


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """Zero-padded convolution: x [B, C, H, W] float -> [B, N, H', W'] in x's dtype."""

    def __init__(self, conv: nn.Conv2d, plan: Any, device: torch.device | str | None = None) -> None:
        nn.Module.__init__(self)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups"):
            setattr(self, name, getattr(conv, name))
        self.padding, self.padding_mode = numeric_padding(conv), "zeros"
        self.plan = plan
        self._allocate_bias(conv, conv.bias is not None, device)
        self._allocate(self.weight_shape, device)

    @property
    def geometry(self) -> tuple:
        """Sizes of its windows, where they lie, and its groups, as torch and the ops of convolutions take them."""
        return self.kernel_size, self.stride, self.padding, self.dilation, self.groups

    def _float_layer(self) -> nn.Conv2d:
        return nn.Conv2d(self.in_channels, self.out_channels, *self.geometry, bias=False, device="meta")

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, {self.plan}"


def frozen(*size: int, dtype: torch.dtype, device: torch.device | str | None) -> nn.Parameter:
    """An empty parameter without gradient."""
    return nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a quantized layer of any format."""
    return isinstance(module, QuantizedLayer)


def holds_quantized(network: nn.Module) -> bool:
    """Whether a network has a quantized layer."""
    return any(is_quantized(module) for module in network.modules())


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place that the dotted name says."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    if child.isdigit() and isinstance(owner, (nn.Sequential, nn.ModuleList)):
        owner[int(child)] = new
    else:
        setattr(owner, child, new)


def numeric_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """The padding of a convolution on each side, in pixels."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return tuple(conv.padding)
