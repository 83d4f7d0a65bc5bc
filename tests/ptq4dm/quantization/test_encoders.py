"""Text encoders of transformers: quantized, saved and loaded to the bit; what stays as it is, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import ptq4dm
from encoders import ENCODERS, answer, encoder, qwen2
from helpers import distance
from ptq4dm import RTNConfig, UserError
from ptq4dm.layers.base import is_quantized
from ptq4dm.layers.view import find_layers
from ptq4dm.quantization.diffusers_bridge import quantization_config

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
FOUR = dict(weight_bits=4, group_size=64, activation_bits=16, activations="dynamic")
EIGHT = RTNConfig(activations="dynamic")


def quantized(kind, dtype=torch.float32):
    model = encoder(kind, dtype)
    ptq4dm.quantize(model, RTNConfig(**FOUR))
    return model


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize(("config", "error"), [(RTNConfig(**FOUR), 0.5), (EIGHT, 0.05)], ids=["W4A16", "W8A8"])
def test_an_encoder_loads_as_it_was_saved(kind, config, error, tmp_path):
    """Random weights say nothing of quality; the error of 4 bits is many times that of 8."""
    model = encoder(kind)
    before, state = answer(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = ptq4dm.quantize(model, config)
    after = answer(model)
    assert 0 < distance(after, before) < error and len(report.layers) >= 12
    assert {row["format"] for row in report.layers} == {str(choice) for choice in plans(model)}
    assert report.bytes_after < 0.6 * report.bytes_before
    for name, tensor in model.state_dict().items():  # tables, norms, biases
        if name in state:
            assert torch.equal(tensor, state[name]), name
    model.save_pretrained(tmp_path / "a")
    again = type(model).from_pretrained(tmp_path / "a")
    assert torch.equal(answer(again), after) and quantization_config(again).plan == quantization_config(model).plan
    assert not any(p.requires_grad for m in again.modules() if is_quantized(m) for p in m.parameters(recurse=False))
    again.save_pretrained(tmp_path / "b")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert ptq4dm.verify(tmp_path / "b") == {"": len(report.layers)}


def plans(model):
    return quantization_config(model).plan.layers.values()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_scales_as_they_are(dtype, tmp_path):
    model = quantized("t5", dtype)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=dtype)
    for (name, one), (_, two) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        kept = ".wo." in name and name.endswith(".like") and dtype == torch.float16
        assert torch.equal(one, two.to(one.dtype)) and (kept or one.dtype == two.dtype), name
        assert not kept or two.dtype == torch.float32  # transformers runs T5's `wo` in float32, in float16 models
    assert distance(answer(again), answer(model)) < 1e-2


def test_scales_too_small_for_float16_load_as_they_were_saved(tmp_path):
    model = encoder("clip")
    layer = find_layers(model)[0]
    layer.module.weight.data *= 1e-7
    ptq4dm.quantize(model, RTNConfig(**FOUR))
    scales = model.get_submodule(layer.name).wscales
    assert scales.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).get_submodule(layer.name).wscales
    assert loaded.dtype == torch.bfloat16 and torch.equal(loaded, scales)


@pytest.mark.parametrize(
    "make", [lambda: encoder("gemma"), lambda: encoder("qwen_vl"), lambda: qwen2(tied=True).eval()]
)
def test_heads_and_tables_stay(make):
    model = make()
    ptq4dm.quantize(model, RTNConfig(**FOUR))
    assert not is_quantized(model.lm_head) and not is_quantized(model.get_input_embeddings())
    assert all(is_quantized(m) for n, m in model.named_modules() if n.endswith(("q_proj", "down_proj", "mlp.fc1")))


def test_a_layer_that_lends_its_weight_is_no_layer_to_quantize():
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8, bias=False), torch.nn.Linear(8, 8))
    assert [view.name for view in find_layers(model)] == ["1", "2"]
    model[1].weight = model[0].weight
    assert [view.name for view in find_layers(model)] == ["2"]


def test_older_names_of_transformers_are_not_written(tmp_path):
    """They would be those of no plan: Qwen2.5-VL's weights are saved by other names than its modules have."""
    model = quantized("qwen_vl")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    del model._weight_conversions
    model.hf_quantizer = None
    model.save_pretrained(tmp_path / "otherwise")
    assert load_file(tmp_path / "otherwise" / "model.safetensors").keys() != saved.keys()


