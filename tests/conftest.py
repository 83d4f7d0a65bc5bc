"""What several test files share."""

import gc
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import analytic
import interpreting
import memory

# Without a GPU, kernels run in Triton's interpreter; it must be told before Triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish():
    """What the imports made stays: collections of garbage need not look through it, a million objects, each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # what binds C++ says at the end what is left


@pytest.fixture(scope="session")
def unet():
    """Builds a small random UNet with attention: the same for the same seed."""
    from models import unet  # not above: diffusers may import Triton

    return unet


@pytest.fixture
def one_thread():
    """Tiny networks are quicker on one thread, on a busy machine many times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def catalogue(monkeypatch):
    """scripts/sweep/pipelines.py: tiny pipelines of diffusers' own classes, by name; `run` takes three steps."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "scripts" / "sweep"))
    found = importlib.import_module("pipelines")
    monkeypatch.setattr(found, "STEPS", 3)
    return found


@pytest.fixture
def few_looks(monkeypatch):
    """The search for ranges by what the model predicts looks at a third of the grids."""
    monkeypatch.setattr("ptq4dm.ranges.prediction.FACTORS", ((0.8,),))


@pytest.fixture
def new_accelerate():
    """accelerate knows one precision in a process; tests try several."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


@pytest.fixture(autouse=True)
def torch_stays_as_it_was():
    """No test may leave the process with other settings: the next would fail far from the cause."""
    before = torch.is_grad_enabled(), torch.get_default_dtype()
    yield
    after = torch.is_grad_enabled(), torch.get_default_dtype()
    torch.set_grad_enabled(before[0])
    torch.set_default_dtype(before[1])
    assert after == before


@pytest.fixture(scope="session", autouse=True)
def kernels_stay_in_their_tensors():
    """In Triton's interpreter every address is checked; see memory.py."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        memory.watch(interpreter, patch)
        interpreting.hasten(interpreter, patch)
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
