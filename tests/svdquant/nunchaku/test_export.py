"""Quantized models written as nunchaku_lite checkpoints: read back by formulas, and by diffusers itself."""

import importlib
import itertools
import json
import sys
import types

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import nunchaku_bytes
import ptq4dm
from helpers import distance
from ptq4dm.calibration.calls import calls_of_rows
from ptq4dm.calibration.store import fingerprint
from ptq4dm.errors import UserError
from ptq4dm.layers.base import is_quantized, replace_module
from ptq4dm.layers.plan import LayerPlan
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.svdquant import export_nunchaku_lite, load_nunchaku_lite
from ptq4dm.svdquant.layers.plan import SVDQPlan
from ptq4dm.svdquant.layers.svdq import SVDQConv2d, SVDQLinear
from ptq4dm.svdquant.lora import stack

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = "diffusion_pytorch_model.safetensors"
Q, K, NORM = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.norm1.linear"


def calibration(model, call):
    """A store of one recorded call."""
    x, t = call.pop("hidden_states"), call.pop("timestep")
    shared = {name: call.pop(name) for name in ("img_ids", "txt_ids")}
    return ptq4dm.CalibrationStore({}, fingerprint(model), 1, calls_of_rows(x, timestep=t, shared=shared, **call))


@pytest.fixture(scope="module")
def quantized():
    """dtype -> a model quantized by SVDQuantConfig, W4A4 and weight-only, with branches of rank 8."""
    found = {}

    def get(dtype):
        if dtype not in found:
            model = nunchaku_bytes.tiny_flux(dtype)
            config = ptq4dm.SVDQuantConfig(rank=8, smoothing=0.5, rounding="nearest", refinements=0, num_tuples=2)
            ptq4dm.quantize(model, config, calibration(model, nunchaku_bytes.flux_call(batch=4)))
            found[dtype] = model
        return found[dtype]

    return get


dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@dtypes
def test_read_back_by_the_formulas(dtype, quantized, tmp_path):
    model = quantized(dtype)
    assert model.get_submodule(K).down is None  # it shares that of to_q, which the file repeats
    export_nunchaku_lite(model, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert {path.name for path in folder.iterdir()} == {"config.json", WEIGHTS}
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / WEIGHTS)
    section = config["quantization_config"]
    assert section["compute_dtype"] == str(dtype).removeprefix("torch.") and section["svdq_w4a4"]["rank"] == 16
    targets = {op: section[op]["targets"] for op in ("svdq_w4a4", "awq_w4a16")}
    of_plan = {"int4": "svdq_w4a4", "none": "awq_w4a16"}
    ours = {name: layer for name, layer in model.named_modules() if is_quantized(layer)}
    assert len(ours) == 20 and all(name in targets[of_plan[layer.plan.activation]] for name, layer in ours.items())

    names = {"svdq_w4a4": ["wscales", "smooth_factor", "proj_down", "proj_up"], "awq_w4a16": ["wscales", "wzeros"]}
    keys = {f"{t}.{n}" for op in targets for t in targets[op] for n in ["qweight", "bias", *names[op]]}
    others = {name for name, _ in itertools.chain(model.named_parameters(), model.named_buffers())}
    others -= {name for name in others if name.rpartition(".")[0] in ours}
    assert tensors.keys() == keys | others
    assert all(t.dtype == dtype for t in tensors.values() if t.is_floating_point())
    for name, layer in ours.items():
        read = nunchaku_bytes.layer_of({key: tensors[f"{name}.{key}"] for key in names_of(tensors, name)})
        x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(1))
        assert distance(layer(x), nunchaku_bytes.compute(read, x)) < 1e-6, name


def names_of(tensors, layer):
    return [name.removeprefix(f"{layer}.") for name in tensors if name.startswith(f"{layer}.")]


@dtypes
def test_there_and_back(dtype, quantized, tmp_path):
    model = quantized(dtype)
    export_nunchaku_lite(model, tmp_path)
    again = load_nunchaku_lite(tmp_path)
    assert again.dtype == dtype and torch.equal(nunchaku_bytes.run(again, dtype), nunchaku_bytes.run(model, dtype))
    for name in (Q, K, NORM):
        one, other = model.get_submodule(name), again.get_submodule(name)
        assert torch.equal(one.qweight, other.qweight) and torch.equal(one.wscales, other.wscales)
    assert again.get_submodule(K).plan.rank == 8 and again.get_submodule(K).down is not None
    export_nunchaku_lite(again, tmp_path / "twice")
    for file in (WEIGHTS, "config.json"):
        assert (tmp_path / "twice" / file).read_bytes() == (tmp_path / file).read_bytes()


