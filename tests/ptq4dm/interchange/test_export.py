"""Files of ComfyUI, loaded and written again: the same bytes by the same names; and what cannot be written."""

import json

import pytest
import torch
from safetensors import safe_open

import foreign_files as files
import models
from ptq4dm import RTNConfig, UserError, export_comfy, load_quantized_file, quantize
from ptq4dm.layers.base import is_quantized

PACKERS = [
    files.comfy_fp8, files.comfy_int8, files.comfy_int8_convrot, files.comfy_int4_convrot, files.comfy_nvfp4,
    files.comfy_awq,
]  # fmt: skip


def read(path):
    """(tensors, JSON of the layers)."""
    with safe_open(path, "pt") as file:
        names = file.keys()
        found = {name: file.get_tensor(name) for name in names}
    marks = [name for name in found if name.endswith("comfy_quant")]
    return found, {name: json.loads(bytes(found.pop(name).tolist())) for name in marks}


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.flatten().view(torch.uint8).equal(
        other.flatten().view(torch.uint8)
    )  # fmt: skip


@pytest.mark.parametrize("packer", PACKERS, ids=lambda one: one.__name__)
def test_what_was_loaded_is_written_as_it_was(packer, tmp_path):
    """q, k and v come apart and together again; of convrot_w4a4 the JSON says that its products are of 8 bits."""
    files.save_comfy(tmp_path / "in", files.original_names(files.flux2()), packer, files.matrices)
    model = load_quantized_file(files.flux2(seed=9), tmp_path / "in")
    export_comfy(model, tmp_path / "out", names=tmp_path / "in")
    (old, said), (new, says) = read(tmp_path / "in"), read(tmp_path / "out")
    assert new.keys() == old.keys() and says.keys() == said.keys() and len(says) == 20
    assert all(same(new[name], old[name]) for name in old)
    more = {"linear_dtype": "int8", "convrot_groupsize": 256} if packer is files.comfy_int4_convrot else {}
    assert all(says[name] == said[name] | more for name in said)


def test_the_header_is_written_anew_and_the_tensors_are_not(tmp_path):
    """JSON that stood in the header stands beside the layers then; metadata of the file is not taken over."""
    state = files.original_names(files.flux2())
    files.save_comfy(tmp_path / "in", state, files.comfy_int8, files.matrices, metadata="header")
    export_comfy(load_quantized_file(files.flux2(seed=9), tmp_path / "in"), tmp_path / "out", names=tmp_path / "in")
    (old, said), (new, says) = read(tmp_path / "in"), read(tmp_path / "out")
    assert not said and len(says) == 20 and new.keys() == old.keys()
    assert all(same(new[name], old[name]) for name in old)
    with safe_open(tmp_path / "out", "pt") as file:
        assert file.metadata() == {"format": "pt", "written_by": "ptq4dm"}


