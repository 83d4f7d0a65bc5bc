"""Planted outlier channels: the function stays, inputs are no longer alike, a rotation takes them back."""

import copy
import importlib
from pathlib import Path

import pytest
import torch

import ptq4dm
from helpers import distance, run
from models import dit
from ptq4dm.errors import UserError
from ptq4dm.transforms.peaks import watch_peaks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts" / "comparisons"))
    return importlib.import_module("planted")


def random_dit():
    model = dit()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3)
    return model


def test_outliers_keep_the_function_and_cost_codes(planted):
    exact = random_dit()
    model = copy.deepcopy(exact)
    planted.plant(model, channels=1)
    assert distance(run(model), run(exact)) < 1e-5
    ratios = []
    for one in (exact, model):
        with watch_peaks(one) as peaks:
            run(one)
        seen = [
            peaks.peak(f"transformer_blocks.{i}.{name}") for i in (0, 1) for name in ("attn1.to_q", "ff.net.0.proj")
        ]
        ratios.append(min(float(peak.max() / peak.median()) for peak in seen))
    assert ratios[1] > 4 * ratios[0]
    errors = {}
    for name, transforms in {"plain": (), "rotated": ("hadamard:16",)}.items():
        packed = copy.deepcopy(model)
        keep = ("transformer_blocks.*.norm1", "proj_out*")
        ptq4dm.quantize(packed, ptq4dm.RTNConfig(
            activations="dynamic", activation_bits=5, transforms=transforms, modules_to_not_convert=keep
        ))  # fmt: skip
        errors[name] = distance(run(packed), run(exact))
    assert errors["rotated"] < 0.8 * errors["plain"]


def test_outliers_are_of_a_dit(planted, unet):
    with pytest.raises(UserError, match="take a DiT"):
        planted.plant(unet())
