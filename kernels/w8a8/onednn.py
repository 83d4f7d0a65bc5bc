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
    packed = prepared(qweight, "linear", lambda: torch.ops.onednn.qlinear_prepack(qweight, None))
    codes, scale, zero_point, after = _uint8_codes(x.float(), input_scale, input_zero_point, bits, (1,))
    zero_points = torch.zeros(len(qweight), dtype=torch.int64)
    early = None if after is not None or bias is None else bias.float()
    y = torch.ops.onednn.qlinear_pointwise(
        codes, scale, zero_point, packed, weight_scale, zero_points, early,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    if after is not None:
        y = y.mul_(after) if bias is None else torch.addcmul(bias.float(), y, after)
    return y


def conv2d(
    x, qweight, weight_scale, bias, input_scale, input_zero_point, bits, stride, padding, dilation, groups
) -> Tensor:
    packed = prepared(
        qweight,
        ("conv2d", tuple(stride), tuple(padding), tuple(dilation), groups),
        lambda: torch.ops.onednn.qconv_prepack(
            qweight, weight_scale, 1.0, 128, stride, padding, dilation, groups, None
        ),
    )
    x = x.float().contiguous(memory_format=torch.channels_last)
    codes, scale, zero_point, after = _uint8_codes(x, input_scale, input_zero_point, bits, (1, 2, 3))
    zero_points = torch.zeros(len(qweight), dtype=torch.int64)
    early = None if after is not None or bias is None else bias.float()
    y = torch.ops.onednn.qconv2d_pointwise(
        codes, scale, zero_point, packed, weight_scale, zero_points, early,
        stride, padding, dilation, groups, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    if after is not None:
        y = y.mul_(after) if bias is None else torch.addcmul(bias.float()[:, None, None], y, after)
    return y


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
