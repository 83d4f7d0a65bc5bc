"""Nunchaku's own INT4 files of FLUX, made by the formulas of their layouts, in our layers."""

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import nn

import nunchaku_bytes
import ptq4dm
from helpers import distance
from ptq4dm.errors import UserError
from ptq4dm.layers.base import is_quantized
from ptq4dm.quantization.diffusers_bridge import quantization_config
from ptq4dm.quantization.report import kernel_report
from ptq4dm.svdquant import load_nunchaku_flux
from ptq4dm.svdquant.layers.split import SplitLinear
from ptq4dm.svdquant.layers.svdq import SVDQLinear

pytestmark = pytest.mark.usefixtures("one_thread")
D, S = "transformer_blocks.0", "single_transformer_blocks.0"
SHIFTED = ("mlp_fc2", "mlp_context_fc2")
SIZES = {
    "qkv_proj": (384, 128), "qkv_proj_context": (384, 128), "out_proj": (128, 128), "out_proj_context": (128, 128),
    "mlp_fc1": (512, 128), "mlp_context_fc1": (512, 128), "mlp_fc2": (128, 512), "mlp_context_fc2": (128, 512),
}  # fmt: skip
NORMS = {f"{D}.norm1.linear": 6, f"{D}.norm1_context.linear": 6, f"{S}.norm.linear": 3}
PLACES = {
    "out_proj": "attn.to_out.0", "out_proj_context": "attn.to_add_out", "mlp_fc1": "ff.net.0.proj",
    "mlp_fc2": "ff.net.2", "mlp_context_fc1": "ff_context.net.0.proj", "mlp_context_fc2": "ff_context.net.2",
}  # fmt: skip
V1 = {"proj_down": "lora_down", "proj_up": "lora_up", "smooth_factor": "smooth"}
QUANTIZATION = {"method": "svdquant", "weight": {"dtype": "int4", "group_size": 64}, "rank": 16}