def test_only_an_earlier_export_is_replaced(tmp_path):
    model, place = files.flux2(), tmp_path / "out"
    quantize(model, RTNConfig(activations="dynamic"))
    files.save_file({"mine": torch.zeros(3)}, tmp_path / "safetensors")
    (tmp_path / "letter").write_text("mine")
    for name in ("safetensors", "letter"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(UserError, match=f"{name} is there, and no export of ptq4dm wrote it; give another name"):
            export_comfy(model, tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    export_comfy(model, place)
    first = place.read_bytes()
    export_comfy(model, place)
    assert place.read_bytes() == first


def test_our_own_models_are_written_by_their_own_names(tmp_path):
    model = files.flux2()
    quantize(model, RTNConfig(transforms=("hadamard:64",), activations="dynamic"))
    export_comfy(model, tmp_path / "out")
    tensors, says = read(tmp_path / "out")
    layers = {name for name, one in model.named_modules() if is_quantized(one)}
    assert {name.removesuffix(".comfy_quant") for name in says} == layers and len(layers) > 10
    assert {one["format"] for one in says.values()} == {"int8_tensorwise"}
    plain = {name for name, one in says.items() if one == {"format": "int8_tensorwise"}}
    assert plain == {"x_embedder.comfy_quant"}  # of 16 inputs, which are no group
    assert all(one["convrot"] and one["convrot_groupsize"] == 64 for name, one in says.items() if name not in plain)
    again = load_quantized_file(files.flux2(seed=9), tmp_path / "out")
    assert torch.equal(files.run_flux2(again), files.run_flux2(model))
    assert tensors["transformer_blocks.0.attn.to_q.weight_scale"].shape == (256, 1)


def test_what_no_format_of_comfyui_holds_is_refused(tmp_path):
    model = files.flux2()
    with pytest.raises(UserError, match="no quantized layers"):
        export_comfy(model, tmp_path / "out")
    quantize(model, RTNConfig(weight_bits=4, group_size=64, activations="dynamic"))
    with pytest.raises(UserError, match="layer '.*' is W4A8 g64 dynamic, which no format of ComfyUI holds"):
        export_comfy(model, tmp_path / "out")
    model = files.flux2()
    quantize(model, RTNConfig(format="fp8", activations="dynamic"))
    with pytest.raises(UserError, match="has several scales where ComfyUI's float8_e4m3fn has one"):
        export_comfy(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_convolutions_are_written_as_the_floats_that_they_stand_for(tmp_path):
    """A DiT as `quantize` leaves it; its Linear layers in 8 bits as they are."""
    model = models.dit(in_channels=3, out_channels=3, num_attention_heads=1, attention_head_dim=32).half()
    quantize(model, RTNConfig(activations="dynamic"))
    assert is_quantized(model.pos_embed.proj)
    assert export_comfy(model, tmp_path / "out") == ["pos_embed.proj"]
    tensors, says = read(tmp_path / "out")
    assert "pos_embed.proj.comfy_quant" not in says and len(says) > 10
    right = model.pos_embed.proj.dequantized_weight().half()
    assert same(tensors["pos_embed.proj.weight"], right) and "pos_embed.proj.bias" in tensors
    again = load_quantized_file(models.dit(5, in_channels=3, out_channels=3, num_attention_heads=1,
                                           attention_head_dim=32).half(), tmp_path / "out")  # fmt: skip
    assert torch.equal(again.pos_embed.proj.weight, right)
    model = models.unet()
    linear = tuple(name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear))
    quantize(model, RTNConfig(activations="dynamic", modules_to_not_convert=linear))
    with pytest.raises(UserError, match="convolutions alone are quantized"):
        export_comfy(model, tmp_path / "none")


def test_a_name_that_says_another_format_is_refused(tmp_path):
    model = files.flux2()
    quantize(model, RTNConfig(activations="dynamic"))
    for name in ("file.gguf", "file.PTH"):
        with pytest.raises(
            UserError, match=f"{name} would be a .safetensors file, and its name says .{name[5:].lower()};"
        ):
            export_comfy(model, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_layers_that_a_file_joins_are_of_one_format(tmp_path):
    files.save_comfy(tmp_path / "names", files.original_names(files.flux2()), files.comfy_fp8, files.matrices)
    model = files.flux2()
    kept = ("transformer_blocks.0.attn.to_k",)
    quantize(model, RTNConfig(activations="dynamic", modules_to_not_convert=kept))
    with pytest.raises(UserError, match="to_k.weight' is in full precision, and .*to_q.weight', which .*qkv.weight'"):
        export_comfy(model, tmp_path / "out", names=tmp_path / "names")
    other = torch.nn.Linear(4, 4)
    with pytest.raises(UserError):
        export_comfy(other, tmp_path / "out")
    model = load_quantized_file(files.flux2(seed=9), tmp_path / "names")
    with pytest.raises(UserError, match="names in .*|has no tensor of as many rows"):
        small = {"img_in.weight": torch.zeros(4, 4)}
        files.save_file(small, tmp_path / "small")
        export_comfy(model, tmp_path / "out", names=tmp_path / "small")
    assert not (tmp_path / "out").exists()


def test_models_with_adapters_are_refused(tmp_path):
    """Their layers have other names, and the adapter would be lost."""
    peft = pytest.importorskip("peft")
    files.save_comfy(tmp_path / "in", files.original_names(files.flux2()), files.comfy_int8, files.matrices)
    for model in (files.flux2(), load_quantized_file(files.flux2(), tmp_path / "in")):
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
        with pytest.raises(UserError, match="adapter"):
            export_comfy(model, tmp_path / "out") if is_loaded(model) else load_quantized_file(model, tmp_path / "in")
    assert not (tmp_path / "out").exists()


def is_loaded(model):
    return any(is_quantized(one) for one in model.modules())