class Kernels:
    """Stands in for the CUDA kernels that diffusers calls: the formulas, on the tensors as they lie in the file."""

    def __init__(self):
        self.inputs = {}

    def quantize_w4a4_act_fuse_lora(self, x, codes, scales, down, lora, smooth, glu, nvfp4):
        assert not glu and len(codes) % 256 == 0
        self.inputs[codes.data_ptr()] = x, down, smooth, codes

    def gemm_w4a4(self, codes, qweight, out, *more):
        unused, scales, wscales, up, bias, unsigned = more[0], more[1], more[2], more[6], more[12], more[16]
        x, down, smooth, _ = self.inputs.pop(codes.data_ptr())
        assert unused is None and scales is not None and not unsigned
        found = {"qweight": qweight, "wscales": wscales, "smooth_factor": smooth, "proj_down": down, "proj_up": up}
        out.copy_(
            nunchaku_bytes.compute(nunchaku_bytes.layer_of(found | ({} if bias is None else {"bias": bias})), x)
        )

    def awq_gemm_w4a16_g64_int32(self, x, qweight, scales, zeros):
        found = {"qweight": qweight, "wscales": scales, "wzeros": zeros}
        return nunchaku_bytes.compute(nunchaku_bytes.layer_of(found), x).to(x)

    def gemv_awq(self, x, qweight, scales, zeros, m, n, k, group):
        assert (m, n, k, group) == (len(x), 4 * len(qweight), x.shape[1], 64)
        return self.awq_gemm_w4a16_g64_int32(x, qweight, scales, zeros)


@pytest.fixture
def diffusers_own(monkeypatch):
    """diffusers' Nunchaku code, with its kernels replaced."""
    pytest.importorskip("diffusers.quantizers.nunchaku", reason="this diffusers has no nunchaku_lite")
    module = types.ModuleType("kernels")
    module.get_kernel = lambda *args, **kwargs: types.SimpleNamespace(ops=Kernels())
    monkeypatch.setitem(sys.modules, "kernels", module)
    monkeypatch.setattr("diffusers.utils.is_kernels_available", lambda: True)
    monkeypatch.setattr("diffusers.utils.is_kernels_version", lambda *args: True)
    monkeypatch.setattr("diffusers.utils.constants.DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    quantizer = diffusers.quantizers.nunchaku.NunchakuLiteQuantizer
    monkeypatch.setattr(quantizer, "validate_environment", lambda *args, **kwargs: None)  # it wants a GPU
    name = "diffusers.quantizers.nunchaku.utils"
    sys.modules.pop(name, None)
    yield importlib.import_module(name)
    del sys.modules[name]  # the next to import it gets the real one


def test_diffusers_loads_and_runs_it(quantized, tmp_path, diffusers_own):
    model = quantized(torch.bfloat16)
    export_nunchaku_lite(model, tmp_path)
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
    assert isinstance(theirs.get_submodule(Q), diffusers_own.SVDQW4A4Linear) and theirs.dtype == torch.bfloat16
    diffusers_own.check_strict_state_dict_match(theirs, load_file(tmp_path / WEIGHTS))
    wanted = nunchaku_bytes.run(model, torch.bfloat16)
    assert distance(nunchaku_bytes.run(theirs, torch.bfloat16), wanted) < 0.02


class Toy(diffusers.ModelMixin, diffusers.ConfigMixin):
    """Layers of the kinds that there are."""

    @diffusers.configuration_utils.register_to_config
    def __init__(self, width: int = 128):
        super().__init__()
        self.one = nn.Linear(128, width, bias=False)
        self.two = nn.Linear(width, 128)
        self.conv = nn.Conv2d(128, 128, 1)
        self.register_buffer("table", torch.arange(4.0), persistent=False)


def put(model, name, **plan):
    """Random codes in the place of a layer."""
    layer, plan = model.get_submodule(name), SVDQPlan(**plan)
    kind = SVDQConv2d if isinstance(layer, nn.Conv2d) else SVDQLinear
    new = kind(layer, plan)
    for key, value in new.named_parameters():
        drawn = torch.randint(17, 255, value.shape) if key == "qweight" else torch.rand(value.shape) * 0.1 + 0.1
        value.copy_(drawn & 0xEE | 0x11 if key == "qweight" else drawn)
    replace_module(model, name, new)
    return new


@pytest.mark.parametrize("rank, written", [(0, 16), (16, 16), (20, 32)])
def test_ranks_biases_and_buffers(rank, written, tmp_path, diffusers_own):
    torch.manual_seed(0)
    model = Toy(256)
    put(model, "one", rank=rank)
    export_nunchaku_lite(model, tmp_path)
    tensors, config = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / "config.json").read_text())
    assert tensors["one.proj_down"].shape == (128, written) and tensors["one.proj_up"].shape == (256, written)
    section = config["quantization_config"]
    assert section["svdq_w4a4"]["rank"] == written and "awq_w4a16" not in section and config["width"] == 256
    assert section["compute_dtype"] == "float16"  # the scales'
    read = nunchaku_bytes.layer_of({key: tensors[f"one.{key}"] for key in names_of(tensors, "one")})
    x = torch.randn(7, 128)
    assert distance(model.one(x), nunchaku_bytes.compute(read, x)) < 1e-6

    theirs = Toy(256)
    diffusers_own.replace_with_nunchaku_linear(theirs, section, torch.float16)
    diffusers_own.check_strict_state_dict_match(theirs, tensors)  # it wants "table", too, and no "one.bias"
    again = load_nunchaku_lite(tmp_path, Toy(256))
    assert again.one.plan.rank == rank and distance(again.one(x), model.one(x)) < 1e-6