def test_dequantized_it_is_a_float_model_again(tmp_path):
    model = quantized("clip")
    after = answer(model)
    model.dequantize()
    assert distance(answer(model), after) < 1e-5 and not any(map(is_quantized, model.modules()))
    assert quantization_config(model) is None and not model.is_quantized
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(answer(type(model).from_pretrained(tmp_path)), answer(model))


def test_an_interrupted_one_is_as_it_was(monkeypatch):
    model = encoder("t5")
    before, config = answer(model), model.config.to_dict()
    monkeypatch.setattr("ptq4dm.quantization.quantize.mark_quantized", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ptq4dm.quantize(model, EIGHT)
    assert torch.equal(answer(model), before) and model.config.to_dict() == config
    assert not any(map(is_quantized, model.modules()))


def test_recorded_calls_give_static_inputs(tmp_path):
    model = encoder("t5")
    with ptq4dm.record(model) as calls:
        before = answer(model)
    report = ptq4dm.quantize(model, ptq4dm.PTQ4DMConfig(), calls)
    assert {row["format"] for row in report.layers} == {"W8A8 static"}
    assert {row["basis"] for row in report.layers} == {"output"} and distance(answer(model), before) < 0.1
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(type(model).from_pretrained(tmp_path)), answer(model))


def damaged(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


NAME = "encoder.block.0.layer.0.SelfAttention.q"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{NAME}.wscales"), "lacks 1 tensors of the model"),
        (lambda t: t.pop("shared.weight"), "lacks"),
        (lambda t: t.update({f"{NAME}.extra": torch.ones(1)}), "holds 1 tensors that its plan does not name"),
        (lambda t: t[f"{NAME}.wscales"].fill_(0), f"{NAME}"),
        (lambda t: t[f"{NAME}.qweight"].add_(1), f"'{NAME}'"),
        (lambda t: t["shared.weight"].add_(1), "tensors of layers that are not quantized"),
    ],
)
def test_a_damaged_file_is_told(change, words, tmp_path):
    model = quantized("t5")
    model.save_pretrained(tmp_path)
    damaged(tmp_path, change)
    with pytest.raises(ptq4dm.DamagedFile, match=words):
        type(model).from_pretrained(tmp_path)


def test_a_config_without_its_plan_is_told(tmp_path):
    model = quantized("clip")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["plan"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ptq4dm.DamagedFile, match="holds no plan"):
        type(model).from_pretrained(tmp_path)


def test_shards_load_as_one_file(tmp_path):
    model = quantized("t5")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(answer(type(model).from_pretrained(tmp_path)), answer(model))
    assert ptq4dm.verify(tmp_path) == {"": 14}


def test_packing_while_loading_is_refused(tmp_path):
    model = encoder("clip")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not packed while they load"):
        type(model).from_pretrained(tmp_path, quantization_config=EIGHT)


def test_a_changed_model_is_not_saved(tmp_path):
    model = quantized("clip")
    model.set_input_embeddings(torch.nn.Embedding(40, 64))
    with pytest.raises(UserError, match="is not as in a new CLIPTextModel of the model's config"):
        model.save_pretrained(tmp_path)


def test_an_old_transformers_is_refused(monkeypatch):
    model = encoder("clip")
    del model.all_tied_weights_keys
    with pytest.raises(UserError, match="update transformers to 5 or later"):
        ptq4dm.quantize(model, EIGHT)


def test_what_is_quantized_or_cannot_be_is_told():
    model = quantized("clip")
    with pytest.raises(UserError, match="the model is quantized already"):
        ptq4dm.quantize(model, EIGHT)
    with pytest.raises(UserError, match="the model has no Linear or Conv2d that can be quantized"):
        ptq4dm.quantize(torch.nn.Embedding(2, 2), EIGHT)
