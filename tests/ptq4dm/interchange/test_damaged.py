"""What cannot be loaded is refused in one sentence, and the model is as it was."""

import json
import os
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import foreign_files as files
import models
from ptq4dm import DamagedFile, RTNConfig, UserError, load_quantized_file, quantize


def dit(seed=0):
    return models.dit(seed, in_channels=3, out_channels=3, num_attention_heads=1, attention_head_dim=32)


def rows(name, value):
    return value.ndim == 2 and value.shape[1] % 32 == 0 and "embedding_table" not in name


def state():
    return {name: one.detach().numpy() for name, one in dit().state_dict().items()}


LAYER = "transformer_blocks.0.attn1.to_q"


def comfy(tmp_path, change, packer=files.comfy_int8):
    """A file in which `change` has changed the tensors, or given others, and the metadata it may have."""
    files.save_comfy(tmp_path / "right", state(), packer, rows)
    tensors = load_file(tmp_path / "right")
    header = change(tensors) or {}
    save_file({name: one.contiguous() for name, one in tensors.items()}, tmp_path / "file", metadata=header)
    return tmp_path / "file"


def said(tensors, **config):
    text = json.dumps({"format": "int8_tensorwise", **config}).encode()
    tensors[f"{LAYER}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)


def text(json_):
    return torch.tensor(list(json_.encode()), dtype=torch.uint8)


def put(name, value):
    return lambda tensors: tensors.update({f"{LAYER}.{name}": value})


CHANGES = {
    "mxfp8": (lambda t: said(t, format="mxfp8"), "to_q' of .* is mxfp8, for which there are no layers"),
    "w4a8": (lambda t: said(t, format="asym_w4a8_int8"), "is asym_w4a8_int8, for which there are no layers"),
    "no scale": (lambda t: t.pop(f"{LAYER}.weight_scale"), "it has no weight_scale"),
    "few scales": (put("weight_scale", torch.ones(3)), "holds 3 scales for 32 outputs"),
    "a scale of zero": (put("weight_scale", torch.zeros(1)), "'.*to_q.weight_scale' holds 0, and scales are above"),
    "NaN": (put("weight_scale", torch.full((1,), torch.nan)), "to_q.weight_scale' holds NaN"),
    "a type": (put("weight", torch.zeros(32, 32)), "its weight is float32"),
    "int16": (
        lambda t: (t.pop(f"{LAYER}.comfy_quant"), put("weight", torch.zeros(32, 32).short())(t)),
        "is int16 with",
    ),
    "a shape": (
        put("weight", torch.ones(32, 64, dtype=torch.int8)),
        "has 64 inputs and 32 outputs; the model needs 32",
    ),
    "a code": (put("weight", torch.full((32, 32), -128, dtype=torch.int8)), "to_q.weight' .its codes. holds -128"),
    "a group": (
        lambda t: said(t, convrot=True, convrot_groupsize=4),
        "'.*to_q' of .*/file: .*groups of 16, 64 or 256, not 4",
    ),
    "a group that does not divide": (lambda t: said(t, convrot=True), "32 inputs do not divide into groups of 256"),
    "a group of text": (lambda t: said(t, convrot=True, convrot_groupsize="x"), "its convrot_groupsize is 'x'"),
    "no JSON": (put("comfy_quant", torch.tensor([1], dtype=torch.uint8)), "to_q.comfy_quant': Expecting value"),
    "JSON that is no object": (put("comfy_quant", text("[1]")), "to_q.comfy_quant': it holds no object but list"),
    "JSON without a format": (put("comfy_quant", text("{}")), "to_q.comfy_quant': no 'format' in it"),
    "JSON of floats": (put("comfy_quant", torch.ones(2)), "is no text"),
    "JSON without a weight": (
        lambda t: t.pop(f"{LAYER}.weight"),
        "says how '.*to_q' is quantized, and has no weight",
    ),
    "no bias": (lambda t: t.pop(f"{LAYER}.bias"), "no '.*to_q.bias' in it, which the layer needs"),
    "no norm": (lambda t: t.pop("proj_out_1.bias"), "lacks 'proj_out_1.bias'|no 'proj_out_1.bias'"),
    "left over": (
        lambda t: t.update({"strange": torch.ones(3)}),
        "has 'strange', which the DiTTransformer2DModel has not",
    ),
    "a renamed weight": (
        lambda t: t.update({"proj_out_9.bias": t.pop("proj_out_2.bias")}),
        "has 'proj_out_9.bias', which the DiTTransformer2DModel has not, and lacks 'proj_out_2.bias'",
    ),
    "a header of a layer": (
        lambda t: {"_quantization_metadata": '{"layers": {"a.b": 1}}'},
        "'a.b' of its _quantization_metadata: it holds no object but 1",
    ),
    "a header": (lambda t: {"_quantization_metadata": "[1]"}, "holds no object but list"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_comfy(kind, tmp_path):
    change, message = CHANGES[kind]
    file = comfy(tmp_path, lambda tensors: header if isinstance(header := change(tensors), dict) else None)
    model, before = dit(5), dit(5).state_dict()
    with pytest.raises(UserError, match=message) as error:
        load_quantized_file(model, file)
    assert str(file) in str(error.value) and len(str(error.value).splitlines()) == 1
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_comfy_as_it_was_saved_loads(tmp_path):
    """The file that all those above are made from."""
    assert load_quantized_file(dit(5), comfy(tmp_path, lambda tensors: None)) is not None


def gguf(tmp_path, kind=files.Q8_0, **more):
    tensors = {}
    for name, value in state().items():
        if rows(name, value):
            tensors[name] = (value.shape, kind, files.q8_0(value)[0])
        else:
            tensors[name] = (value.shape, 0, value.astype(np.float32).tobytes())
    files.save_gguf(tmp_path / "file", tensors, **more)
    return tmp_path / "file"


def test_gguf_of_any_alignment_and_version_loads(tmp_path):
    for more in ({}, {"alignment": 64}, {"version": 2}):
        model = load_quantized_file(dit(5), gguf(tmp_path, **more))
        assert torch.equal(model.pos_embed.proj.weight, dit().pos_embed.proj.weight)


@pytest.mark.parametrize(("kind", "message"), [(10, "is Q2_K; what loads is Q4_0, "), (99, "is type 99; what loads")])
def test_gguf_of_other_blocks_is_refused(kind, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_quantized_file(dit(5), gguf(tmp_path, kind))


def test_scales_of_a_gguf_file_are_told_by_the_name_that_it_has(tmp_path):
    tensors = {name: (value.shape, 0, value.astype(np.float32).tobytes()) for name, value in state().items()}
    value = state()["proj_out_2.weight"]
    tensors["proj_out_2.weight"] = (value.shape, files.Q8_0, b"\xff" * len(files.q8_0(value)[0]))
    files.save_gguf(tmp_path / "file", tensors)
    with pytest.raises(DamagedFile, match="file .*'proj_out_2.weight' .its scales. holds NaN"):
        load_quantized_file(dit(5), tmp_path / "file")


@pytest.mark.parametrize("share", [0, 0.0003, 0.01, 0.05, 0.5, 0.9, 0.999])
def test_a_gguf_file_that_is_cut_short_is_refused(share, tmp_path):
    file = gguf(tmp_path)
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match="file"):
        load_quantized_file(dit(5), file)


TOO_MANY = struct.pack("<Q", 1 << 60)
HEADS = {
    "a version": (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "it is of version 50331648"),
    "many tensors": (b"GGUF" + struct.pack("<I", 3) + TOO_MANY + bytes(8), "ends in the middle"),
    "many entries": (b"GGUF" + struct.pack("<IQ", 3, 0) + TOO_MANY, "ends in the middle"),
    "a long text": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + TOO_MANY, "ends in the middle"),
    "a long array": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 0) + struct.pack("<II", 9, 0) + TOO_MANY, "ends in the"),
    "arrays of arrays": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 0) + struct.pack("<IIQ", 9, 9, 1),
        "value of type 9",
    ),
    "a type": (b"GGUF" + struct.pack("<IQQQI", 3, 0, 1, 0, 77), "value of type 77"),
    "no tensors": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "holds floats alone"),
    "dimensions": (b"GGUF" + struct.pack("<IQQQI", 3, 1, 0, 0, 1 << 30), "has 1073741824 dimensions"),
    "alignment": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files._text("general.alignment") + bytes(8), "is 0"),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_header_that_lies_is_refused(kind, tmp_path):
    head, message = HEADS[kind]
    (tmp_path / "file").write_bytes(head)
    with pytest.raises(UserError, match=message):
        load_quantized_file(dit(), tmp_path / "file")


