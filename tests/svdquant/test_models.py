"""SVDQuant on small models of diffusers: which layer becomes what, how good it is, that it is saved and loaded."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import denoisers
import ptq4dm
from helpers import arguments
from ptq4dm import SVDQuantConfig
from ptq4dm.calibration.record import replay
from ptq4dm.calibration.store import fingerprint
from ptq4dm.layers.base import is_quantized
from ptq4dm.layers.sizes import stored_bytes
from ptq4dm.layers.view import find_layers
from ptq4dm.layers.w8a8 import Int8Conv2d, Int8Linear
from ptq4dm.quantization.diffusers_bridge import quantization_config
from ptq4dm.svdquant.layers.svdq import SVDQConv2d, SVDQLinear

pytestmark = pytest.mark.usefixtures("one_thread")

# What is not 4-bit with 4-bit inputs: in blocks by these patterns; and all outside of numbered blocks is kept.
ROLES = {
    "dit": {"weight-only": r"norm1\.linear$", "int8": r"timestep_embedder\.linear_[12]$"},
    "pixart": {},
    "sd3": {"weight-only": r"norm1(_context)?\.linear$"},
    "flux": {"weight-only": r"norm1?(_context)?\.linear$"},
    "sana": {"int8": r"conv_depth$"},
    "sdxl": {  # shortcuts of 32 and 96 channels do not divide into groups of 64
        "int8": r"(conv[12]|time_emb_proj|samplers\.0\.conv|(n_blocks\.1|0\.resnets\.1|1\.resnets\.0)\S*shortcut)$"
    },
    "cogvideox": {"weight-only": r"norm[12]\.linear$"},
    "wan": {},
    "ltx": {},
}
SELF, CROSS = r"(.*attn1)\.to_[qkv]$", r"(.*attn2)\.to_[kv]$"
SHARED = {  # layers of one module that match share its first one's down projection
    "dit": [SELF],
    "sd3": [r"(.*attn)\.to_[qkv]$", r"(.*attn)\.add_[qkv]_proj$"],
    "flux": [
        r"(transformer_blocks.*attn)\.to_[qkv]$", r"(.*attn)\.add_[qkv]_proj$",
        r"(single_.*\.0)\.(proj_mlp|attn\.to_[qkv])$",
    ],  # fmt: skip
    "cogvideox": [SELF],
}  # fmt: skip
WORST = {"sdxl": 0.4, "flux": 0.15}  # relative error of the output; of all others
OTHERS = 0.1


@pytest.fixture(scope="module", autouse=True)
def coarse():
    """The search for 8-bit ranges is not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ptq4dm.ranges.clipping.ACTIVATION_STEPS", 6)
        yield


class Case:
    """One model before and after."""

    def __init__(self, kind):
        self.kind, (self.original, self.store) = kind, denoisers.pair(kind)
        self.model = denoisers.pair(kind)[0]
        self.report = ptq4dm.quantize(self.model, SVDQuantConfig(rank=8, num_tuples=4), self.store)
        self.plan = quantization_config(self.model).plan
        self.exact, self.output = self.run(self.original), self.run(self.model)

    def run(self, model):
        return replay(model, self.store.calls)

    def error(self, output):
        return float((output - self.exact).norm() / self.exact.norm())


@pytest.fixture(scope="module", params=ROLES)
def case(request):
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests: in another number of threads sums round another way
    try:
        return Case(request.param)
    finally:
        torch.set_num_threads(before)


def test_roles(case):
    inner = {view.name: view for view in find_layers(case.original)}
    assert len(inner) > 10 and any(isinstance(layer, (SVDQLinear, SVDQConv2d)) for layer in case.model.modules())
    for name, view in inner.items():
        layer = case.model.get_submodule(name)
        numbered = any(part.isdigit() for part in name.split("."))
        roles = [role for role, pattern in ROLES[case.kind].items() if re.search(pattern, name)]
        if not numbered:
            assert type(layer) is type(view.module) and name not in case.plan.layers, name
        elif roles == ["int8"]:
            assert isinstance(layer, (Int8Linear, Int8Conv2d)), name
        elif roles == ["weight-only"]:
            assert str(layer.plan) == "W4A16 g64" and layer.smooth is None and layer.down is None, name
        else:
            assert isinstance(layer, (SVDQLinear, SVDQConv2d)) and str(layer.plan) == "W4A4 g64 r8", name
            assert layer.plan.alpha is not None and layer.smooth.shape == view.weight.shape[1:]


def test_layers_that_share(case):
    lenders = {}
    for pattern in SHARED.get(case.kind, [SELF, CROSS]):
        for name in case.plan.layers:
            if found := re.match(pattern, name):
                lenders.setdefault((pattern, found[1]), []).append(name)
    assert len(lenders) > 1
    expected = {name: names[0] for names in lenders.values() for name in names[1:]}
    assert {name: p.lender for name, p in case.plan.layers.items() if getattr(p, "lender", "")} == expected
    for name, lender in expected.items():
        layer, first = case.model.get_submodule(name), case.model.get_submodule(lender)
        assert layer.down is None and layer.branch[0] is first.down is not None
        assert torch.equal(layer.smooth, first.smooth)


