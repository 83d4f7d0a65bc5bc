"""Measure the feature network on CIFAR-10: the training set's statistics for feature-FID, and test accuracy.

    python scripts/training/reference_statistics.py --data cifar10-jpeg.tar.xz --output out/train-statistics.npz

Writes mu [384] and sigma [384, 384] (float64, unbiased: n - 1) of the features of all training images, read
in evaluation mode in float32, with plain keys that say how they came about.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from cifar10 import Split, read_cifar10, to_signed

from ptq4dm.errors import run
from ptq4dm.evaluation.extractors import feature_extractor
from ptq4dm.evaluation.features import Features, load_features
from ptq4dm.evaluation.frechet import Statistics, write_statistics

BATCH = 1000


@torch.no_grad()
def feature_statistics(net: Features, images: torch.Tensor) -> Statistics:
    """Mean and covariance of the features of images, uint8 [N, 3, 32, 32], on the network's device.

    They carry the names by which `ptq4dm evaluate` knows its own network and its way to read images.
    """
    extractor = feature_extractor(net, next(net.parameters()).device)
    return extractor.moments(images.split(BATCH)).statistics(extractor.mode, extractor.feature)


@torch.no_grad()
def accuracy(net: Features, split: Split) -> float:
    """The share of the split that the classifier names rightly."""
    device = next(net.parameters()).device
    right = 0
    for images, labels in zip(split.images.split(BATCH), split.labels.split(BATCH), strict=True):
        right += (net(to_signed(images.to(device))).argmax(1) == labels.to(device)).sum().item()
    return right / len(split.labels)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder or .tar.xz with train/ and test/")
    parser.add_argument("--output", required=True, help="the .npz to write")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    train, test = read_cifar10(options.data)
    net = load_features(options.device)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    write_statistics(options.output, feature_statistics(net, train.images))
    print(f"{options.output}: statistics of {len(train.images)} training images")
    print(f"test accuracy {accuracy(net, test):.4f} on {len(test.images)} images")


if __name__ == "__main__":
    run(main)
