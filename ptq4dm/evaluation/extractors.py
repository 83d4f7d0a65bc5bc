"""Which network a Frechet distance is measured with, and the statistics it is measured against."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from ..errors import UserError
from ..pipelines.embedded import asset_path
from ..pipelines.images import to_uint8
from ..pipelines.loading import not_while_loading
from ..pipelines.picture_files import find_images, load_image, load_images
from ..progress import progress_bar
from .features import NUM_FEATURES, Features, load_features
from .frechet import Moments, Statistics, frechet_distance, read_statistics

EMBEDDED_STATISTICS = "features-cifar10/train-statistics.npz"
FEW_IMAGES = 10_000  # the least that the authors of FID recommend
METRICS = ("feature-fid", "fid", "none")


@dataclass
class Extractor:
    """uint8 images [N, 3, H, W] -> features [N, dim], with the names that must stand beside a figure.

    label: "feature-FID" or "FID"; feature: the network; mode: how images are resized.
    """

    label: str
    feature: str
    dim: int
    mode: str
    network: Callable[[Tensor], Tensor]
    device: torch.device
    any_size: bool = False  # it resizes each image by itself

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        # Convolutions in full float32: with TF32, the default on NVIDIA GPUs, figures would differ from a CPU's.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return self.network(images.to(self.device))

    def moments(self, batches: Iterable[Tensor]) -> Moments:
        """Feature moments of images [B, 3, H, W], batch by batch: uint8, or float in [0, 1], rounded as if saved."""
        moments = Moments(self.dim)
        for images in batches:
            moments.update(self(images if images.dtype == torch.uint8 else to_uint8(images)))
        return moments


def load_extractor(
    metric: str,
    device: torch.device | str = "cpu",
    inception_weights: str | os.PathLike | None = None,
    resize: str = "torch-fidelity",
) -> Extractor:
    """The extractor of a metric: "feature-fid" (embedded, 384-d, 32x32 images) or "fid" (Inception, 2048-d).

    Raises:
        UserError: an unknown metric, or Inception cannot be loaded.
    """
    device = torch.device(device)
    if metric == "feature-fid":
        with not_while_loading():
            return feature_extractor(load_features(device), device)
    if metric == "fid":
        from .inception import NUM_FEATURES as DIM
        from .inception import load_inception

        with not_while_loading():
            net = load_inception(inception_weights, resize, device)
        return Extractor("FID", net.feature, DIM, net.mode, net, device, any_size=True)
    if metric == "none":
        raise UserError("metric 'none' measures no pictures; choose feature-fid or fid.")
    raise UserError(f"unknown metric '{metric}'; choose from {', '.join(METRICS)}.")


def feature_extractor(net: Features, device: torch.device | str = "cpu") -> Extractor:
    """The extractor of feature-FID with a network of the embedded kind, on its device."""
    # Pixels of saved pictures, so that a pipeline and its PNG files give the same figure.
    return Extractor(
        "feature-FID",
        "ptq4dm features-cifar10",
        NUM_FEATURES,
        "none (32x32)",
        lambda images: net.features(images.float() / 127.5 - 1),
        torch.device(device),
    )


def folder_moments(folder: str | os.PathLike, extractor: Extractor, batch_size: int) -> tuple[Moments, str]:
    """Feature moments of all images in a folder, and a clause on the files that were passed over (empty: none).

    In a launch of several processes each reads its share of the files. Images of different sizes are taken where the
    extractor resizes each by itself.

    Raises:
        UserError: fewer than 2 images, a file that cannot be read, or images of different sizes for a network of one.
    """
    found = find_images(folder)
    paths = found.paths
    if len(paths) < 2:
        raise UserError(f"{folder} holds one image; a Frechet distance needs at least 2.")
    state = PartialState()
    mine = paths[state.process_index :: state.num_processes]

    def batches():
        hidden = not state.is_main_process
        with progress_bar(total=len(mine), unit="image", desc=Path(folder).name, hidden=hidden) as bar:
            for start in range(0, len(mine), batch_size):
                batch = mine[start : start + batch_size]
                if extractor.any_size:
                    yield from _by_size(load_image(path) for path in batch)
                else:
                    # The folder's first image heads every batch, so that a stray size is caught wherever it lies.
                    yield load_images([paths[0], *batch])[1:]
                bar.update(len(batch))

    return extractor.moments(batches()).reduced(), found.passed_over


def _by_size(images: Iterable[Tensor]) -> list[Tensor]:
    """Images [3, H, W] as batches [B, 3, H, W] of one size each."""
    sizes: dict[torch.Size, list[Tensor]] = {}
    for image in images:
        sizes.setdefault(image.shape, []).append(image)
    return [torch.stack(same) for same in sizes.values()]


@dataclass
class Reference:
    """The Gaussian a figure is measured against, what to call it, and what was passed over in its folder."""

    statistics: Statistics
    name: str
    passed_over: str = ""


def load_reference_statistics(extractor: Extractor, path: str | os.PathLike | None, batch_size: int) -> Reference:
    """Read an npz or a folder of images (None: the embedded statistics), and check it against the extractor.

    Raises:
        UserError: unreadable, made with another network, width or resize mode, or none given for Inception.
    """
    if path is not None and Path(path).is_dir():
        moments, passed_over = folder_moments(path, extractor, batch_size)
        return Reference(moments.statistics(extractor.mode, extractor.feature), str(path), passed_over)
    if path is None:
        if extractor.label != "feature-FID":
            raise UserError("FID needs a reference: pass a folder of real images, or an npz with mu and sigma.")
        path, name = asset_path(EMBEDDED_STATISTICS), "embedded CIFAR-10 training statistics"
    else:
        name = str(path)
    statistics = read_statistics(path)
    if len(statistics.mu) != extractor.dim:
        raise UserError(
            f"{name} has {len(statistics.mu)} features but {extractor.label} measures with {extractor.dim}: "
            "it was made with another network."
        )
    for key in ("feature", "mode"):
        theirs, ours = getattr(statistics, key), getattr(extractor, key)
        if theirs is not None and theirs != ours:
            raise UserError(f"{name} was made with {key} '{theirs}', not '{ours}'; the two cannot be compared.")
    return Reference(statistics, name)


def frechet_entry(extractor: Extractor, moments: Moments, reference: Reference) -> tuple[dict, list[str]]:
    """The Frechet distance with all that must stand beside it, and the warnings that its reader needs."""
    theirs, n = reference.statistics, moments.count
    result = {
        "label": extractor.label,
        "value": frechet_distance(moments.mu, moments.sigma, theirs.mu, theirs.sigma),
        "extractor": extractor.feature,
        "resize": extractor.mode,
        "num_images": n,
        "reference": reference.name,
        "reference_images": theirs.n,
    }
    warnings = []
    for count, what in ((n, "images"), (theirs.n, "reference images")):
        if count is not None and count < FEW_IMAGES:
            warnings.append(f"with {count} {what} (fewer than {FEW_IMAGES}) {extractor.label} is biased upwards")
    if reference.passed_over:
        warnings.append(reference.passed_over)
    unsaid = [key for key in ("feature", "mode") if getattr(theirs, key) is None]
    if unsaid:
        names = {"feature": "its network", "mode": "its resize mode"}
        said = " and ".join(names[key] for key in unsaid)
        warnings.append(f"the reference does not say {said}; the figure holds only if the same was used")
    return result, warnings
