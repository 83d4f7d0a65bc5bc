"""What stands for a tensor between a norm and the layers that read it, or between layers that read the same.

    Handed = ops(norm(x))     a norm that is not computed yet, and what was multiplied by it and added to it since
    Handed = x f(gate)        a gated activation that is not computed yet
    Handed = x                a tensor as it is

A quantized layer that takes codes makes them of x in one launch, norm and modulation with it, and leaves them here
for the next layer of the same key: query, key and value read one input. Whoever else looks is given the tensor, which
is then computed as the model has it, to the bit: this class has `__torch_function__`, so that functions of torch take
it wherever they take a tensor. Nothing is kept beyond the call in which it was made, so nothing is stale.
torch.compile traces all of it: in compiled code the class is gone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PRODUCTS = (Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul, operator.mul)
SUMS = (Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add, operator.add)
Norm = tuple[
    Tensor, "Tensor | None", float, str
]  # scale [B, K], shift, eps, form: as kernels/w4/from_codes.py has it


@dataclass
class RowCodes:
    """Codes [M, K'] of the rows of an input [..., K], with one scale, or one for each row; dtype: of the outputs."""

    codes: Tensor
    scale: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def ndim(self) -> int:
        """Of the input: attention processors and feed-forward parts take this for it, and hand it on unread."""
        return len(self.shape)


class Handed:
    """x [B, ..., K] or a norm of it; `tensor()` computes it.

    norm: (what computes it from x, weight [K] or None, bias [K] or None, eps, "layer" or "rms"), or None. gate: (a
    tensor like x, the name of f, what computes the product from both), or None. ops: what
    came after, of ("mul" | "add", tensor) and ("to", dtype). dtype: of the result. notes: who learns which layers
    read it, see notes.py; slot: which of its inputs or outputs this is.
    """

    def __init__(
        self, x: Tensor, norm: tuple | None = None, ops: tuple = (), dtype: torch.dtype | None = None,
        notes: Any = None, slot: Any = None, gate: tuple | None = None,
    ) -> None:  # fmt: skip
        self.x, self.norm, self.ops, self.gate = x, norm, ops, gate
        self.dtype = x.dtype if dtype is None else dtype
        self.notes, self.slot = notes, slot
        self.made: list[tuple[Any, Any]] = []
        self.computed: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    @property
    def ndim(self) -> int:
        return self.x.ndim

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def is_cuda(self) -> bool:
        return self.x.is_cuda

    @property
    def requires_grad(self) -> bool:
        return self.x.requires_grad

    def size(self, *axis: Any) -> Any:
        return self.x.size(*axis)

    def dim(self) -> int:
        return self.x.ndim

    def tensor(self) -> Tensor:
        """What the model would have had here."""
        if self.norm is None and self.gate is None:
            return self.x
        if self.computed is None:
            y = self.norm[0](self.x) if self.norm is not None else self.gate[2](self.x, self.gate[0])  # type: ignore
            for kind, other in self.ops:
                y = y * other if kind == "mul" else y + other if kind == "add" else y.to(other)
            self.computed = y
        return self.computed

    def codes_for(self, layer: Any) -> Any:
        """Codes for a quantized layer, or None where it takes none."""
        key = layer.codes_key()
        if key is None:
            return None
        if self.notes is not None and not torch.compiler.is_compiling():
            self.notes.read(self.slot, key, layer)
        for other, codes in self.made:
            if same_key(other, key):
                return codes
        if self.gate is not None and layer.takes_norms:
            codes = layer.encode(self.x, None, self.dtype, self.gate[:2])
        elif self.norm is not None and layer.takes_norms:
            codes = layer.encode(self.x, self.normal_form(), self.dtype)
        else:
            codes = layer.encode(self.tensor(), None, self.dtype)
        self.made.append((key, codes))
        return codes

    def normal_form(self) -> Norm:
        """The norm and all that followed it as one: x normalised, times scale, plus shift; in the types they have."""
        _, weight, bias, eps, form = self.norm  # type: ignore[misc]
        scale, shift = (None if one is None else one[None] for one in (weight, bias))
        for kind, other in self.ops:
            if kind == "to":
                continue
            rows = other.reshape(-1, self.x.shape[-1])
            if kind == "mul":
                scale = rows if scale is None else scale * rows
                shift = None if shift is None else shift * rows
            else:
                shift = rows if shift is None else shift + rows
        if scale is None:
            scale = self.x.new_ones(1, self.x.shape[-1])
        if shift is not None and len(scale) != len(shift):
            samples = self.x.shape[0]
            scale, shift = scale.expand(samples, -1), shift.expand(samples, -1)
        return _by_columns(scale), None if shift is None else _by_columns(shift), eps, form

    def after(self, kind: str, other: Any) -> Any:
        """This, and a multiplication or a sum after it: kept for later where it is one of columns, or computed."""
        if self.norm is not None and isinstance(other, Tensor) and self._of_columns(other):
            dtype = torch.promote_types(self.dtype, other.dtype)
            return Handed(self.x, self.norm, (*self.ops, (kind, other)), dtype, self.notes, self.slot)
        other = plain(other)
        return self.tensor() * other if kind == "mul" else self.tensor() + other

    def _of_columns(self, other: Tensor) -> bool:
        """Whether a tensor holds numbers for columns, of all samples or of each, and none for rows."""
        shape = self.x.shape
        if not 0 < other.ndim <= len(shape) or other.shape[-1] != shape[-1] or not other.is_floating_point():
            return False
        if other.ndim < len(shape):
            return other.numel() == shape[-1]
        return other.shape[0] in (1, shape[0]) and other.numel() == other.shape[0] * shape[-1]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """In another type; to another device it is computed."""
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.dtype):
            dtype = args[0]
            if dtype == self.dtype or not dtype.is_floating_point:
                return self if dtype == self.dtype else self.tensor().to(dtype)
            if self.norm is None:
                return self.tensor().to(dtype)
            return Handed(self.x, self.norm, (*self.ops, ("to", dtype)), dtype, self.notes, self.slot)
        return self.tensor().to(*args, **kwargs)

    def type_as(self, other: Any) -> Any:
        return self.to(other.dtype)

    def float(self) -> Any:
        return self.to(torch.float32)

    def __mul__(self, other: Any) -> Any:
        return self.after("mul", other)

    def __rmul__(self, other: Any) -> Any:
        return self.after("mul", other)

    def __add__(self, other: Any) -> Any:
        return self.after("add", other)

    def __radd__(self, other: Any) -> Any:
        return self.after("add", other)

    def __sub__(self, other: Any) -> Tensor:
        return self.tensor() - plain(other)

    def __rsub__(self, other: Any) -> Tensor:
        return other - self.tensor()

    def __rtruediv__(self, other: Any) -> Tensor:
        return other / self.tensor()

    def __truediv__(self, other: Any) -> Tensor:
        return self.tensor() / plain(other)

    def __pow__(self, other: Any) -> Tensor:
        return self.tensor() ** plain(other)

    def __matmul__(self, other: Any) -> Tensor:
        return self.tensor() @ plain(other)

    def __neg__(self) -> Tensor:
        return -self.tensor()

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor()[index]

    def __len__(self) -> int:
        return len(self.x)

    def __getattr__(self, name: str) -> Any:
        """Whatever else a tensor has."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if not kwargs and len(args) == 2:
            mine, other = args if isinstance(args[0], cls) else args[::-1]
            if function in PRODUCTS:
                return mine.after("mul", other)
            if function in SUMS:
                return mine.after("add", other)
        if function is F.dropout and not (kwargs or {}).get("training", args[2] if len(args) > 2 else True):
            return args[0]
        given = {name: plain(value) for name, value in (kwargs or {}).items()}
        return function(*[plain(one) for one in args], **given)


def same_key(one: Any, other: Any) -> bool:
    """Whether layers of these keys (`codes_key`) read the same codes: equal tuples, or one layer.

    Tuples are not asked whether they are one object, which torch.compile cannot tell of all.
    """
    if isinstance(one, tuple) or isinstance(other, tuple):
        return isinstance(one, tuple) and isinstance(other, tuple) and one == other
    return one is other


def encoded(layer: Any, value: Any) -> tuple[Any, Any]:
    """(codes that a quantized layer takes, None), or (None, the tensor) where it takes none: of any value that comes
    in a tensor's place."""
    if not isinstance(value, Handed):
        return None, value
    codes = value.codes_for(layer)
    return (None, value.tensor()) if codes is None else (codes, None)


def plain(value: Any) -> Any:
    """A value with tensors for all that stands for one."""
    if isinstance(value, Handed):
        return value.tensor()
    if isinstance(value, (list, tuple)) and any(isinstance(one, Handed) for one in value):
        return type(value)([plain(one) for one in value])
    return value


def _by_columns(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()
