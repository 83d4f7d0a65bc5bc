"""The embedded feature network: a small CIFAR-10 classifier whose activations compare image sets, offline.

Frechet distances between its features are called feature-FID. They are not Inception FID, and the two
numbers cannot be compared.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UserError
from ..files.outside import read_tensors
from ..pipelines.embedded import asset_path

IMAGE_SIZE = 32
NUM_FEATURES = 384
NUM_CLASSES = 10


def conv_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """3x3 convolution, BatchNorm, GELU; keeps height and width."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.GELU(),
    )


class Features(nn.Module):
    """ResNet-9 for 32x32 RGB images: `features` gives 384 pooled activations, `forward` ten class logits.

    Four widening convolutions with three poolings (32 -> 4 pixels a side), and a two-convolution residual
    branch at 16x16 and at 4x4; the mean over what is left is the feature vector.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prep = conv_block(3, 48)
        self.l1 = conv_block(48, 96)
        self.r1 = nn.Sequential(conv_block(96, 96), conv_block(96, 96))
        self.l2 = conv_block(96, 192)
        self.l3 = conv_block(192, NUM_FEATURES)
        self.r3 = nn.Sequential(conv_block(NUM_FEATURES, NUM_FEATURES), conv_block(NUM_FEATURES, NUM_FEATURES))
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Pooled activations of images.

        Args:
            x: [N, 3, 32, 32], floating point, in [-1, 1].

        Returns:
            [N, 384], in the dtype of the network (float32 after `load_features`).

        Raises:
            UserError: x has another shape, or is not floating point.
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise UserError(
                f"the embedded feature network takes images of shape [N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], "
                f"got {list(x.shape)}: resize them first, or measure with Inception FID."
            )
        if not x.is_floating_point():
            raise UserError(
                f"the embedded feature network takes floating-point images in [-1, 1], got {x.dtype}: "
                "divide 8-bit pixels by 127.5 and subtract 1."
            )
        x = F.max_pool2d(self.l1(self.prep(x)), 2)
        x = x + self.r1(x)
        x = F.max_pool2d(self.l2(x), 2)
        x = F.max_pool2d(self.l3(x), 2)
        x = x + self.r3(x)
        return x.mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class logits [N, 10] of images [N, 3, 32, 32] in [-1, 1]; classes in alphabetical order."""
        return self.head(self.features(x)) * 0.5  # the logit scale that the network was trained with


def load_features(device: torch.device | str = "cpu") -> Features:
    """The embedded feature network in evaluation mode, float32, without gradients.

    Raises:
        UserError: the embedded weights are missing from the installation.
    """
    net = Features()
    path = asset_path("features-cifar10/model.safetensors")
    read_tensors(path, lambda file: net.load_state_dict(file.tensors()), "install ptq4dm again")  # fp16 on disk
    return net.to(device).eval().requires_grad_(False)
