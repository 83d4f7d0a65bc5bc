"""--optimize: the same pictures but for rounding, in a folder of their own, and what was done is said."""

import json

import pytest
import torch
from diffusers import DDIMScheduler

from models import pixel_dit
from ptq4dm import PixelDiTPipeline
from ptq4dm.caching.step_plan import StepPlan
from ptq4dm.cli.main import main
from ptq4dm.inference import optimize as verb
from ptq4dm.inference import steps
from traced_graphs import TracedGraphs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steps, "has_graphs", lambda device: True)
    monkeypatch.setattr(steps, "backend", TracedGraphs)
    monkeypatch.setattr(verb, "why_not_on_cpu", lambda model: "it takes too long for a test")
    PixelDiTPipeline(pixel_dit(sample_size=32, num_layers=2), DDIMScheduler()).save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"


def pixels(folder):
    from ptq4dm.pipelines.images import load_images

    return torch.stack([torch.as_tensor(one).float() for one in load_images(sorted(folder.glob("*.png")))])


def test_generate(model, tmp_path, capsys):
    options = ["generate", "--model", str(model), "--num-images", "2", "--num-inference-steps", "3"]
    assert main([*options, "--output", "plain"]) == 0
    capsys.readouterr()
    assert main([*options, "--output", "fast", "--optimize", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert any("1 captured" in line and "2 calls replayed" in line for line in facts["optimized"])
    assert (pixels(tmp_path / "plain") - pixels(tmp_path / "fast")).abs().max() <= 1
    assert main([*options, "--output", "plain", "--optimize"]) == 2
    assert "differs in optimized" in capsys.readouterr().err
    for flag, value, said in [
        ("--weight-cache", "1GB", "--weight-cache is a part of --optimize; give both"),
        ("--attention", "auto", "--attention is a part of --optimize; give both"),
        ("--optimize", "--weight-cache=much", "weight_cache is memory such as"),
    ]:
        assert main([*options, "--output", "new", flag, value]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_evaluate(model, capsys):
    few = ["--num-images", "0", "--metric", "none", "--num-paired", "2", "--num-heldout", "2", "--batch-size", "2"]
    few += ["--num-inference-steps", "2", "--full-precision", str(model)]
    StepPlan(((), (1.0,)), depth=0).save(model / "reuse.json")
    reuse = ["--reuse", str(model / "reuse.json"), "--output", str(model / "out")]
    assert main(["evaluate", "--model", str(model), *few, "--optimize", *reuse]) == 0
    out = capsys.readouterr().out
    assert out.count("DiTTransformer2DModel on cpu") == 2 and "calls replayed" in out
    made = json.loads((model / "out" / "report.json").read_text())["metadata"]
    assert made == {"optimized": True, "reuse": {"weights": [[], [1.0]], "depth": 0}}
    assert main(["evaluate", "--images", "x", "--optimize"]) == 2
    assert "--optimize, --engine and --reuse are for a model" in capsys.readouterr().err
