"""--engine: pictures by another library, what ran in integers, and its conversions in the model's folder."""

import json

import pytest
from diffusers import DDIMScheduler

import ptq4dm
from helpers import needs_vnni
from models import pixel_dit
from ptq4dm import PixelDiTPipeline
from ptq4dm.cli.main import main
from ptq4dm.inference.openvino import processor

pytest.importorskip("openvino")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = PixelDiTPipeline(pixel_dit(sample_size=32), DDIMScheduler())
    ptq4dm.quantize(pipe, ptq4dm.RTNConfig(activations="dynamic"))
    pipe.save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"


@needs_vnni
def test_generate(model, capsys):
    options = ["generate", "--model", str(model), "--num-images", "2", "--num-inference-steps", "3", "--json"]
    assert main([*options, "--output", "one", "--engine", "openvino"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert any("quantized layers in products of int8" in line for line in facts["optimized"])
    assert any("1 conversions, 0 loaded" in line and "3 calls" in line for line in facts["optimized"])
    assert main([*options, "--output", "two", "--engine", "openvino"]) == 0
    assert any("0 conversions, 1 loaded" in line for line in json.loads(capsys.readouterr().out)["optimized"])
    assert len(list((model / "openvino").iterdir())) == 1
    assert main([*options, "--output", "three", "--engine", "openvin"]) == 2
    assert "engine 'openvin' is unknown" in capsys.readouterr().err
    assert main([*options, "--output", "three", "--engine", "openvino", "--optimize"]) == 2
    assert "leave it out with --engine" in capsys.readouterr().err


@needs_vnni
def test_evaluate(model, capsys):
    few = ["--num-images", "0", "--metric", "none", "--num-paired", "2", "--num-heldout", "2", "--batch-size", "2"]
    few += ["--num-inference-steps", "2", "--full-precision", str(model)]
    assert main(["evaluate", "--model", str(model), *few, "--engine", "openvino"]) == 0
    assert "quantized layers in products of int8" in capsys.readouterr().out


@needs_vnni
def test_info_names_what_each_product_runs_in(model, capsys):
    assert main(["info", "--model", str(model), "--engine", "openvino", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert len(layers) > 10 and all(row["kernel"].startswith(("openvino i8 ", "openvino u8 ")) for row in layers)
    assert main(["info", "--model", str(model), "--engine", "openvin"]) == 2
    assert "engine 'openvin' is unknown" in capsys.readouterr().err


WRONG = {
    "--engine openvino --reuse 0.4": "--reuse is for PyTorch's own forward",
    "--engine openvino --optimize": "leave it out with --engine",
    "--engine openvin": "engine 'openvin' is unknown",
    "--reuse 7": "--reuse is a share of steps above 0, up to 0.9",
    "--reuse 0": "--reuse is a share of steps above 0, up to 0.9",
}


@pytest.mark.parametrize("flags", WRONG)
def test_flags_that_do_not_go_together_are_refused_before_loading(flags, capsys, monkeypatch):
    for verb in ("generate", "evaluate"):
        monkeypatch.setattr(f"ptq4dm.cli.{verb}.load", lambda *_: pytest.fail("it was loaded"))
        assert main([verb, "--model", "unet-cifar10", *flags.split()]) == 2
        assert WRONG[flags] in capsys.readouterr().err


def test_a_processor_whose_products_overflow_is_told_and_conversions_are_verified(model, capsys, monkeypatch):
    monkeypatch.setattr(processor, "sums_fit", lambda: False)
    assert main(["info", "--model", str(model), "--engine", "openvino"]) == 2
    assert "none of AVX512-VNNI, AVX-VNNI and AMX" in capsys.readouterr().err
    (model / "openvino" / ("a" * 32)).mkdir(parents=True)
    assert main(["info", "--model", str(model), "--verify"]) == 0
    assert "conversions   by openvino: 1, 1 damaged, which are made anew at their next use" in capsys.readouterr().out