def test_output_is_near_full_precision(case):
    assert case.output.shape == case.exact.shape == case.store.calls.call().args[0].shape
    error = case.error(case.output)
    assert error < WORST.get(case.kind, OTHERS)
    plain, _ = denoisers.pair(case.kind)
    ptq4dm.quantize(plain, SVDQuantConfig(rank=0, smoothing="none", num_tuples=4), case.store)
    assert error < 0.8 * case.error(case.run(plain))


def test_bytes_are_counted(case):
    def numbers(model):
        return sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())

    assert (case.report.bytes_before, case.report.bytes_after) == (numbers(case.original), numbers(case.model))
    rows = {row["layer"]: row["bytes"] for row in case.report.layers}
    assert rows.keys() == case.plan.layers.keys()
    for name, size in rows.items():
        layer, plan = case.model.get_submodule(name), case.plan.layers[name]
        if isinstance(layer, SVDQLinear) and plan.activation == "int4":
            n, k = layer.out_features, layer.in_features
            bias = 4 if layer.bias is None else 4 * n  # one number tells the model's dtype where no bias does
            down = 0 if plan.lender else 2 * 8 * k
            assert size == n * k // 2 + 2 * n * k // 64 + 2 * k + down + 2 * 8 * n + bias
    assert sum(rows.values()) == sum(stored_bytes(m) for m in case.model.modules() if is_quantized(m))


def test_saved_and_loaded(case, tmp_path):
    case.model.save_pretrained(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 1.2 * case.report.bytes_after
    again = type(case.original).from_pretrained(tmp_path)
    assert torch.equal(case.run(again), case.output)
    assert quantization_config(again) == quantization_config(case.model)
    state, loaded = case.model.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys() and all(torch.equal(state[k], loaded[k]) for k in state)
    assert all(state[k].dtype == loaded[k].dtype for k in state)


# --- single models ------------------------------------------------------------------------------------------

QUICK = {"rank": 4, "num_tuples": 4, "smoothing": 0.5, "rounding": "nearest", "refinements": 0}


def test_sharded(tmp_path):
    model, store = denoisers.pair("flux")
    ptq4dm.quantize(model, SVDQuantConfig(**QUICK), store)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(replay(again, store.calls), replay(model, store.calls))
    attn = again.single_transformer_blocks[0].attn  # its lender may be in another file
    assert attn.to_v.branch[0] is again.single_transformer_blocks[0].proj_mlp.down is not None


def test_mixed_formats(tmp_path):
    """Convolutions in 8 bits, Linear layers in 4, none kept."""
    model, store = denoisers.pair("sdxl")
    roles = {
        "*conv*": "int8",
        "*samplers*": "int8",
        "time_embedding.linear_1": "int8",
        "add_embedding.linear_1": "int8",
    }
    exact = replay(model, store.calls)
    report = ptq4dm.quantize(model, SVDQuantConfig(**QUICK, roles={**roles, "*": "w4"}), store)
    plan = quantization_config(model).plan
    assert len(report.layers) == len(plan.layers) == len(find_layers(denoisers.pair("sdxl")[0])) > 50
    for name in plan.layers:
        layer = model.get_submodule(name)
        eight = isinstance(layer, nn.Conv2d) or name in roles
        assert isinstance(layer, (Int8Conv2d, Int8Linear) if eight else SVDQLinear), name
        assert plan.layers[name].format == ("int8" if eight else "svdq")
    assert sum(plan.layers[name].format == "int8" for name in plan.layers) > 10
    output = replay(model, store.calls)
    assert (output - exact).norm() < 0.5 * exact.norm()
    model.save_pretrained(tmp_path)
    assert torch.equal(replay(type(model).from_pretrained(tmp_path), store.calls), output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_models(tmp_path, dtype):
    model, store = denoisers.pair("sd3")
    wide, exact = denoisers.pair("sd3")[0], replay(model, store.calls)
    ptq4dm.quantize(wide, SVDQuantConfig(**QUICK), store)
    error = (replay(wide, store.calls) - exact).norm()
    model.to(dtype)
    store = replace(store, fingerprint=fingerprint(model))  # its weights are rounded
    report = ptq4dm.quantize(model, SVDQuantConfig(**QUICK), store)
    layer = model.transformer_blocks[0].attn.to_q
    assert {t.dtype for t in (layer.bias, layer.wscales, layer.smooth, layer.down, layer.up)} == {dtype}
    output = replay(model, store.calls)
    assert output.dtype == dtype and (output - exact).norm() < 1.2 * error < 0.25 * exact.norm()
    assert all(row["sqnr"] > 8 for row in report.layers)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert again.dtype == dtype and torch.equal(replay(again, store.calls), output)
    other = type(model).from_pretrained(tmp_path, dtype=torch.float32)  # codes, scales and branch stay as stored
    layer = other.transformer_blocks[0].attn.to_q
    assert layer.bias.dtype == torch.float32 and layer.wscales.dtype == layer.down.dtype == dtype
    assert (replay(other, store.calls) - output).norm() < 0.1 * output.norm()


def test_positions_that_come_as_a_tuple_are_recorded():
    """CogVideoX is called with (cos, sin)."""
    model, store = denoisers.pair("cogvideox")
    rotary = arguments(model, store.calls)["image_rotary_emb"]
    assert isinstance(rotary, tuple) and [part.shape for part in rotary] == [(32, 32)] * 2
    model, store = denoisers.pair("ltx")
    assert arguments(model, store.calls)["rope_interpolation_scale"] == (0.04, 32.0, 32.0)
