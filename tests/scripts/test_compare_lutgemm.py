"""The calls that LUT-GEMM's rows are calibrated on: all that layers of time and class are fed on one schedule."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import ptq4dm
from ptq4dm import UserError
from ptq4dm.layers.binary.bcq import BCQPlan
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.pipelines.denoiser import denoiser

SCRIPTS = Path(__file__).parents[2] / "scripts" / "comparisons"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("compare_lutgemm")


@pytest.mark.parametrize("model, classes", [("dit-cifar10", 10), ("unet-cifar10", 1)])
def test_each_time_meets_each_class_once(script, model, classes):
    pipe = ptq4dm.load_reference(model)
    calls = list(script.pairs(pipe, 3))
    labels = [call.get("class_labels", torch.zeros(1, dtype=torch.long)) for call in calls]
    seen = [pair for call, of in zip(calls, labels, strict=True)
            for pair in zip(call["timestep"].tolist(), of.tolist(), strict=True)]  # fmt: skip
    assert len(set(seen)) == len(seen) == 3 * classes
    assert {time for time, _ in seen} == set(pipe.scheduler.timesteps.tolist())


def few_rows_of(model, call) -> dict:
    """Layer -> its input in one call, of all layers that are fed one row a sample."""
    found, count = {}, len(call["timestep"])

    def keep(name):
        return lambda module, args, output: (
            found.__setitem__(name, args[0]) if args[0].shape[:-1] == (count,) else None
        )

    hooks = [one.register_forward_hook(keep(name)) for name, one in model.named_modules() if type(one) is nn.Linear]
    with torch.no_grad():
        model(**call)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    "model, word, layers", [("dit-cifar10", "hidden_states", 25), ("unet-cifar10", "sample", 19)]
)
def test_layers_of_few_rows_do_not_see_the_picture(script, model, word, layers):
    pipe = ptq4dm.load_reference(model)
    call = {name: one[:2] if torch.is_tensor(one) else one for name, one in next(script.pairs(pipe, 1)).items()}
    whole = torch.randn(len(call["timestep"]), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    small, large = (few_rows_of(denoiser(pipe).eval(), call | extra) for extra in ({}, {word: whole}))
    assert small.keys() == large.keys() and len(small) == layers
    assert all(torch.equal(small[name], large[name]) for name in small)


def test_bytes_in_planes_leave_biases_and_other_layers_out(script):
    plan = BCQPlan(weight_bits=2, group_size=64, rounding="nearest", uniform=True)
    model = nn.Sequential(quantized_copy(nn.Linear(128, 64), plan, "layer"), nn.Linear(64, 64))
    # 2 signs a weight, and of each group of 64 two scales and an offset, in 16 bits
    assert script.in_planes(model) == (64 * 128 * 2 // 8 + 64 * 2 * 3 * 2, 2 * 64 * 128)


def test_wrong_numbers_are_refused_before_any_work(script, tmp_path):
    for words in (["--steps", "0"], ["--num-paired", "0"], ["--workers", "0"]):
        with pytest.raises(UserError, match="1 or more"):
            script.main([*words, "--output", str(tmp_path / "rows.json")])
    with pytest.raises(UserError, match="'tpu'"):
        script.main(["--device", "tpu", "--output", str(tmp_path / "rows.json")])
    with pytest.raises(UserError, match="no row is called"):
        script.main(["--rows", "nothing", "--output", str(tmp_path / "rows.json")])