def test_another_dtype_and_fused_adapters(tmp_path):
    torch.manual_seed(0)
    model = Toy()
    layer = put(model, "two", rank=16)
    stack(layer, {"style": (torch.randn(4, 128), torch.randn(128, 4), 1.0)})
    put(model, "one", rank=0, activation="none")
    export_nunchaku_lite(model, tmp_path, torch.bfloat16)
    tensors = load_file(tmp_path / WEIGHTS)
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.bfloat16}
    assert tensors["two.proj_up"].shape == (128, 32) and tensors["one.wzeros"].shape == (2, 128)
    x = torch.randn(7, 128)
    for name in ("one", "two"):
        read = nunchaku_bytes.layer_of({key: tensors[f"{name}.{key}"] for key in names_of(tensors, name)})
        assert distance(model.get_submodule(name)(x), nunchaku_bytes.compute(read, x)) < 0.05


def int8(model):
    replace_module(model, "two", quantized_copy(model.two, LayerPlan(), "two"))


REFUSED = {
    "nothing": (lambda m: None, "only a quantized diffusers model"),
    "int8": (int8, "'two' is Int8Linear .*; nunchaku_lite holds 4-bit Linear layers only"),
    "conv": (lambda m: put(m, "conv"), "'conv' is SVDQConv2d"),
    "8-bit inputs": (lambda m: put(m, "two", activation="int8"), "'two' is W4A8 g64 r32; nunchaku_lite holds W4A4"),
    "groups": (lambda m: put(m, "two", group_size=32), "'two' is W4A4 g32 r32; .* g64"),
    "weight-only groups": (lambda m: put(m, "two", activation="none", rank=0, group_size=128), "W4A16 g128"),
    "weight-only branch": (lambda m: put(m, "two", activation="none"), "W4A16 g64 without one"),
    "unsigned": (lambda m: put(m, "two", shift=0.171875), "'two' rounds its inputs as unsigned"),
    "outputs": (lambda m: put(m, "one"), "'one' has 128 inputs and 192 outputs; .* multiples of 128 and 128"),
    "inputs": (lambda m: put(m, "two"), "'two' has 192 inputs and 128 outputs; .* multiples of 128 and 128"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_format_cannot_hold(case, tmp_path):
    model = Toy(192 if case in ("outputs", "inputs") else 128)
    make, message = REFUSED[case]
    make(model)
    with pytest.raises(UserError, match=message) as caught:
        export_nunchaku_lite(model, tmp_path / "new")
    assert str(caught.value).endswith(".") and not (tmp_path / "new").exists()


def test_where_it_cannot_be_written(tmp_path):
    model = Toy()
    put(model, "two")
    with pytest.raises(UserError, match="computes in bfloat16 or float16; got float32"):
        export_nunchaku_lite(model, tmp_path, torch.float32)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        export_nunchaku_lite(model, tmp_path / "file" / "below")
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(UserError, match="holds other weights \\(other.safetensors\\)"):
        export_nunchaku_lite(model, tmp_path)
    with pytest.raises(UserError, match="only a quantized diffusers model"):
        export_nunchaku_lite(nn.Sequential(model.two), tmp_path / "new")
