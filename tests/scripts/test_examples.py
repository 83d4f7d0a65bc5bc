"""Every page of scripts/examples runs, on tiny models, and shows what it says it shows."""

import importlib
import inspect
import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

import ptq4dm
from ptq4dm import UserError
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
    pages = {page.stem for page in EXAMPLES.glob("*.py")} - {"tiny", "large_models"}
    text = Path(__file__).read_text()
    assert len(pages) == 9 and all(f'example("{page}"' in text for page in pages)
    assert all(len(page.read_text().splitlines()) <= 100 for page in EXAMPLES.glob("*.py"))
    table = (EXAMPLES.parent / "README.md").read_text()
    assert all(f"| `{page}.py` | " in table for page in pages) and "| `large_models.py` | no page" in table
    assert "nine short pages to start from" in table


def test_quantize_a_pipeline(example):
    report = example("quantize_a_pipeline", "--tiny", "--num-samples", "4", "--steps", "2", "--output", "out")
    assert report.bytes_after < report.bytes_before
    assert any(is_quantized(module) for module in DiffusionPipeline.from_pretrained("out/model").unet.modules())
    assert len(list(Path("out/images").glob("*.png"))) == 4


def test_what_the_table_says_of_models_is_what_diffusers_has(example):
    known = {kind.__name__ for kind in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}
    table = importlib.import_module("large_models").MODELS
    assert isinstance(importlib.import_module("large_models").recipe("sdxl"), ptq4dm.PTQ4DMConfig)
    assert len(table) == 8 and sum(model.kind in known for model in table.values()) == 6  # and two of videos
    for model in table.values():
        takes = inspect.signature(getattr(diffusers, model.kind).__call__).parameters
        assert model.call.keys() <= takes.keys() and ("negative_prompt" in takes or model.negative is None)


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen-image", "z-image", "sdxl", "sd3", "wan", "ltx"])
def test_four_bits(example, name):
    """Of each class in the table: quantized (with data: FLUX), saved, loaded, painted with."""
    pytest.importorskip("transformers")
    few = ["--model", name, "--tiny", "--steps", "1", "--num-samples", "2"]
    report = example("four_bits", *few, *([] if name == "flux" else ["--no-data"]), "--output", "out")
    assert any(row["format"].startswith("W4A8") for row in report.layers)
    assert report.bytes_after < report.bytes_before
    assert Path("out/first.gif" if name in ("wan", "ltx") else "out/first.png").is_file()
    kind = importlib.import_module("large_models").MODELS[name].kind
    assert json.loads(Path("out/model_index.json").read_text())["_class_name"] == kind


def test_a_folder_of_another_model_is_neither_written_over_nor_taken_for_it(example):
    pytest.importorskip("transformers")
    pipe, _ = importlib.import_module("large_models").opened("sdxl", [], tiny=True)
    pipe.save_pretrained("xl")
    with pytest.raises(UserError, match="xl holds a StableDiffusionXLPipeline, and flux is a FluxPipeline"):
        example("faster", "--tiny", "--quantized", "xl")
    with pytest.raises(UserError, match="xl is the folder of a model"):
        example("four_bits", "--tiny", "--output", "xl")
    Path("text").write_text("mine")
    with pytest.raises(UserError, match="text: it is a file"):
        example("four_bits", "--tiny", "--output", "text")
    assert Path("text").read_text() == "mine" and not Path("xl/first.png").exists()


@pytest.mark.parametrize("name", ["qwen-image", "wan"])
def test_faster(example, name):
    pytest.importorskip("transformers")
    pipe, _ = importlib.import_module("large_models").opened(name, [], tiny=True)
    ptq4dm.quantize(pipe, ptq4dm.SVDQuantConfig(evidence="none", activations="int8"))
    pipe.save_pretrained("four")
    report = example("faster", "--model", name, "--tiny", "--quantized", "four", "--steps", "2", "--output", "out")
    assert report["sampler"]["class"] == "DEISScheduler" and 0 < report["epsilon_error"]["overall"] < 0.05
    assert report["bytes"]["model"] < report["bytes"]["full_precision"] and Path("out/report.json").is_file()


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


@pytest.mark.parametrize("name", ["flux", "ltx"])
def test_lora_on_4_bits(example, name):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    changes, restored = example("lora_on_4_bits", "--model", name, "--tiny", "--steps", "1")
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
