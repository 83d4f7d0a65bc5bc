"""Checkpoints of diffusers' nunchaku_lite, made by the formulas of their layouts, in our layers."""

import json

import diffusers
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

import nunchaku_bytes
import ptq4dm
from helpers import distance
from ptq4dm.errors import UserError
from ptq4dm.quantization.diffusers_bridge import quantization_config
from ptq4dm.quantization.report import kernel_report
from ptq4dm.svdquant import load_nunchaku_lite
from ptq4dm.svdquant.layers.nvfp4 import NVFP4Linear, NVFP4Plan, round_e2m1
from ptq4dm.svdquant.layers.svdq import SVDQLinear
from ptq4dm.svdquant.nunchaku.model import empty_model

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = "diffusion_pytorch_model.safetensors"
Q, NORM = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.norm1.linear"


def config_of(model, layers, kind, rank=16, dtype="bfloat16"):
    svdq = [name for name, layer in layers.items() if layer.smooth is not None]
    awq = [name for name in layers if name not in svdq]
    sizes = {"precision": kind, "group_size": {"int4": 64, "nvfp4": 16}[kind], "rank": rank}
    config = {"quant_method": "nunchaku_lite", "compute_dtype": dtype, "svdq_w4a4": {**sizes, "targets": svdq}}
    config["awq_w4a16"] = {"precision": "int4", "group_size": 64, "targets": awq}
    return {**json.loads(model.to_json_string()), "quantization_config": config}


def tensors_of(model, layers):
    tensors = {f"{n}.{key}": t for n, layer in layers.items() for key, t in nunchaku_bytes.tensors_of(layer).items()}
    return {**nunchaku_bytes.rest_of(model, layers), **tensors}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind -> (folder of a checkpoint, its layers); the kinds are int4 and nvfp4."""
    found = {}
    for kind in ("int4", "nvfp4"):
        folder, model = tmp_path_factory.mktemp(kind), nunchaku_bytes.tiny_flux()
        layers = nunchaku_bytes.lite_layers(kind)
        tensors = tensors_of(model, layers)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config_of(model, layers, kind)))
        found[kind] = folder, layers
    return found


kinds = pytest.mark.parametrize("kind", ["int4", "nvfp4"])


@kinds
def test_every_layer_is_the_formula(made, kind):
    folder, layers = made[kind]
    model = load_nunchaku_lite(folder, dtype=torch.float32)
    kinds_of = {type(model.get_submodule(name)) for name in layers}
    assert kinds_of == {SVDQLinear, NVFP4Linear if kind == "nvfp4" else SVDQLinear}
    for seed, (name, layer) in enumerate(layers.items()):
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 9, layer.codes.shape[1], generator=draw)
        x[0, 0] = 0
        ours = model.get_submodule(name)
        assert distance(ours(x), nunchaku_bytes.compute(layer, x)) < 1e-6, name
        assert ours(x.bfloat16()).dtype == torch.bfloat16
        exact = ours.dequantized().float()
        outputs = nunchaku_bytes.compute(layer, x)
        assert distance(exact(x), outputs) < (0.2 if layer.smooth is not None else 1e-6)


@kinds
def test_the_whole_model_is_the_formula(made, kind):
    folder, layers = made[kind]
    given = nunchaku_bytes.tiny_flux()
    with torch.no_grad():
        for parameter in given.parameters():
            parameter.fill_(torch.nan)
    assert load_nunchaku_lite(folder, given) is given
    wanted = nunchaku_bytes.run(nunchaku_bytes.computed(nunchaku_bytes.tiny_flux(), layers))
    result = nunchaku_bytes.run(given)
    assert result.isfinite().all() and result.std() > 0.1 and distance(result, wanted) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_of_the_class_that_the_config_names(made, dtype):
    model = load_nunchaku_lite(made["int4"][0], dtype=dtype)
    assert type(model) is FluxTransformer2DModel and not model.training and model.is_quantized
    assert model.dtype == dtype and not any(p.is_meta for p in model.parameters())
    layer = model.get_submodule(Q)
    assert layer.bias.dtype == dtype and layer.wscales.dtype == torch.bfloat16
    result = nunchaku_bytes.run(model, dtype)
    assert result.dtype == dtype and result.isfinite().all()
    given = load_nunchaku_lite(made["int4"][0] / WEIGHTS, nunchaku_bytes.tiny_flux(dtype))
    assert torch.equal(nunchaku_bytes.run(given, dtype), result)
    assert load_nunchaku_lite(made["int4"][0]).dtype == torch.bfloat16  # its compute_dtype


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_saves_and_loads_as_ours(made, kind, dtype, tmp_path):
    model = load_nunchaku_lite(made[kind][0], dtype=dtype)
    before = nunchaku_bytes.run(model, dtype)
    model.save_pretrained(tmp_path)
    again = FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert torch.equal(nunchaku_bytes.run(again, dtype), before)
    config = quantization_config(again)
    assert config.method == "nunchaku" and config.plan == quantization_config(model).plan
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    layer = again.get_submodule(Q).to(torch.float16)
    assert layer.wscales.dtype == model.get_submodule(Q).wscales.dtype and layer.bias.dtype == torch.float16
    layer.to(dtype)
    again.dequantize()
    assert not any(isinstance(m, (SVDQLinear, NVFP4Linear)) for m in again.modules())
    assert distance(nunchaku_bytes.run(again, dtype), before) < 0.5
    assert {"format", "bytes"} <= kernel_report(model)[0].keys()


def test_shards(made, tmp_path):
    folder, _ = made["int4"]
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    whole, sharded = load_nunchaku_lite(folder), load_nunchaku_lite(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), sharded.parameters(), strict=True))
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(UserError, match="two.safetensors is not a whole safetensors file"):
        load_nunchaku_lite(tmp_path)


class Plain(nn.Module):
    """Not diffusers': two Linear layers, one without bias."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(128, 256, bias=False), nn.Linear(256, 128)


