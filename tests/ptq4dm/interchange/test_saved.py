"""A loaded model is one of ours: saved and loaded to the bit, made from the meta device, part of a pipeline."""

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, Flux2Transformer2DModel
from safetensors.torch import load_file, save_file

import foreign_files as files
import models
import ptq4dm
from ptq4dm import UserError, load_quantized_file
from ptq4dm.layers.base import is_quantized
from ptq4dm.svdquant.nunchaku.model import empty_model

KINDS = {
    "Q4_K": (files.save_gguf_state, (files.Q4_K, files.q4_k)),
    "Q8_0": (files.save_gguf_state, (files.Q8_0, files.q8_0)),
    "exact fp8": (files.save_comfy, (lambda w: files.comfy_fp8(w, EXACT), files.matrices)),
    "static fp8": (files.save_comfy, (lambda w: static(files.comfy_fp8(w)), files.matrices)),
    "convrot": (files.save_comfy, (files.comfy_int8_convrot, files.matrices)),
    "convrot w4": (files.save_comfy, (files.comfy_int4_convrot, files.matrices)),
    "nvfp4": (files.save_comfy, (files.comfy_nvfp4, files.matrices)),
    "awq": (files.save_comfy, (files.comfy_awq, files.matrices)),
}
EXACT = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}


def static(packed):
    stored, values, config = packed
    return stored | {"input_scale": torch.tensor(0.05)}, values, config


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_to_the_bit(kind, tmp_path):
    save, arguments = KINDS[kind]
    save(tmp_path / "file", files.original_names(files.flux2()), *arguments)
    model = load_quantized_file(files.flux2(seed=9), tmp_path / "file")
    model.save_pretrained(tmp_path / "model")
    again = Flux2Transformer2DModel.from_pretrained(tmp_path / "model")
    assert ptq4dm.quantization_config(again).method == "loaded-file"
    state = model.state_dict()
    assert state.keys() == again.state_dict().keys() and sum(is_quantized(one) for one in again.modules()) == 24
    for name, one in again.state_dict().items():
        assert one.dtype == state[name].dtype and torch.equal(one.float(), state[name].float()), name
    assert torch.equal(files.run_flux2(again), files.run_flux2(model))


def test_what_the_file_says_of_inputs_is_kept(tmp_path):
    original = files.original_names(files.flux2())
    for kind, plan in (("static fp8", "FP8 static"), ("exact fp8", "FP8 A16 blocks")):
        KINDS[kind][0](tmp_path / "file", original, *KINDS[kind][1])
        model = load_quantized_file(files.flux2(seed=9), tmp_path / "file")
        assert {str(one.plan) for one in model.modules() if is_quantized(one)} == {plan}


def test_older_files_of_scaled_fp8(tmp_path):
    """`scaled_fp8` marks them; of two numbers: products of floats. An input's scale of 1 stands for none."""
    original = files.original_names(files.flux2())
    files.save_comfy(tmp_path / "new", original, lambda w: static(files.comfy_fp8(w)), files.matrices)
    for mark, scale, plan in ((1, 1.0, "FP8 dynamic"), (1, 0.05, "FP8 static"), (2, 1.0, "FP8 A16 blocks")):
        tensors = {}
        for name, one in load_file(tmp_path / "new").items():
            name = name.replace(".weight_scale", ".scale_weight").replace(".input_scale", ".scale_input")
            tensors[name] = torch.tensor(scale) if name.endswith(".scale_input") else one
        tensors = {name: one for name, one in tensors.items() if not name.endswith("comfy_quant")}
        tensors["scaled_fp8"] = torch.zeros(mark).to(torch.float8_e4m3fn)
        save_file(tensors, tmp_path / "old")
        model = load_quantized_file(files.flux2(seed=9), tmp_path / "old")
        assert {str(one.plan) for one in model.modules() if is_quantized(one)} == {plan}


def test_weights_of_e4m3_without_scales_have_scale_one(tmp_path):
    packer = lambda w: (({"weight": files.e4m3(w)[0]}), files.e4m3(w)[1], None)  # noqa: E731
    exact = files.save_comfy(tmp_path / "file", files.original_names(files.flux2()), packer, files.matrices)
    model = load_quantized_file(files.flux2(seed=9), tmp_path / "file")
    right = torch.from_numpy(exact["single_blocks.0.linear2.weight"]).float()
    layer = model.get_submodule("single_transformer_blocks.0.attn.to_out")
    assert torch.equal(layer.dequantized_weight(), right) and str(layer.plan) == "FP8 dynamic"


@pytest.mark.parametrize("kind", ["Q4_K", "convrot", "nvfp4"])
def test_a_model_on_the_meta_device_is_filled(kind, tmp_path):
    save, arguments = KINDS[kind]
    save(tmp_path / "file", files.original_names(files.flux2()), *arguments)
    empty = empty_model(Flux2Transformer2DModel, dict(files.flux2().config), torch.bfloat16)
    model = load_quantized_file(empty, tmp_path / "file")
    assert not any(one.is_meta for one in [*model.parameters(), *model.buffers()])
    assert model.dtype == torch.bfloat16 and model.x_embedder.weight.dtype == torch.bfloat16
    whole = load_quantized_file(files.flux2(seed=9), tmp_path / "file").bfloat16()
    for name, one in whole.state_dict().items():
        assert torch.equal(one, model.state_dict()[name]) and one.dtype == model.state_dict()[name].dtype


def test_a_pipeline_and_its_layers_that_are_no_linear(tmp_path):
    """An embedding that the file has in blocks becomes floats; a pipeline gives its denoiser."""
    dit = lambda seed: models.dit(  # noqa: E731
        seed, in_channels=3, out_channels=3, num_attention_heads=1, attention_head_dim=32
    )
    chosen = lambda name, value: value.ndim == 2 and value.shape[1] % 32 == 0  # noqa: E731
    state = {name: one.detach().numpy() for name, one in dit(0).state_dict().items()}
    exact = files.save_gguf_state(tmp_path / "file", state, files.Q8_0, files.q8_0, chosen)
    pipe = ptq4dm.PixelDiTPipeline(dit(5), DDIMScheduler())
    model = load_quantized_file(pipe, tmp_path / "file")
    assert model is pipe.transformer and isinstance(model, DiTTransformer2DModel)
    table = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    assert torch.equal(model.get_parameter(table), torch.from_numpy(exact[table]).float())
    with pytest.raises(UserError, match="has no network 'vae'"):
        load_quantized_file(pipe, tmp_path / "file", component="vae")