def test_files_that_are_none(tmp_path):
    (tmp_path / "text").write_text("words, and no tensors")
    (tmp_path / "empty").touch()
    for name in ("text", "empty", "nowhere", "."):
        with pytest.raises(UserError, match=f"{tmp_path}.*(cannot be read|is missing)"):
            load_quantized_file(dit(), tmp_path / name)
    (tmp_path / "a.gguf").write_bytes(b"GGUX" + bytes(60))
    with pytest.raises(UserError, match="a.gguf .*it is no GGUF file: it begins with b'GGUX'"):
        load_quantized_file(dit(), tmp_path / "a.gguf")
    os.mkfifo(tmp_path / "pipe")  # which would keep a reader waiting
    with pytest.raises(UserError, match="pipe cannot be read .it is no plain file."):
        load_quantized_file(dit(), tmp_path / "pipe")
    save_file({name: torch.from_numpy(np.array(one)) for name, one in state().items()}, tmp_path / "floats")
    with pytest.raises(UserError, match="holds floats alone; load it with diffusers"):
        load_quantized_file(dit(), tmp_path / "floats")


@pytest.mark.parametrize("recipe", [{}, {"format": "fp8"}, {"weight_bits": 4}], ids=str)
def test_our_own_files_are_told_from_floats(recipe, tmp_path):
    model = dit()
    quantize(model, RTNConfig(activations="dynamic", **recipe))
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match="is of a model that ptq4dm has quantized; load its folder"):
        load_quantized_file(dit(), file)
    with pytest.raises(UserError, match="has codes in '.*qweight', as ptq4dm, Nunchaku and others save theirs"):
        load_quantized_file(dit(), file.rename(tmp_path / "alone.safetensors"))


def test_a_model_that_is_quantized_already_is_refused(tmp_path):
    model = dit()
    quantize(model, RTNConfig(activations="dynamic"))
    with pytest.raises(UserError, match="has quantized layers; load into one in full precision"):
        load_quantized_file(model, comfy(tmp_path, lambda tensors: None))


def test_damage_is_a_damaged_file(tmp_path):
    with pytest.raises(DamagedFile):
        load_quantized_file(dit(), comfy(tmp_path, put("weight_scale", torch.zeros(1))))
