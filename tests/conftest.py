"""What several test files share."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import analytic
import memory

# Without a GPU, kernels run in Triton's interpreter; it must be told before Triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def unet():
    """Builds a small random UNet with attention: the same for the same seed."""
    from diffusers import UNet2DModel  # not above: it may import Triton

    def build(seed=0):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
        ).eval()

    return build


@pytest.fixture
def one_thread():
    """Tiny networks are quicker on one thread, on a busy machine many times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def kernels_stay_in_their_tensors():
    """In Triton's interpreter every address is checked; see memory.py."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        memory.watch(interpreter, patch)
        yield


@pytest.fixture(scope="session")
def golden():
    """Outputs of the DEIS authors' code; data/README.md says what is in it."""
    with np.load(Path(__file__).parent / "data" / "deis-gmm2d.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def mixture(golden):
    """The problem of those outputs."""
    return analytic.Mixture(*(torch.from_numpy(golden[f"problem/{name}"]) for name in ("means", "weights", "covs")))