def interleave(rows, chunks):
    """Row j of chunk c goes to j * chunks + c."""
    mixed = torch.empty_like(rows)
    for c in range(chunks):
        for j in range(len(rows) // chunks):
            mixed[j * chunks + c] = rows[c * (len(rows) // chunks) + j]
    return mixed


def scale_rows(layer, chunks):
    """The rows of an AdaLN layer by which something is multiplied: shift, SCALE, gate (, shift, SCALE, gate)."""
    return torch.arange(len(layer.codes)).view(chunks, -1)[1::3].flatten()


def tensors_of_norm(layer, chunks):
    bias = layer.bias.float()
    bias[scale_rows(layer, chunks)] += 1
    bias = interleave(bias.to(layer.bias.dtype), chunks)
    return nunchaku_bytes.tensors_of(
        nunchaku_bytes.Layer(interleave(layer.codes, chunks), interleave(layer.scales, chunks), bias=bias)
    )


@pytest.fixture(scope="module")
def layers():
    """v1 name -> the layer in plain order, as the file fuses and cuts them."""
    found = {}
    names = [f"{D}.{name}" for name in SIZES] + [f"{S}.{name}" for name in SIZES if "context" not in name]
    for seed, name in enumerate(names):
        n, k = SIZES[name.split(".")[-1]]
        shift = nunchaku_bytes.SHIFT if name.endswith(SHIFTED) else 0.0
        found[name] = nunchaku_bytes.random_layer(n, k, 32 if name.startswith(S) else 16, seed=seed, shift=shift)
    found[f"{S}.out_proj"].bias[:] = 0
    for seed, (name, chunks) in enumerate(NORMS.items()):
        found[name] = nunchaku_bytes.random_layer(128 * chunks, 128, seed=seed + 50, kind="awq")
        rows = scale_rows(found[name], chunks)
        found[name].bias[rows] = ((found[name].bias[rows].float() + 1).bfloat16().float() - 1).bfloat16()
    return found


@pytest.fixture(scope="module")
def tensors(layers):
    """The file, by v1 names."""
    found = {}
    for name, layer in layers.items():
        if name in NORMS:
            found |= {f"{name}.{key}": t for key, t in tensors_of_norm(layer, NORMS[name]).items()}
            continue
        for key, tensor in nunchaku_bytes.tensors_of(layer).items():
            found[f"{name}.{V1.get(key, key)}"] = tensor
        found[f"{name}.smooth_orig"] = found[f"{name}.smooth"].clone()
    for key, tensor in nunchaku_bytes.tiny_flux().state_dict().items():
        block, inner = ".".join(key.split(".")[:2]), ".".join(key.split(".")[2:])
        if inner.startswith("attn.norm_"):
            found[f"{block}.{inner.removeprefix('attn.')}"] = torch.rand_like(tensor).bfloat16()
        elif block not in (D, S):
            found[key] = tensor.bfloat16()
    return found


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("flux") / "svdq-int4_r16-flux.safetensors"
    write(path, tensors)
    return path


def write(path, tensors, **metadata):
    config = nunchaku_bytes.tiny_flux().to_json_string()
    metadata = {"config": config, "quantization_config": json.dumps(QUANTIZATION), **metadata}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


@pytest.fixture(scope="module")
def wanted(layers, tensors):
    """(diffusers' name -> layer, name -> layers over ranges of the inputs): what the model is to compute."""
    plain = {name: layers[name] for name in NORMS}
    for block, source, names in [
        (D, "qkv_proj", ["to_q", "to_k", "to_v"]),
        (D, "qkv_proj_context", ["add_q_proj", "add_k_proj", "add_v_proj"]),
        (S, "qkv_proj", ["to_q", "to_k", "to_v"]),
    ]:
        for i, name in enumerate(names):
            plain[f"{block}.attn.{name}"] = layers[f"{block}.{source}"].rows(slice(128 * i, 128 * (i + 1)))
    plain |= {f"{D}.{place}": layers[f"{D}.{name}"] for name, place in PLACES.items()}
    plain[f"{S}.proj_mlp"] = layers[f"{S}.mlp_fc1"]
    return plain, {f"{S}.proj_out": [layers[f"{S}.out_proj"], layers[f"{S}.mlp_fc2"]]}


def test_every_layer_is_the_formula(file, wanted):
    model = load_nunchaku_flux(file, nunchaku_bytes.tiny_flux())
    plain, cut = wanted
    assert {name for name, layer in model.named_modules() if is_quantized(layer)} == {*plain, *cut}
    for seed, (name, parts) in enumerate({**{name: [layer] for name, layer in plain.items()}, **cut}.items()):
        ours, theirs = model.get_submodule(name), nunchaku_bytes.Computed(*parts)
        x = torch.randn(2, 9, ours.in_features, generator=torch.Generator().manual_seed(seed))
        x = torch.nn.functional.gelu(x) if any(part.shift for part in parts) else x
        assert distance(ours(x), theirs(x.double())) < 1e-6, name
        assert distance(ours.dequantized().float()(x), theirs(x)) < 0.2, name
    assert model.get_submodule(f"{D}.attn.to_k").down is None  # to_q holds it
    assert model.get_submodule(f"{D}.ff.net.2").plan.shift == 0.171875


@torch.no_grad()
def test_the_whole_model_is_the_formula(file, wanted, tensors):
    given = nunchaku_bytes.tiny_flux()
    result = nunchaku_bytes.run(load_nunchaku_flux(file, given))
    other = nunchaku_bytes.computed(nunchaku_bytes.tiny_flux(), *wanted)
    for name, parameter in other.named_parameters():
        parameter.copy_(tensors[name.replace("attn.norm", "norm")])
    assert result.isfinite().all() and result.std() > 0.1
    assert distance(result, nunchaku_bytes.run(other)) < 1e-2


def test_later_names_and_a_model_from_the_metadata(file, tensors, tmp_path):
    v2 = {v1: v2 for v2, v1 in V1.items()} | {"smooth_orig": "smooth_factor_orig"}
    fused = {"qkv_proj": "attn.to_qkv", "qkv_proj_context": "attn.add_qkv_proj"}
    renamed = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        block, inner, leaf = ".".join(parts[:2]), ".".join(parts[2:-1]), parts[-1]
        if block in (D, S):
            places = {**fused, **(PLACES if block == D else {"out_proj": "attn.to_out"})}
            inner = f"attn.{inner}" if inner in ("norm_q", "norm_k", "norm_added_q", "norm_added_k") else inner
            key = f"{block}.{places.get(inner, inner)}.{v2.get(leaf, leaf)}"
        renamed[key] = tensor
    assert f"{S}.attn.to_out.smooth_factor_orig" in renamed and f"{D}.attn.to_qkv.proj_down" in renamed
    write(tmp_path / "v2.safetensors", renamed, model_class="NunchakuFluxTransformer2dModel")
    one, other = load_nunchaku_flux(file), load_nunchaku_flux(tmp_path / "v2.safetensors")
    assert type(one) is FluxTransformer2DModel and one.dtype == torch.bfloat16 and not one.training
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert nunchaku_bytes.run(one, torch.bfloat16).isfinite().all()
    assert load_nunchaku_flux(file, dtype=torch.float16).dtype == torch.float16


def test_the_bias_of_the_attention_half(tensors, tmp_path):
    """It is zero in known files; where it is not there, or not zero, it counts as it should."""
    key = f"{S}.out_proj.bias"
    write(tmp_path / "none", {name: t for name, t in tensors.items() if name != key})
    write(tmp_path / "ones", {**tensors, key: torch.ones(128).bfloat16()})
    none, ones = (load_nunchaku_flux(tmp_path / name, nunchaku_bytes.tiny_flux()) for name in ("none", "ones"))
    difference = ones.get_submodule(f"{S}.proj_out").bias - none.get_submodule(f"{S}.proj_out").bias
    assert torch.allclose(difference, torch.ones(128), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_saves_and_loads_as_ours(file, dtype, tmp_path):
    model = load_nunchaku_flux(file, nunchaku_bytes.tiny_flux(dtype))
    before = nunchaku_bytes.run(model, dtype)
    model.save_pretrained(tmp_path)
    again = FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert torch.equal(nunchaku_bytes.run(again, dtype), before)
    assert quantization_config(again).plan == quantization_config(model).plan
    split = again.get_submodule(f"{S}.proj_out")
    assert (
        isinstance(split, SplitLinear)
        and split.plan.inputs == [128, 512]
        and split.kernel_name() in ("cpu-w4a4", "reference")
    )
    assert [part.shift for part in split.plan.parts] == [0.0, 0.171875] and "W4A4 g64 r32" in repr(split)
    split.to(torch.float16)
    assert split.bias.dtype == torch.float16 and split.wscales_1.dtype == torch.bfloat16
    split.to(dtype)
    rows = [row for row in kernel_report(again) if row["layer"].startswith(f"{S}.proj_out")]
    assert len(rows) == 1 and rows[0]["bytes"] > 128 * 640 // 2
    again.dequantize()
    assert type(again.get_submodule(f"{S}.proj_out")) is nn.Linear
    assert distance(nunchaku_bytes.run(again, dtype), before) < 0.5
    with pytest.raises(UserError, match="read from a checkpoint"):
        plan = quantization_config(model).plan
        plan.layers = {name: layer for name, layer in plan.layers.items() if "proj_out" in name}
        ptq4dm.quantize(nunchaku_bytes.tiny_flux(), ptq4dm.RTNConfig(plan=plan))


def without(key):
    return lambda tensors: tensors.pop(key)


def changed(key, value):
    return lambda tensors: tensors.update({key: value(tensors[key])})


Q = f"{D}.qkv_proj"
MISTAKES = {
    "missing": (without(f"{Q}.lora_up"), f"lacks '{D}.attn.to_qkv.proj_up'"),
    "missing bias": (without(f"{S}.mlp_fc2.bias"), f"lacks '{S}.mlp_fc2.bias'"),
    "missing elsewhere": (without("proj_out.weight"), "lacks 'proj_out.weight'"),
    "too many": (lambda t: t.update({f"{D}.more": torch.ones(1)}), f"1 tensors that the model has not .*'{D}.more'"),
    "another block": (lambda t: t.update({f"{D[:-1]}7.norm_q.weight": torch.ones(64)}), "7.attn.norm_q.weight"),
    "twice": (lambda t: t.update({f"{D}.attn.to_qkv.bias": torch.ones(384)}), "attn.to_qkv.bias' under two names"),
    "shape": (changed(f"{Q}.qweight", lambda t: t[:128]), "to_qkv.qweight' .* has shape \\[128, 64\\]"),
    "rank": (changed(f"{Q}.lora_down", lambda t: t[:, :8]), "to_qkv.proj_down' .* has rank 8"),
    "other rank": (changed(f"{Q}.lora_down", lambda t: torch.cat([t, t], 1)), "proj_up' .* has shape \\[384, 16\\]"),
    "dtype": (changed(f"{Q}.smooth", torch.Tensor.float), "to_qkv.smooth_factor' .* dtype float32"),
    "nvfp4": (changed(f"{Q}.wscales", lambda t: t.to(torch.float8_e4m3fn)), "holds NVFP4 weights"),
    "zeros": (changed(f"{S}.norm.linear.wzeros", lambda t: t / 7), "norm.linear.wzeros' is not -7 times"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(mistake, tensors, tmp_path):
    apply, message = MISTAKES[mistake]
    wrong = dict(tensors)
    apply(wrong)
    write(tmp_path / "flux.safetensors", wrong)
    model = nunchaku_bytes.tiny_flux()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        load_nunchaku_flux(tmp_path / "flux.safetensors", model)
    assert str(caught.value).endswith(".") and str(caught.value).count(". ") == 0
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(isinstance(layer, SVDQLinear) for layer in model.modules())


def test_files_that_are_none(file, tensors, tmp_path):
    path = tmp_path / "flux.safetensors"
    path.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        load_nunchaku_flux(path)
    write(path, tensors, model_class="NunchakuQwenImageTransformer2DModel")
    with pytest.raises(UserError, match="of NunchakuQwenImageTransformer2DModel; only FLUX"):
        load_nunchaku_flux(path)
    fp4 = {**QUANTIZATION, "weight": {"dtype": "fp4_e2m1_all"}}
    write(path, tensors, quantization_config=json.dumps(fp4))
    with pytest.raises(UserError, match="holds NVFP4 weights"):
        load_nunchaku_flux(path)
    write(path, tensors, config="{")
    with pytest.raises(UserError, match="the model config of .* cannot be read"):
        load_nunchaku_flux(path)
    assert load_nunchaku_flux(path, nunchaku_bytes.tiny_flux()).is_quantized  # then it is not needed
    save_file(tensors, path)
    with pytest.raises(UserError, match="has no model config in its metadata; pass"):
        load_nunchaku_flux(path)
    with pytest.raises(UserError, match="is for a FluxTransformer2DModel; got Linear"):
        load_nunchaku_flux(path, nn.Linear(2, 2))
    with pytest.raises(UserError, match="no Linear in full precision"):
        load_nunchaku_flux(path, load_nunchaku_flux(file))
