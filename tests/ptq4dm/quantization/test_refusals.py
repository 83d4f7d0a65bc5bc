"""Models that were changed after they were built, and diffusers' own calls on quantized ones."""

import copy
import json

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig

import denoisers
import ptq4dm
from helpers import distance, normal
from models import conditional_unet
from ptq4dm import RTNConfig, UserError
from ptq4dm.calibration.record import replay
from ptq4dm.layers.base import is_quantized
from ptq4dm.quantization.diffusers_bridge import quantization_config

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
DYNAMIC = RTNConfig(activations="dynamic")
LORA = LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False)


@pytest.fixture
def flux():
    """(a FLUX in full precision, its calls)"""
    model, store = denoisers.pair("flux")
    return model, store.calls


@pytest.fixture
def quantized(flux):
    model, calls = flux
    ptq4dm.quantize(model, DYNAMIC)
    return model, calls


def compiled(model):
    return torch.compile(model)


def adapted(model):
    model.add_adapter(LORA)
    return model


def wrapped(model):
    model.add_adapter(LORA)
    model.delete_adapters("default")
    return model


def cast(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return model


def offloaded(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    return model


@pytest.mark.parametrize(
    "change, sentence",
    [
        (compiled, "compiled; quantize it first"),
        (adapted, "adapters are on the model \\(on 'transformer_blocks.0.attn.to_q'"),
        (wrapped, "adapters are on the model"),
        (cast, "cast layer by layer; quantize it first"),
        (offloaded, "offloaded or cast layer by layer"),
        (lambda model: model.to("meta"), "is not in memory"),
    ],
    ids=["compiled", "adapted", "wrapped", "cast", "offloaded", "meta"],
)
def test_what_cannot_be_quantized(flux, change, sentence):
    model = change(flux[0])
    with pytest.raises(UserError, match=sentence):
        ptq4dm.quantize(model, DYNAMIC)
    assert not any(is_quantized(module) for module in model.modules())


def test_adapters_that_were_fused_in_full_precision_are_quantized(flux, tmp_path):
    model, calls = flux
    adapted(model).fuse_lora()
    model.unload_lora()
    expected = replay(model, calls)
    ptq4dm.quantize(model, DYNAMIC)
    answer = replay(model, calls)
    assert distance(answer, expected) < 0.05
    model.save_pretrained(tmp_path)
    assert torch.equal(replay(type(model).from_pretrained(tmp_path), calls), answer)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_fused_projections_load_again(kind, tmp_path):
    model, store = denoisers.pair(kind)
    model.fuse_qkv_projections()
    expected = replay(model, store.calls)
    ptq4dm.quantize(model, DYNAMIC)
    answer = replay(model, store.calls)
    assert distance(answer, expected) < 0.05 and is_quantized(model.transformer_blocks[0].attn.to_qkv)
    model.save_pretrained(tmp_path / "a")
    again = type(model).from_pretrained(tmp_path / "a")
    assert torch.equal(replay(again, store.calls), answer)
    again.save_pretrained(tmp_path / "b")
    assert torch.equal(replay(type(model).from_pretrained(tmp_path / "b"), store.calls), answer)


# --- a quantized model --------------------------------------------------------------------------------------


def test_calls_of_diffusers_that_need_float_weights(quantized):
    model, calls = quantized
    before = replay(model, calls)
    adapted(model).set_adapters("default", 0.0)
    for call in (model.fuse_lora, model.unfuse_lora):
        with pytest.raises(UserError, match="float weights.*set_adapters.*svdquant.fuse_lora"):
            call()
    with pytest.raises(UserError, match="float weights.*ptq4dm.fuse"):
        model.fuse_qkv_projections()
    assert torch.equal(replay(model, calls), before) and not hasattr(model.transformer_blocks[0].attn, "to_qkv")


def test_dequantized_models_have_diffusers_own_calls(quantized):
    model, calls = quantized
    model.config.mark = "kept"  # as diffusers sets attributes on a config
    model.dequantize()
    assert model.config.mark == "kept" and quantization_config(model) is None
    before = replay(model, calls)
    model.fuse_qkv_projections()
    assert torch.allclose(replay(model, calls), before, atol=1e-4)
    assert model.to(torch.float64).dtype == torch.float64 and not model._state_dict_hooks


def test_adapters_are_taken_off_before_saving(quantized, tmp_path):
    model, calls = quantized
    before = replay(model, calls)
    adapted(model)
    with pytest.raises(UserError, match="adapters are on the model.*before you save.*svdquant.fuse_lora"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    model.save_lora_adapter(tmp_path / "adapter")
    model.delete_adapters("default")  # peft's wrappers stay around the layers, and are not in the file
    model.save_pretrained(tmp_path / "b")
    assert torch.equal(replay(type(model).from_pretrained(tmp_path / "b"), calls), before)


def test_what_would_not_load_again_is_not_saved(quantized, tmp_path):
    model, _ = quantized
    model.extra = torch.nn.Linear(3, 3)
    with pytest.raises(UserError, match="'extra.weight' is not as in a new FluxTransformer2DModel"):
        model.save_pretrained(tmp_path / "a")
    del model.extra
    model.proj_out = torch.nn.Linear(64, 16)
    with pytest.raises(UserError, match="'proj_out' was quantized and is not any more"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_model_that_nobody_holds_moves(quantized):
    """`quantized().to(...)`: what stands in the model's place must not let go of it."""
    model, _ = quantized
    assert copy.deepcopy(model).cpu().to("cpu", memory_format=torch.channels_last).dtype == torch.float32


def test_copies_answer_for_themselves(quantized, tmp_path):
    model, _ = quantized
    other = copy.deepcopy(model)
    adapted(model)
    other.save_pretrained(tmp_path)
    assert type(FluxTransformer2DModel.from_pretrained(tmp_path)) is FluxTransformer2DModel
    torch.save(other, tmp_path / "pickled")
    again = torch.load(tmp_path / "pickled", weights_only=False)
    assert again.hf_quantizer.model.of() is again and again.save_lora_adapter.of() is again


def test_state_dict_knows_the_shapes_of_weights(quantized):
    model, _ = quantized
    tensors, name = model.state_dict(), "transformer_blocks.0.attn.to_q"
    assert f"{name}.weight" in tensors and tensors[f"{name}.weight"].shape == (64, 64)
    assert f"{name}.weight" not in list(tensors) and len(list(tensors)) == len(tensors)
    assert f"{name}.other" not in tensors
    with pytest.raises(KeyError):
        tensors[f"{name}.other"]


# --- IP-Adapters --------------------------------------------------------------------------------------------


def ip_adapter(model):
    """The tensors of an IP-Adapter for a UNet with texts of width 16, as its file holds them."""
    ip, key = {}, 1
    for name in model.attn_processors:
        if name.endswith("attn2.processor"):
            layer = model.get_submodule(name.replace(".processor", ".to_k"))
            for number, part in enumerate(("to_k_ip", "to_v_ip")):
                shape = layer.out_features, layer.in_features
                ip[f"{key}.{part}.weight"] = normal(*shape, seed=2 * key + number, scale=0.3)
            key += 2
    width = layer.in_features
    proj = {"proj.weight": normal(4 * width, 8, seed=1), "proj.bias": torch.zeros(4 * width)}
    norm = {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    return {"image_proj": proj | norm, "ip_adapter": ip}


@torch.no_grad()
def painted(model, image=True):
    width = model.config.cross_attention_dim
    more = {"added_cond_kwargs": {"image_embeds": [normal(2, 1, 8, seed=9)]}} if image else {}
    size = model.config.sample_size
    return model(normal(2, 4, size, size), 500, normal(2, 3, width, seed=8), **more).sample


@pytest.mark.parametrize("first", ["adapter", "quantize"])
def test_ip_adapters(first, tmp_path):
    model = conditional_unet(in_channels=4, out_channels=4).eval()
    plain = copy.deepcopy(model)
    plain._load_ip_adapter_weights([ip_adapter(plain)])
    expected, without = painted(plain), painted(model, image=False)
    assert distance(without, expected) > 0.1
    for step in (first, {"adapter": "quantize", "quantize": "adapter"}[first]):
        if step == "adapter":
            model._load_ip_adapter_weights([ip_adapter(model)])
        else:
            ptq4dm.quantize(model, DYNAMIC)
    assert model.config.encoder_hid_dim_type == "ip_image_proj"
    assert distance(painted(model), expected) < 0.1
    assert not any("_ip" in name for name in quantization_config(model).plan.layers)
    with pytest.raises(UserError, match="IP-Adapter.*unload_ip_adapter"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_entry_of_the_recipe_is_saved_with_all_others(quantized, tmp_path):
    model, _ = quantized
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["quantization_config"]["method"] == "rtn" and saved["num_layers"] == 1
