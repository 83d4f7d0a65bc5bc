"""Ranges of activations by timestep bin: what a layer gets in a bin, its control, and the rows."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline

import ptq4dm

SCRIPTS = Path(__file__).parents[2] / "scripts" / "comparisons"
SMALL = ["--bits", "4", "--steps", "3", "--num-paired", "3", "--calibration-samples", "3", "--device", "cpu"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def clipping(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.chdir(tmp_path)
    return importlib.import_module("compare_clipping")


def pipeline(unet):
    pipe = DDPMPipeline(unet(), DDIMScheduler(timestep_spacing="trailing"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_rows_are_measured_once(clipping, unet, capsys):
    clipping.main([*SMALL, "--no-images", "--output", "c.json"], pipeline(unet))
    rows = json.loads(Path("c.json").read_text())["rows"]
    assert [(row["inputs"], row["kind"]) for row in rows] == [
        *(("dynamic", kind) for kind in (*clipping.KINDS, "none")), *(("static", kind) for kind in clipping.KINDS),
    ]  # fmt: skip
    assert all(row["eps_error"] > 0 and "psnr" not in row for row in rows)
    assert "| dynamic | 4 | by bin, shuffled |" in capsys.readouterr().out
    clipping.main([*SMALL, "--no-images", "--output", "c.json"], pipeline(unet))
    assert json.loads(Path("c.json").read_text())["rows"] == rows


def test_one_range_is_the_model_as_it_is_packed(clipping, unet):
    pipe = pipeline(unet)
    store = ptq4dm.collect(pipe, ptq4dm.CalibrationConfig("solver", 3, 3))
    model, clock = pipe.unet, clipping.Bins(10, 1000)
    ptq4dm.quantize(model, clipping.recipe(True, 4), store)
    widths = {name: one.plan.activation_bits for name, one in model.named_modules() if hasattr(one, "plan")}
    of_bins, one = clipping.grids(store, widths, 10)
    x = torch.randn(1, 3, model.config.sample_size, model.config.sample_size)
    found = {}
    for kind in clipping.KINDS:
        with clipping.hooked(model, clipping.hooks_of(model, clipping.by_bin(of_bins, one, kind, 0), True, clock)):
            found[kind] = model(x, 999).sample
        assert clock.now == 9
    for name, (scale, zero) in one.items():
        model.get_submodule(name).input_scale.data.fill_(scale)
        model.get_submodule(name).input_zero_point.data.fill_(zero)
    assert torch.equal(model(x, 999).sample, found["one"])
    assert not torch.equal(found["by bin"], found["one"])
    assert any(of_bins[name] != clipping.dealt(of_bins[name], 0, 0) for name in of_bins)


def test_a_channel_far_out_is_clipped(clipping):
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(clipping.clipped(x, 1.0, (-1,)), x)
    near = clipping.clipped(x, 0.5, (-1,))
    assert torch.allclose(near.abs().amax(-1), 0.5 * x.abs().amax(-1))
