"""Inception features for FID: torch-fidelity's port of the TensorFlow network of 2015, through torchmetrics.

Two ways to bring an image to the network's 299x299, which give different FIDs and must never be mixed:
  torch-fidelity  TensorFlow 1's bilinear resize without half-pixel centres, what FID was first published with
  clean           bicubic with antialiasing, clamped, not rounded (Parmar et al. 2022, "clean-fid")
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import DamagedFile, UserError
from .state_file import read_state

NUM_FEATURES = 2048
MODES = {"torch-fidelity": "torch-fidelity (TF1 bilinear)", "clean": "clean (bicubic, antialias)"}
OFFICIAL = "6726825d"  # the first digits of the published file's SHA-256, which its name also carries


class InceptionFeatures(nn.Module):
    """uint8 images [N, 3, H, W] -> float32 pooled features [N, 2048].

    `feature` names the network: the published weights by their date, any other file by its hash.
    """

    def __init__(self, network: nn.Module, resize: str, feature: str) -> None:
        super().__init__()
        self.network, self.resize, self.feature = network, resize, feature
        self.mode = MODES[resize]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if self.resize == "torch-fidelity":
            return self.network(images)  # resizes and scales by itself, from uint8 only
        size = (self.network.INPUT_IMAGE_SIZE,) * 2
        x = F.interpolate(images.float(), size, mode="bicubic", align_corners=False, antialias=True)
        x = (x.clamp(0, 255) - 128) / 128
        for layer in list(self.network.children())[:-1]:  # in order of use; the last is the classifier
            x = layer(x)
        return x.flatten(1)


def load_inception(
    weights: str | os.PathLike | None = None, resize: str = "torch-fidelity", device: torch.device | str = "cpu"
) -> InceptionFeatures:
    """The Inception network for FID, in evaluation mode, float32.

    Args:
        weights: a state dict in torch-fidelity's names (.pth, read with weights_only, or .safetensors).
            None downloads torch-fidelity's published file once, into torch.hub's cache.
        resize: "torch-fidelity" or "clean".

    Raises:
        UserError: torch-fidelity is missing or does not import, the download fails, or the file is unreadable or
            holds other tensors than the network's.
    """
    if resize not in MODES:
        raise UserError(f"unknown resize '{resize}'; choose from {', '.join(MODES)}.")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ModuleNotFoundError as error:
        raise UserError(
            f"Inception FID needs torch-fidelity ({error.name} is missing): pip install torch-fidelity."
        ) from error
    except (ImportError, RuntimeError, OSError) as error:  # a torchvision built for another torch raises these
        raise UserError(f"torch-fidelity is installed but does not import ({error}); reinstall it.") from error
    path = _download(URL_INCEPTION_V3) if weights is None else Path(weights)
    state, digest = read_state(path)
    # torch-fidelity unpickles whatever file it is given, so it is given our own copy of the checked tensors.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        # antialias=False is torch-fidelity's own resize; torchmetrics' default (True) is another one.
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], buffer, antialias=False)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise DamagedFile(f"{path} does not hold the weights of torch-fidelity's Inception network.") from error
    feature = "inception-2015-12-05" if digest.startswith(OFFICIAL) else f"inception-v3 ({digest[:8]})"
    return InceptionFeatures(network, resize, feature).to(device).eval()


def _download(url: str) -> Path:
    target = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(target), hash_prefix=OFFICIAL)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"the Inception weights could not be downloaded ({error}); "
                f"fetch {url} yourself and give its path as inception weights."
            ) from error
    return target
