"""The calls that LUT-GEMM's rows are calibrated on: all that layers of time and class are fed on one schedule."""

import importlib
from pathlib import Path

import pytest
import torch

import ptq4dm
from ptq4dm import UserError
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
    seen = {(int(call["timestep"]), int(call.get("class_labels", torch.zeros(1)))) for call in calls}
    assert len(seen) == len(calls) == 3 * classes
    assert {time for time, _ in seen} == set(pipe.scheduler.timesteps.tolist())
    with torch.no_grad():
        assert denoiser(pipe)(**calls[-1])[0].shape[0] == 1


def test_wrong_numbers_are_refused_before_any_work(script, tmp_path):
    for words in (["--steps", "0"], ["--num-paired", "0"]):
        with pytest.raises(UserError, match="1 or more"):
            script.main([*words, "--output", str(tmp_path / "rows.json")])
    with pytest.raises(UserError, match="no row is called"):
        script.main(["--rows", "nothing", "--output", str(tmp_path / "rows.json")])
