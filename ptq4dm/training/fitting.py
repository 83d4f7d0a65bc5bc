"""A picture cut and resized to a model's size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fitted(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The largest middle part of uint8 [3, H, W] with the right ratio, resized, without aliases: uint8 [3, *size]."""
    (h, w), (height, width) = image.shape[1:], size
    if (h, w) == (height, width):
        return image
    side = min(h / height, w / width)
    tall, wide = max(1, round(height * side)), max(1, round(width * side))
    top, left = (h - tall) // 2, (w - wide) // 2
    middle = image[None, :, top : top + tall, left : left + wide].float()
    scaled = F.interpolate(middle, size=size, mode="bicubic", antialias=True)
    return scaled[0].round().clamp(0, 255).to(torch.uint8)
