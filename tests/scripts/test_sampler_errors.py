"""scripts/comparisons/sampler_errors.py: errors fall with evaluations, and what the file has is not made again."""

import importlib
from pathlib import Path

import diffusers
import pytest

import models
import ptq4dm

FOLDER = Path(__file__).parents[2] / "scripts" / "comparisons"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("sampler_errors")


def test_errors_fall_and_rows_are_kept(script, tmp_path, one_thread, monkeypatch, capsys):
    pipe = ptq4dm.PixelDiTPipeline(models.pixel_dit(), diffusers.FlowMatchEulerDiscreteScheduler())
    pipe.save_pretrained(tmp_path / "model")
    asked = ["--model", str(tmp_path / "model"), "--images", "2", "--truth", "12", "--budgets", "4", "12"]
    asked += ["--output", str(tmp_path / "rows.json"), "--samplers", "ipndm1/linear", "diffusers/euler"]
    rows = list(script.measure(script.parse_args([*asked, "rho_rk-3heun/linear"])))
    error = {(row["sampler"], row["budget"]): row["error"] for row in rows}
    assert len(error) == 6
    assert all(0 < error[name, 12] < error[name, 4] for name in ("ipndm1/linear", "diffusers/euler"))
    assert "(3)" in capsys.readouterr().out  # a step of Runge-Kutta takes three evaluations
    monkeypatch.setattr(script, "set_budget", None)  # nothing is measured again
    assert list(script.measure(script.parse_args(asked))) == rows
