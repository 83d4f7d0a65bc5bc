"""What tests of many rooms share: random numbers, the answers of models, and how far apart two answers are."""

import itertools

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel

from ptq4dm.calibration.record import named
from ptq4dm.inference.openvino.processor import sums_fit


def normal(*shape, seed=0, scale=1.0, dtype=torch.float32):
    """Standard normal numbers times `scale`: of one seed always the same."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def correlated(rows, columns, seed=3):
    """Inputs that lie near a plane of a few dimensions."""
    return normal(rows, 8, seed=seed) @ normal(8, columns, seed=seed + 1) + 0.3 * normal(rows, columns, seed=seed + 2)


def distance(found, expected):
    """|found - expected| / |expected| (2-norm), in float64 on the CPU."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


def arguments(model, calls):
    """The arguments of recorded calls that are one call, by name."""
    return named(model, calls.call())


@torch.no_grad()
def run(model, seed=5):
    """The answer of a tiny UNet or DiT to one fixed input of two rows, in its own dtype."""
    generator = torch.Generator().manual_seed(seed)
    channels, size = model.config.in_channels, model.config.sample_size
    x = torch.randn(2, channels, size, size, generator=generator)
    extra = {}
    if isinstance(model, UNet2DConditionModel):
        words = torch.randn(2, 3, model.config.cross_attention_dim, generator=generator)
        extra["encoder_hidden_states"] = words.to(model.device, model.dtype)
    elif isinstance(model, DiTTransformer2DModel):
        extra["class_labels"] = torch.tensor([1, 7], device=model.device)
    times = torch.tensor([10, 70], device=model.device)
    return model(x.to(model.device, model.dtype), timestep=times, return_dict=False, **extra)[0]


def same(one, other):
    """Whether two models or state dicts hold the same tensors: names, dtypes and every value."""
    one, other = (x.state_dict() if isinstance(x, torch.nn.Module) else x for x in (one, other))
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def crossed(names, *axes, of=2):
    """Parametrize by all combinations of values on a GPU; in Triton's interpreter, which is slow, by one of `of`.

    From three axes on, where two others have no fewer than `of` values, each pair of values still meets.
    """
    kept = 1 if torch.cuda.is_available() else of
    combinations = itertools.product(*map(enumerate, axes))
    found = [[value for _, value in one] for one in combinations if sum(place for place, _ in one) % kept == 0]
    return pytest.mark.parametrize(names, found, ids=lambda value: str(value).replace(" ", ""))


needs_vnni = pytest.mark.skipif(
    not sums_fit(), reason="OpenVINO's products of 8-bit integers overflow on a CPU without VNNI"
)
