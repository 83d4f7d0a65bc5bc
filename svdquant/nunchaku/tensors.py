"""One 4-bit layer [N, K]: the tensors of a file -> plain ones -> ours. Diffusers' `nunchaku_lite` files have

    svdq int4   qweight [N, K/2], wscales [K/64, N], smooth_factor [K], proj_down [K, R], proj_up [N, R], bias [N]
    svdq nvfp4  the same with wscales [K/16, N] in float8, and wcscales [N], wtscale [1]: outer scales, multiplied
    awq         qweight [N/4, K/2] int32, wscales [K/64, N], wzeros [K/64, N], bias [N]; w = code * wscales + wzeros

in the orders of `nunchaku_layout`; of awq only qweight, the rest is plain. A layer without bias has no such tensor.
proj_down reads x itself, and smooth_factor divides, as in our layers. Where wzeros = -7 * wscales, as all known
writers have it, w = (code - 7) * wscales: our symmetric format as long as no code is 15.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...kernels.formats.int4 import pack_int4
from ..layers.nvfp4 import NVFP4Linear, NVFP4Plan, pack_e2m1
from ..layers.plan import SVDQPlan
from ..layers.svdq import SVDQLinear
from . import layout
from .model import FLOAT16S, Checkpoint

AWQ_ZERO = 7
FP8 = (torch.float8_e4m3fn,)
CODES = (torch.int8, torch.uint8)


@dataclass
class Plain:
    """A layer in plain order.

    codes [N, K] int8, or uint8 for e2m1; scales [N, K/G]; smooth [K], None for weight-only layers; down [r, K] and
    up [N, r] or None; bias [N] or None; outer [N] float32 for NVFP4.
    """

    codes: Tensor
    scales: Tensor
    smooth: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None
    outer: Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.down is None else len(self.down)

    def rows(self, part: slice) -> Plain:
        """Some outputs of the layer; smooth and down are shared."""
        cut = {"codes": self.codes[part], "scales": self.scales[part]}
        cut["up"] = None if self.up is None else self.up[part]
        cut["bias"] = None if self.bias is None else self.bias[part]
        return replace(self, **cut)


def take_svdq(
    checkpoint: Checkpoint, name: str, n: int, k: int, rank: int, bias: bool = True, nvfp4: bool = False
) -> Plain:
    """Take an svdq layer out of a checkpoint. Ranks that are nothing but zeros are padding, and left out.

    Raises UserError, naming layer or key, for sizes that the layout does not have and for tensors that do not fit.
    """
    if n % 128 or k % 128:
        raise UserError(f"'{name}' has {k} inputs and {n} outputs; Nunchaku's layout needs multiples of 128.")

    def take(tensor: str, *shape: int, dtypes: tuple = FLOAT16S) -> Tensor:
        return checkpoint.take(f"{name}.{tensor}", shape, dtypes)

    codes = layout.unpack_qweight(take("qweight", n, k // 2, dtypes=CODES), signed=not nvfp4)
    outer = None
    if nvfp4:
        scales = layout.unpack_nvfp4_scales(take("wscales", k // 16, n, dtypes=FP8))
        outer = layout.unpack_vector(take("wcscales", n)).float() * take("wtscale", 1).float()
    else:
        scales = layout.unpack_scales(take("wscales", k // 64, n))
    smooth = layout.unpack_vector(take("smooth_factor", k))
    down, up = take("proj_down", k, rank), take("proj_up", n, rank)
    used = torch.zeros(0, dtype=torch.bool)
    if rank:
        down, up = layout.unpack_down(down), layout.unpack_up(up)
        used = down.ne(0).any(1) & up.ne(0).any(0)
    branch = (down[used], up[:, used]) if used.any() else (None, None)
    return Plain(codes, scales, smooth, *branch, layout.unpack_vector(take("bias", n)) if bias else None, outer)


def take_awq(checkpoint: Checkpoint, name: str, n: int, k: int, bias: bool = True) -> Plain:
    """Take an awq layer out of a checkpoint, codes in [-7, 7].

    Raises UserError as `take_svdq`, and where zeros or codes are not those of a symmetric format.
    """
    if n % 4 or k % 64:
        raise UserError(f"'{name}' has {k} inputs and {n} outputs; the AWQ layout needs multiples of 64 and 4.")

    def take(tensor: str, *shape: int, dtypes: tuple = FLOAT16S) -> Tensor:
        return checkpoint.take(f"{name}.{tensor}", shape, dtypes)

    codes = layout.unpack_awq_qweight(take("qweight", n // 4, k // 2, dtypes=(torch.int32,)))
    scales, zeros = take("wscales", k // 64, n), take("wzeros", k // 64, n)
    middle = -AWQ_ZERO * scales.float()
    if not ((zeros.float() - middle).abs() <= middle.abs() * torch.finfo(zeros.dtype).eps).all():
        raise UserError(f"'{name}.wzeros' is not -7 times '{name}.wscales': only symmetric AWQ codes can be read.")
    if int(codes.max()) > 2 * AWQ_ZERO:
        raise UserError(f"'{name}.qweight' holds code 15, which a symmetric format around 7 does not have.")
    bias = take("bias", n, dtypes=(*FLOAT16S, torch.float32)) if bias else None
    return Plain(codes.to(torch.int8) - AWQ_ZERO, scales.T.contiguous(), bias=bias)


def svdq_layer(linear: nn.Linear, plain: Plain, lender: str = "", shift: float = 0.0) -> SVDQLinear:
    """The layer that takes the place of `linear`, on its device; weight-only where `plain` has no smooth."""
    activation = "int4" if plain.smooth is not None else "none"
    plan = SVDQPlan(rank=plain.rank, activation=activation, lender=lender, shift=shift)
    layer = SVDQLinear(linear, plan, "meta")
    return _fill(layer, linear, plain, qweight=pack_int4(plain.codes, plan.group_size))


def nvfp4_layer(linear: nn.Linear, plain: Plain) -> NVFP4Linear:
    layer = NVFP4Linear(linear, NVFP4Plan(rank=plain.rank), "meta")
    return _fill(layer, linear, plain, qweight=pack_e2m1(plain.codes), outer=plain.outer)


def _fill(layer: nn.Module, linear: nn.Linear, plain: Plain, **values: Tensor) -> nn.Module:
    device = "cpu" if linear.weight.is_meta else linear.weight.device
    values |= {"wscales": plain.scales, "smooth": plain.smooth, "down": plain.down, "up": plain.up}
    if layer.bias is None:
        values["like"] = torch.zeros(1, dtype=layer.model_dtype)
    else:
        values["bias"] = plain.bias.to(layer.bias.dtype)
    for name, value in values.items():
        if getattr(layer, name) is not None:
            # A copy: layers split from one share `smooth`, which safetensors would refuse to save.
            own = value.to(device, copy=True, memory_format=torch.contiguous_format)
            setattr(layer, name, nn.Parameter(own, requires_grad=False))
    return layer.train(linear.training)
