"""`ptq4dm convert`: files of other tools into a folder that all verbs take, and out of one."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler
from safetensors import safe_open

import foreign_files as files
import models
from ptq4dm.cli.main import main
from ptq4dm.interchange.imported import ImportedConfig
from ptq4dm.layers.base import is_quantized
from ptq4dm.pipelines.load import load_pipeline
from ptq4dm.pipelines.pixel_dit import PixelDiTPipeline
from ptq4dm.quantization.diffusers_bridge import quantization_config

pytestmark = pytest.mark.usefixtures("one_thread")


def dit(seed=0):
    return models.dit(seed, in_channels=3, out_channels=3, num_attention_heads=1, attention_head_dim=32)


def rows(name, value):
    return value.ndim == 2 and value.shape[1] % 32 == 0 and "embedding_table" not in name


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PixelDiTPipeline(dit(seed=1), DDIMScheduler()).save_pretrained("model")
    state = {name: one.detach().numpy() for name, one in dit().state_dict().items()}
    files.save_gguf_state(tmp_path / "file.gguf", state, files.Q8_0, files.q8_0, rows)
    files.save_comfy(tmp_path / "file.safetensors", state, files.comfy_int8, rows)
    yield tmp_path
    AcceleratorState._reset_state()


def test_a_file_becomes_a_folder_that_verbs_take(here, capsys):
    assert main(["convert", "--from", "file.gguf", "--model", "./model", "--output", "q", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == "q" and found["method"]["file"] == "file.gguf"
    assert 0 < found["bytes_after"] < found["bytes_before"]
    pipe = load_pipeline("q")
    layers = [one for one in pipe.transformer.modules() if is_quantized(one)]
    assert len(layers) >= 10 and {str(one.plan) for one in layers} == {"W8A16 blocks g32"}
    assert isinstance(quantization_config(pipe.transformer), ImportedConfig)
    error = (layers[0].dequantized_weight() - dit().get_submodule(first(pipe.transformer)).weight).abs().max()
    assert 0 < error < 0.01
    few = ["--num-images", "1", "--num-inference-steps", "1"]
    assert main(["generate", "--model", "q", *few, "--output", "i", "--quiet"]) == 0
    assert main(["info", "--model", "q", "--verify"]) == 0 and "W8A16 blocks g32" in capsys.readouterr().out
    again = ["convert", "--from", "file.safetensors", "--model", "./model", "--output", "q", "--quiet"]
    assert main(again) == 0 and capsys.readouterr() == ("", "")
    assert "W8A8 dynamic" in {str(one.plan) for one in load_pipeline("q").transformer.modules() if is_quantized(one)}


def first(model):
    return next(name for name, one in model.named_modules() if is_quantized(one))


def test_a_folder_made_of_a_file_is_compared(here):
    """Nobody knows its floats, so that it has no worst layers."""
    assert main(["convert", "--from", "file.gguf", "--model", "./model", "--output", "q", "--quiet"]) == 0
    few = ["--num-images", "1", "--num-heldout", "1", "--timed-steps", "1", "--steps", "1", "--device", "cpu"]
    assert main(["compare", "q", *few, "--output", "cmp", "--quiet"]) == 0
    found = json.loads((here / "cmp" / "comparison.json").read_text())["models"]["q"]
    assert found["worst"] == [] and found["epsilon_error"]["overall"] > 0


def test_convolutions_of_our_own_are_floats_in_the_file_and_it_is_said(here, capsys):
    made = ["quantize", "--model", "./model", "--method", "rtn", "--activations", "dynamic", "--output", "q"]
    assert main([*made, "--quiet"]) == 0 and main(["convert", "--to", "out.safetensors", "--model", "q"]) == 0
    assert "1 quantized convolution is floats in it: pos_embed.proj\n" in capsys.readouterr().out
    assert main(["convert", "--to", "out.safetensors", "--model", "q", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["as_floats"] == ["pos_embed.proj"]


def test_a_folder_becomes_a_file(here, capsys):
    assert main(["convert", "--from", "file.safetensors", "--model", "./model", "--output", "q", "--quiet"]) == 0
    assert main(["convert", "--to", "out.safetensors", "--model", "q", "--names", "file.safetensors", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == "out.safetensors" and found["bytes"] == (here / "out.safetensors").stat().st_size
    with safe_open("out.safetensors", "pt") as new, safe_open("file.safetensors", "pt") as old:
        assert set(new.keys()) == set(old.keys())
        for name in set(new.keys()):
            assert torch.equal(new.get_tensor(name), old.get_tensor(name)), name


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("", "give one of the two"),
        ("--from file.gguf --to x", "give one of the two"),
        ("--from file.gguf", "name the model that it is of with --model"),
        ("--from file.gguf --model ./model --names file.gguf", "--names is a part of --to"),
        ("--to x --model ./model --output y", "--output is a part of --from"),
        ("--from nowhere.gguf --model ./model", "nowhere.gguf is missing"),
        ("--from model --model ./model", "cannot be read"),
        ("--to out --model ./model", "has no quantized layers"),
        ("--to out.gguf --model ./model", "out.gguf would be a .safetensors file, and its name says .gguf"),
        ("--from file.gguf --model ./model --component vae", "has no network 'vae'"),
    ],
)
def test_what_is_wrong_is_one_sentence(here, typed, message, capsys):
    assert main(["convert", *typed.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and len(err.strip().splitlines()) == 1
    assert not (here / "out").exists() or not any((here / "out").iterdir())