def test_no_bias_no_branch_and_padding(tmp_path):
    one = nunchaku_bytes.random_layer(256, 128, 48, bias=False)
    two = nunchaku_bytes.random_layer(128, 256, 48)
    one.a[:], two.a[7:], two.b[:, 3] = 0, 0, 0
    save_file(tensors_of(Plain(), {"one": one, "two": two}), tmp_path / "some.safetensors")
    section = {"precision": "int4", "group_size": 64, "rank": 48, "targets": ["one", "two"]}
    config = {"quantization_config": {"quant_method": "nunchaku_lite", "svdq_w4a4": section}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_nunchaku_lite(tmp_path, Plain())
    assert model.one.bias is None and model.one.down is None and model.two.plan.rank == 6
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    assert distance(model.one(x), nunchaku_bytes.compute(one, x)) < 1e-6
    assert distance(model.two(model.one(x)), nunchaku_bytes.compute(two, model.one(x))) < 1e-6


class Exact(diffusers.ModelMixin, diffusers.ConfigMixin):
    """Asks for float32 in one place, as some of diffusers' models do."""

    _keep_in_fp32_modules = ["exact"]

    @diffusers.configuration_utils.register_to_config
    def __init__(self, width: int):
        super().__init__()
        self.exact, self.plain = nn.Linear(width, 2), nn.Linear(width, 2)
        self.register_buffer("table", torch.arange(3.0, dtype=torch.float32), persistent=False)


def test_a_new_model_is_as_from_pretrained_makes_it():
    model = empty_model(Exact, {"width": 4, "quantization_config": {}, "_name_or_path": "somewhere"}, torch.bfloat16)
    assert all(parameter.is_meta for parameter in model.parameters()) and torch.get_default_dtype() == torch.float32
    assert model.exact.weight.dtype == torch.float32 and model.plain.weight.dtype == torch.bfloat16
    assert model.table.tolist() == [0, 1, 2] and "_name_or_path" not in model.config
    with pytest.raises(UserError, match="no Exact can be made of this config"):
        empty_model(Exact, {"width": "wide"}, torch.bfloat16)


def test_buffers_may_be_in_the_file(made, tmp_path):
    folder, _ = made["int4"]
    model = nunchaku_bytes.tiny_flux()
    model.register_buffer("position", torch.ones(3), persistent=False)
    model.register_buffer("count", torch.zeros(2, dtype=torch.int64))
    tensors = load_file(folder / WEIGHTS) | {"position": torch.ones(3), "count": torch.tensor([3, 4])}
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert load_nunchaku_lite(tmp_path, model).count.tolist() == [3, 4]


def test_awq_zeros_may_be_rounded_otherwise(made, tmp_path):
    folder, layers = made["int4"]
    tensors = load_file(folder / WEIGHTS)
    exact = -7 * tensors[f"{NORM}.wscales"].float()
    tensors[f"{NORM}.wzeros"] = (exact * 1.003).bfloat16()  # as from a scale before it was rounded
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    layer = load_nunchaku_lite(tmp_path, nunchaku_bytes.tiny_flux()).get_submodule(NORM)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    assert distance(layer(x), nunchaku_bytes.compute(layers[NORM], x)) < 1e-6


def change(key, value):
    """A mistake: one tensor replaced by value(tensor), or left out where that is None."""

    def apply(tensors, config):
        new = value(tensors[key])
        tensors.pop(key)
        if new is not None:
            tensors[key] = new

    return apply


def configure(section, **values):
    def apply(tensors, config):
        config["quantization_config"][section] = {**config["quantization_config"][section], **values}

    return apply


def top(**values):
    return lambda tensors, config: config["quantization_config"].update(values)


def fifteen(codes):
    return codes | 15


MISTAKES = {
    "missing": (change(f"{Q}.proj_up", lambda t: None), f"lacks '{Q}.proj_up'"),
    "halves of two dtypes": (
        change(f"{Q}.proj_up", lambda t: t.to(torch.float16 if t.dtype == torch.bfloat16 else torch.bfloat16)),
        "float16, and others of its layer are not",
    ),
    "NaN": (change(f"{Q}.proj_down", lambda t: t / 0), f"'{Q}.proj_down' holds NaN or infinity"),
    "NaN elsewhere": (change("proj_out.weight", lambda t: t / 0), "'proj_out.weight' holds NaN or infinity"),
    "scales below zero": (change(f"{Q}.wscales", torch.Tensor.neg), f"'{Q}.wscales' holds .* above zero"),
    "divisors of zero": (change(f"{Q}.smooth_factor", torch.zeros_like), f"'{Q}.smooth_factor' holds 0"),
    "rank that is none": (configure("svdq_w4a4", rank=True), "needs 'rank', of type int"),
    "missing elsewhere": (change("x_embedder.weight", lambda t: None), "lacks 'x_embedder.weight'"),
    "too many": (lambda t, c: t.update({"more": torch.ones(1)}), "1 tensors that the model has not .*'more'"),
    "both codes and weight": (
        lambda t, c: t.update({f"{Q}.weight": torch.ones(128, 128)}), f"that the model has not .*'{Q}.weight'"
    ),
    "orig": (lambda t, c: t.update({f"{Q}.smooth_factor_orig": torch.ones(128)}), "smooth_factor_orig"),
    "shape": (change(f"{Q}.qweight", lambda t: t[:64]), f"'{Q}.qweight' .* has shape \\[64, 64\\]"),
    "shape elsewhere": (change("proj_out.weight", lambda t: t[:3]), "'proj_out.weight' .* shape \\[3, 128\\]"),
    "dtype": (change(f"{Q}.wscales", torch.Tensor.float), f"'{Q}.wscales' .* has dtype float32; .* bfloat16"),
    "dtype elsewhere": (change("proj_out.weight", torch.Tensor.int), "'proj_out.weight' .* has dtype int32"),
    "rank": (configure("svdq_w4a4", rank=32), "proj_down' .* shape \\[128, 16\\], the model needs \\[128, 32\\]"),
    "odd rank": (configure("svdq_w4a4", rank=20), "rank 20; the layout needs multiples of 16"),
    "asymmetric": (change(f"{NORM}.wzeros", lambda t: t * 8 / 7), f"'{NORM}.wzeros' is not -7 times"),
    "code 15": (change(f"{NORM}.qweight", fifteen), f"'{NORM}.qweight' holds code 15"),
    "no such target": (configure("awq_w4a16", targets=["nowhere"]), "no layer 'nowhere'"),
    "no Linear": (configure("awq_w4a16", targets=["norm_out"]), "'norm_out' is AdaLayerNormContinuous"),
    "twice": (configure("awq_w4a16", targets=[Q]), f"names layer '{Q}' twice"),
    "not of 128": (configure("svdq_w4a4", targets=["x_embedder"]), "'x_embedder' has 16 inputs and 128 outputs"),
    "awq not of 64": (configure("awq_w4a16", targets=["x_embedder"]), "'x_embedder' has 16 .* of 64 and 4"),
    "no targets": (configure("svdq_w4a4", targets=[]), "'targets' of 'svdq_w4a4'"),
    "no list": (configure("svdq_w4a4", targets="all"), "'svdq_w4a4' in config.json needs 'targets', of type list"),
    "group size": (configure("svdq_w4a4", group_size=32), "is int4 in groups of 32; known is int4 in groups of 64"),
    "precision": (configure("awq_w4a16", precision="nvfp4"), "is nvfp4 in groups of 64; known is int4"),
    "no sections": (top(svdq_w4a4=None, awq_w4a16=None), "names no 4-bit layers"),
    "another method": (top(quant_method="gguf"), "no quantization_config of nunchaku_lite"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(mistake, made, tmp_path):
    folder, _ = made["int4"]
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / "config.json").read_text())
    apply, message = MISTAKES[mistake]
    apply(tensors, config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = nunchaku_bytes.tiny_flux()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        load_nunchaku_lite(tmp_path, model)
    assert str(caught.value).endswith(".") and str(caught.value).count(". ") == 0
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert quantization_config(model) is None and type(model.get_submodule(Q)) is nn.Linear


def test_files_that_are_none(made, tmp_path):
    folder, _ = made["int4"]
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(UserError, match="config.json cannot be read"):
        load_nunchaku_lite(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="holds 0 safetensors files"):
        load_nunchaku_lite(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        load_nunchaku_lite(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="'FluxPipeline', which is no model"):
        load_nunchaku_lite(tmp_path)
    for text in ("{}[", "[" * 100000, "\ufeff{}", '{"a": ' + "9" * 5000 + "}"):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="config.json cannot be read"):
            load_nunchaku_lite(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": f"../{WEIGHTS}"}}))
    with pytest.raises(UserError, match="leads out of its folder"):
        load_nunchaku_lite(tmp_path)
    (tmp_path / f"{WEIGHTS}.index.json").unlink()
    config["quantization_config"]["compute_dtype"] = "int8"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="compute_dtype .* got 'int8'"):
        load_nunchaku_lite(tmp_path)


def test_only_into_full_precision_and_only_by_loading(made):
    model = load_nunchaku_lite(made["nvfp4"][0])
    with pytest.raises(UserError, match="no Linear in full precision"):
        load_nunchaku_lite(made["nvfp4"][0], model)
    config = quantization_config(model)
    for recipe in (config, ptq4dm.RTNConfig(plan=config.plan)):
        with pytest.raises(UserError, match="read from a checkpoint"):
            ptq4dm.quantize(nunchaku_bytes.tiny_flux(), recipe)


def test_nvfp4_activations():
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-4, 1, 5000])[:, None]
    x[1, :16], x[1, 16:32], x[1, 40], x[2, 3] = 0, torch.arange(16) / 8, torch.inf, torch.nan
    values = round_e2m1(x)
    assert (values[1, :16] == 0).all() and values[1, 32:48].isnan().all() and values[2, :16].isnan().all()
    assert torch.equal(values.bfloat16().float().nan_to_num(), values.nan_to_num())  # exact in 16 bits
    large = x[2, 16:]
    assert large.unflatten(0, (-1, 16)).abs().amax(1).min() > 6 * 448  # beyond the largest that there is
    nearest = (large.abs()[:, None] / 448 - nunchaku_bytes.E2M1[:8]).abs().argmin(1)
    assert torch.equal(values[2, 16:].double(), large.sign() * nunchaku_bytes.E2M1[nearest] * 448)
    steps = values[1, 16:32] / torch.tensor(15 / 8 / 6).to(nunchaku_bytes.E4M3).float()
    assert set(steps.tolist()) <= set(nunchaku_bytes.E2M1.tolist())
    layer = NVFP4Linear(nn.Linear(64, 32, bias=False), NVFP4Plan(rank=0))
    assert layer.bias is None and layer.down is None and "nvfp4" in repr(layer) and layer.weight.shape == (32, 64)
