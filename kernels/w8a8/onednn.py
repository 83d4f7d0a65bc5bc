"""W8A8 Linear and Conv2d on x86 CPUs with VNNI: oneDNN's u8 x s8 kernels through PyTorch.

They take unsigned activations: q_x + 128 with zero point z + 128. They know nothing of scales that differ from row to
row, as those of a dynamic grid: such a scale is applied to what they give back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.int8 import dynamic_scale, quantize_activation_uint8
from ..runtime.prepared import prepared


def linear(x, qweight, weight_scale, bias, input_scale, input_zero_point, bits) -> Tensor:
    codes, scale, zero_point, after = _uint8_codes(x.float(), input_scale, input_zero_point, bits, (1,))
    early = None if after is not None or bias is None else bias.float()
    y = linear_of_codes(codes, qweight, weight_scale, early, scale, zero_point)
    if after is not None:
        y = y.mul_(after) if bias is None else torch.addcmul(bias.float(), y, after)
    return y


def linear_of_codes(
    codes: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: float,
    zero_point: int,
    dtype: torch.dtype = torch.float32,
    activation: tuple[str, str] = ("none", ""),
    stored: tuple[float, int] = (1.0, 0),
) -> Tensor:
    """codes [M, K] uint8 with their zero point + 128 -> [M, N] in dtype; bias float32.

    activation: oneDNN's name of what follows, and of its algorithm. dtype uint8: codes on the grid `stored`, (scale,
    zero point + 128).
    """
    packed = prepared(qweight, "linear", lambda: torch.ops.onednn.qlinear_prepack(qweight, None))
    zero_points = torch.zeros(len(qweight), dtype=torch.int64)
    return torch.ops.onednn.qlinear_pointwise(
        codes, scale, zero_point, packed, weight_scale, zero_points, bias,
        *stored, dtype, activation[0], [], activation[1],
    )  # fmt: skip


def conv2d(
    x, qweight, weight_scale, bias, input_scale, input_zero_point, bits, stride, padding, dilation, groups
) -> Tensor:
    x = x.float().contiguous(memory_format=torch.channels_last)
    codes, scale, zero_point, after = _uint8_codes(x, input_scale, input_zero_point, bits, (1, 2, 3))
    early = None if after is not None or bias is None else bias.float()
    geometry = (stride, padding, dilation, groups)
    y = conv2d_of_codes(codes, qweight, weight_scale, early, scale, zero_point, geometry)
    if after is not None:
        y = y.mul_(after) if bias is None else torch.addcmul(bias.float()[:, None, None], y, after)
    return y


def conv2d_of_codes(
    codes: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: float,
    zero_point: int,
    geometry: tuple,
    dtype: torch.dtype = torch.float32,
    into: Tensor | None = None,
) -> Tensor:
    """codes [B, C, H, W] uint8, channels_last, with their zero point + 128 -> [B, N, H', W'] in dtype; bias float32.

    geometry: (stride, padding, dilation, groups). into: float32 [B, N, H', W'], channels_last, to which the result is
    added in its place.
    """
    stride, padding, dilation, groups = (list(one) if isinstance(one, (list, tuple)) else one for one in geometry)
    packed = prepared(
        qweight,
        ("conv2d", tuple(stride), tuple(padding), tuple(dilation), groups),
        lambda: torch.ops.onednn.qconv_prepack(
            qweight, weight_scale, 1.0, 128, stride, padding, dilation, groups, None
        ),
    )
    zero_points = torch.zeros(len(qweight), dtype=torch.int64)
    operands = (codes, scale, zero_point, packed, weight_scale, zero_points)
    where = (stride, padding, dilation, groups)
    if into is None:
        return torch.ops.onednn.qconv2d_pointwise(*operands, bias, *where, 1.0, 0, dtype, "none", [], "")
    return torch.ops.onednn.qconv2d_pointwise.binary(
        *operands, into, bias, *where, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], ""
    )


def _uint8_codes(x, input_scale, input_zero_point, bits, dims):
    """(codes + 128 as uint8, scale, zero point + 128, scales of rows to multiply the output by or None)."""
    if input_scale is None:
        after = dynamic_scale(x, dims, bits)
        codes = quantize_activation_uint8(x * (1.0 / after), 1.0, 0)  # inside +-(2^(b-1)-1) by construction
        return codes, 1.0, 128, after
    after, zero_point = None, int(input_zero_point.item())
    if input_scale.numel() > 1:
        after, scale = input_scale.view(-1, 1), 1.0
        x = x * (1.0 / after)
    else:
        scale = input_scale.item()
    codes = quantize_activation_uint8(x, scale, zero_point)
    if bits < 8:
        codes = codes.clamp_(128 - 2 ** (bits - 1), 127 + 2 ** (bits - 1))
    return codes, scale, zero_point + 128, after
