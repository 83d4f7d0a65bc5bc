"""Every page of scripts/examples runs, on tiny models, and shows what it says it shows."""

import importlib
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel

import ptq4dm
from ptq4dm.layers.base import is_quantized

EXAMPLES = Path(__file__).resolve().parents[2] / "scripts" / "examples"
pytestmark = pytest.mark.usefixtures("one_thread", "coarse")


@pytest.fixture
def coarse(monkeypatch):
    """The searches for ranges and smoothing are not what is tested here."""
    monkeypatch.setattr("ptq4dm.ranges.clipping.ACTIVATION_STEPS", 6)


@pytest.fixture
def example(tmp_path, monkeypatch):
    """example("name", *arguments): what the page's main returns, with its output in the test's own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return lambda name, *arguments: importlib.import_module(name).main(list(arguments))


def test_every_page_is_tried_here():
    pages = {page.stem for page in EXAMPLES.glob("*.py")} - {"tiny"}
    text = Path(__file__).read_text()
    assert len(pages) == 8 and all(f'example("{page}"' in text for page in pages)
    assert all(len(page.read_text().splitlines()) <= 100 for page in EXAMPLES.glob("*.py"))


def test_quantize_a_pipeline(example):
    report = example("quantize_a_pipeline", "--tiny", "--num-samples", "4", "--steps", "2", "--output", "out")
    assert report.bytes_after < report.bytes_before
    assert any(is_quantized(module) for module in DiffusionPipeline.from_pretrained("out/model").unet.modules())
    assert len(list(Path("out/images").glob("*.png"))) == 4


def test_four_bit_flux(example):
    pytest.importorskip("transformers")  # diffusers' FLUX pipeline imports it
    report = example("four_bit_flux", "--rank", "8", "--num-samples", "4", "--steps", "1", "--output", "out")
    assert any(row["format"] == "W4A8 g64 r8" for row in report.layers)
    loaded = FluxTransformer2DModel.from_pretrained("out/transformer")
    assert ptq4dm.quantization_config(loaded).rank == 8
    assert len(list(Path("out/images").glob("*.png"))) == 2


def test_few_steps(example):
    found = example("few_steps", "--steps", "5", "--many", "15", "--num-images", "1")
    ddim, deis, ipndm = found.values()
    assert deis > ddim and ipndm > ddim  # higher orders are nearer to the exact solution


def test_distil(example):
    student = example("distil", "--tiny", "--images", "8", "--output", "out")
    assert type(student.scheduler).__name__ == "OneStepScheduler"
    assert type(DiffusionPipeline.from_pretrained("out/model").scheduler) is ptq4dm.samplers.OneStepScheduler
    assert len(list(Path("out/images").glob("*.png"))) == 4


def test_evaluate_your_own(example):
    report = example("evaluate_your_own", "--tiny", "--num-paired", "4", "--steps", "2", "--output", "out")
    assert report["paired"]["num_images"] == 4 and 0 < report["epsilon_error"]["overall"] < 0.1
    assert Path("out/report.json").is_file()


def test_lora_on_4_bits(example):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    changes, restored = example("lora_on_4_bits", "--steps", "1")
    assert changes[1.0] > changes[0.5] > 10 * changes[0.0]
    assert restored


def test_add_a_method(example):
    narrow, wide = (example("add_a_method", "--tiny", "--target", target) for target in ("15", "35"))
    worst = [min(row["sqnr"] for row in report.layers) for report in (narrow, wide)]
    assert worst[0] < worst[1] and worst[0] >= 15 and worst[1] >= 35
    assert any("simulated" in row["format"] for row in narrow.layers)


def test_add_a_format(example, tmp_path):
    report = example("add_a_format", "--tiny")
    assert report.layers and all(row["kernel"] == "reference" and row["format"] == "W1A16" for row in report.layers)


def test_a_model_in_the_new_format_is_saved_and_loaded_to_the_bit(example, tmp_path):
    example("add_a_format", "--tiny")
    pipe = importlib.import_module("tiny").unet()
    ptq4dm.quantize(pipe, importlib.import_module("add_a_format").SignConfig())
    pipe.unet.save_pretrained("saved")
    loaded = type(pipe.unet).from_pretrained("saved")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(x, 10).sample, pipe.unet(x, 10).sample)
    layer = next(module for module in loaded.modules() if is_quantized(module))
    assert layer.qweight.nbytes * 8 == layer.in_features * layer.out_features
