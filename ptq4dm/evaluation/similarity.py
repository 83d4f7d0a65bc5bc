"""How alike two pictures of one seed look: SSIM, and LPIPS where the weights of its network are given.

    SSIM    structural similarity (Wang et al. 2004), Gaussian window of 11 pixels, data range 1; 1 is the same
    LPIPS   learned perceptual distance (Zhang et al. 2018) in the features of a network for ImageNet; 0 is the same

Both are torchmetrics', with its defaults, as most who publish figures of quantized diffusion models take them: of RGB
pictures in their own size. The linear layers of LPIPS come with torchmetrics; its network's weights do not.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from ..errors import DamagedFile, UserError
from .state_file import read_state

SMALLEST_SSIM = 6  # pixels a side that the window, mirrored at the edges, needs
SMALLEST_LPIPS = 32  # below which a network's last features have no pixel left
NETWORKS = {"features.6.weight": "alex", "features.28.weight": "vgg", "features.12.squeeze.weight": "squeeze"}


def ssim(images: Tensor, reference: Tensor) -> list[float] | None:
    """SSIM of each pair: [N, 3, H, W] float in [0, 1] twice -> N floats; None where pictures are too small."""
    if min(images.shape[2:]) < SMALLEST_SSIM:
        return None
    found = structural_similarity_index_measure(images.double(), reference.double(), data_range=1.0, reduction="none")
    assert isinstance(found, Tensor)
    return found.reshape(-1).tolist()


class LPIPS:
    """LPIPS with the weights of a file, on a device. name: "alex", "vgg" or "squeeze"."""

    def __init__(self, network: Any, name: str, device: torch.device) -> None:
        self.network, self.name, self.device = network.to(device), name, device

    @torch.no_grad()
    def __call__(self, images: Tensor, reference: Tensor) -> list[float] | None:
        """LPIPS of each pair: [N, 3, H, W] float in [0, 1] twice -> N floats; None where pictures are too small."""
        if min(images.shape[2:]) < SMALLEST_LPIPS:
            return None
        pair = (x.to(self.device, torch.float32) for x in (images, reference))
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return self.network(*pair, normalize=True).reshape(-1).tolist()


def load_lpips(weights: str | os.PathLike, device: torch.device | str = "cpu") -> LPIPS:
    """LPIPS in the network that a file of torchvision's weights is of; nothing is downloaded.

    weights: a state dict in torchvision's names, .pth (read with weights_only) or .safetensors: AlexNet, which most
        figures are of, VGG-16 or SqueezeNet 1.1. Which one, the names of the tensors say.

    Raises:
        UserError: torchvision is missing or does not import.
        DamagedFile: the file is unreadable, or of another network.
    """
    state, _ = read_state(Path(weights))
    name = next((name for key, name in NETWORKS.items() if key in state), None)
    if name is None:
        raise DamagedFile(f"{weights} holds no weights of torchvision's AlexNet, VGG-16 or SqueezeNet 1.1.")
    try:
        import torchvision  # noqa: F401  (torchmetrics takes the networks from it)
        from torchmetrics.functional.image.lpips import _LPIPS
    except ModuleNotFoundError as error:
        raise UserError(f"LPIPS needs torchvision ({error.name} is missing): pip install torchvision.") from error
    except (ImportError, RuntimeError, OSError) as error:  # built for another torch
        raise UserError(f"torchvision is installed but does not import ({error}); reinstall it.") from error
    network = _LPIPS(net=name, pnet_rand=True)  # random, so that nothing is downloaded
    features = network.net.state_dict()
    theirs = {key: state[there] for key in features if (there := _their_name(key)) in state}
    if {key: one.shape for key, one in theirs.items()} != {key: one.shape for key, one in features.items()}:
        raise DamagedFile(f"{weights} does not hold the weights of torchvision's network for LPIPS ({name}).")
    network.net.load_state_dict(theirs)
    return LPIPS(network.eval(), name, torch.device(device))


def _their_name(key: str) -> str:
    """torchvision's name of a tensor of torchmetrics' slices: slice2.3.bias, slices.1.3.bias -> features.3.bias"""
    parts = key.split(".")
    return ".".join(["features", *parts[2 if parts[0] == "slices" else 1 :]])
