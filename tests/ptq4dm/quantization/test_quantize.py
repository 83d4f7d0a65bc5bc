"""The verb `quantize` on small random models: no float weight is left, plans repeat bit for bit, labels are true."""

import copy
import gc
import importlib
import json
import weakref

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from torch import nn

import ptq4dm
from helpers import run, same
from models import conditional_unet, dit
from ptq4dm import CalibrationConfig, CalibrationStore, Plan, PTQ4DMConfig, RTNConfig, UserError
from ptq4dm.kernels.runtime import prepared
from ptq4dm.kernels.w8a8 import layer as w8a8
from ptq4dm.layers.base import is_quantized
from ptq4dm.layers.plan import LayerPlan
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.layers.sizes import stored_bytes
from ptq4dm.pipelines.load import EMBEDDED
from ptq4dm.quantization.diffusers_bridge import quantization_config
from ptq4dm.quantization.quantize import make_plan
from ptq4dm.quantization.report import kernel_report
from ptq4dm.reconstruction.layer_errors import Ratio

KERNEL = w8a8.kernel_name(torch.device("cpu"))


def odd_dit():
    """Its width, 24, is no multiple of 16."""
    return dit(attention_head_dim=12, sample_size=16)


def pipeline(model):
    pipe = DDPMPipeline(unet=model, scheduler=DDIMScheduler(num_train_timesteps=100))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def store(unet):
    config = CalibrationConfig(num_samples=6, num_inference_steps=3, num_bins=2, batch_size=6)
    return ptq4dm.collect(pipeline(unet()), config)


def codes(model):
    return {name: t for name, t in model.state_dict().items() if name.endswith(("qweight", "_scale", "zero_point"))}


# --- nothing float is left ----------------------------------------------------------------------------------


def tensors_within(value, seen):
    """Every tensor reachable through attributes, containers and modules."""
    if id(value) in seen or isinstance(value, (str, int, float, torch.dtype, torch.device)):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_within(inner, seen)
    elif isinstance(value, (list, tuple, set)):
        for inner in value:
            yield from tensors_within(inner, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from tensors_within(vars(value), seen)


def float_weights(model):
    """Floating tensors with as many elements as a packed weight, in the model and in what the kernels keep."""
    packed = {m.qweight.numel() for m in model.modules() if is_quantized(m)}
    kept = [layout for _, entries in prepared.CACHE.values() for layout in entries.values()]
    found = [*tensors_within(model, set()), *kept]
    assert packed and len(found) > len(packed)
    return [tuple(t.shape) for t in found if t.is_floating_point() and t.numel() in packed]


@pytest.mark.parametrize("kind", ["unet", "conditional_unet", "dit"])
def test_no_float_weight_is_left(kind, unet):
    model = {"unet": unet, "conditional_unet": conditional_unet, "dit": odd_dit}[kind]()
    exact = run(model)
    originals = {
        name: weakref.ref(m.weight) for name, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)
    }
    assert len(float_weights_of(model)) >= len(originals)  # the search sees them while they are there
    report = ptq4dm.quantize(model, RTNConfig(activations="dynamic"))
    assert {row["layer"] for row in report.layers} == set(originals)
    assert float_weights(model) == []
    answer = run(model)
    assert float_weights(model) == []
    gc.collect()
    assert [name for name, ref in originals.items() if ref() is not None] == []
    assert 0 < (answer - exact).norm() < 0.1 * exact.norm()


def float_weights_of(model):
    numbers = {m.weight.numel() for m in model.modules() if type(m) in (nn.Linear, nn.Conv2d)}
    return [t for t in tensors_within(model, set()) if t.is_floating_point() and t.numel() in numbers]


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_models_shrink(name):
    pipe = ptq4dm.load_reference(name)
    model = getattr(pipe, "unet", None) or pipe.transformer
    before = sum(t.nbytes for t in model.state_dict().values())
    report = ptq4dm.quantize(pipe, RTNConfig(activations="dynamic"))
    after = sum(t.nbytes for t in model.state_dict().values())
    assert (report.bytes_before, report.bytes_after) == (before, after)
    # Of narrow layers, scales and the table of positions are a larger part.
    assert after <= (0.28 if name == "flow-dit-cifar10" else 0.27) * before
    positions = [tuple(t.shape) for name, t in model.named_buffers() if "pos_embed" in name]  # a table, no weight
    assert float_weights(model) == positions


def test_bytes_are_those_of_the_tensors():
    layer = quantized_copy(nn.Conv2d(4, 6, 3), LayerPlan(input_scale=0.1, input_zero_point=0), "x")
    assert stored_bytes(layer) == 6 * 4 * 9 + 6 * 4 + 6 * 4 + 4 + 4
    tied = nn.Sequential(layer, layer)
    assert stored_bytes(tied) == stored_bytes(layer)


# --- kernels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_kernel_agrees_with_the_reference(activations, store, monkeypatch, unet):
    model = unet()
    exact = run(model)
    report = ptq4dm.quantize(model, RTNConfig(activations=activations), store)
    assert {row["kernel"] for row in report.layers} == {KERNEL} and KERNEL in report.table()
    seen = {}
    for name, layer in model.named_modules():
        if is_quantized(layer):
            layer.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
    answer, seen = run(model), dict(seen)
    assert len(seen) == len(report.layers)
    monkeypatch.setattr(w8a8, "kernel_name", lambda *_: w8a8.REFERENCE)
    assert {row["kernel"] for row in kernel_report(model)} == {w8a8.REFERENCE}
    for name, (x, out) in seen.items():
        layer = model.get_submodule(name)
        step = x.abs().amax() / 127 if activations == "dynamic" else layer.input_scale
        one_code = step * layer.dequantized_weight().abs().amax()  # a value on a tie may round to the other side
        difference = (layer(x) - out).abs()
        assert difference.max() <= 2.1 * one_code + 1e-5 and difference.median() <= 1e-6 * (1 + out.abs().max()), name
    # Later layers see other codes after a tie: whole answers agree within what quantization itself costs.
    assert (run(model) - answer).norm() <= (answer - exact).norm()


def test_reports_name_the_kernel_that_runs(monkeypatch, unet):
    ran = []
    for table in (w8a8._LINEAR, w8a8._CONV2D):
        kernel = table[KERNEL]
        monkeypatch.setitem(table, KERNEL, lambda *a, kernel=kernel: ran.append(kernel) or kernel(*a))
    model = unet()
    report = ptq4dm.quantize(model, RTNConfig(activations="dynamic"))
    run(model)
    assert len(ran) == len(report.layers)


def test_channels_last_changes_nothing(store, unet):
    """load_pipeline turns UNets to channels_last: codes must mean the same in every layout."""
    model = unet()
    ptq4dm.quantize(model, RTNConfig(), store)
    answer = run(model)
    model.to(memory_format=torch.channels_last)
    assert model.conv_in.qweight.is_contiguous(memory_format=torch.channels_last)
    assert (run(model) - answer).abs().max() <= 1e-5 * answer.abs().max()


# --- plans --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned(store, unet):
    """A model quantized by PTQ4DM's search, and its plan."""
    model = unet()
    ptq4dm.quantize(model, PTQ4DMConfig(weight_bits=6, modules_to_not_convert=("up_blocks", "down_blocks.1")), store)
    return model, quantization_config(model).plan


def test_same_plan_same_codes(planned, tmp_path, unet):
    model, plan = planned
    plan.save(tmp_path / "plan.json")
    for again in (plan, Plan.load(tmp_path / "plan.json"), Plan.from_dict(json.loads(json.dumps(plan.to_dict())))):
        other = unet()
        ptq4dm.quantize(other, RTNConfig(plan=again))  # whatever the recipe says: the plan is followed
        assert same(codes(other), codes(model))
        assert torch.equal(run(other), run(model))


def test_same_recipe_same_plan(planned, store, unet):
    config = PTQ4DMConfig(weight_bits=6, modules_to_not_convert=("up_blocks", "down_blocks.1"))
    assert make_plan(unet(), config, store) == planned[1]


def test_a_recipe_serves_many_models(store, unet):
    config = PTQ4DMConfig()
    ptq4dm.quantize(unet(), config, store)
    assert config.plan is None  # else another model, or another store, would follow the first one's plan


def test_every_field_of_the_plan_reaches_the_codes(planned, unet):
    model, plan = planned
    layer = plan.layers["mid_block.resnets.0.conv1"]
    for change in ({"weight_bits": 5}, {"objective": "max"}, {"input_scale": 0.5}, {"input_zero_point": 1}):
        other = copy.deepcopy(plan)
        other.layers["mid_block.resnets.0.conv1"] = LayerPlan(**{**vars(layer), **change})
        changed = unet()
        ptq4dm.quantize(changed, RTNConfig(plan=other))
        assert not same(codes(changed), codes(model)), change
    assert layer.objective == "lp" and layer.static


def test_plan_of_another_model(planned):
    with pytest.raises(UserError, match="another model"):
        ptq4dm.quantize(odd_dit(), RTNConfig(plan=planned[1]))


def test_plan_with_an_unknown_format(unet):
    with pytest.raises(UserError, match="int3"):
        ptq4dm.quantize(unet(), RTNConfig(plan=Plan("rtn", {"conv_in": LayerPlan("int3")})))


# --- options ------------------------------------------------------------------------------------------------


@pytest.fixture
def options(unet):
    def apply(config, store=None):
        model = unet()
        report = ptq4dm.quantize(model, config, store)
        return model, quantization_config(model).plan, report

    return apply


def test_static_and_dynamic(store, options):
    static, plan, _ = options(RTNConfig(), store)
    assert all(layer.static for layer in plan.layers.values())
    assert any(layer.input_zero_point for layer in plan.layers.values())
    assert static.conv_in.input_scale.dtype == torch.float32 and static.conv_in.input_scale.item() > 0
    dynamic, plan, _ = options(RTNConfig(activations="dynamic"), store)
    assert not any(layer.static for layer in plan.layers.values())
    assert dynamic.conv_in.input_scale is None and "conv_in.input_scale" not in dynamic.state_dict()
    assert torch.equal(dynamic.conv_in.qweight, static.conv_in.qweight)


def test_static_grid_covers_what_was_seen(store, options):
    _, plan, _ = options(RTNConfig(), store)
    assert len(plan.layers) > 20
    for name, layer in plan.layers.items():
        _, _, low, high = store.input_of(name)
        ends = [(code - layer.input_zero_point) * layer.input_scale for code in (-128, 127)]
        assert ends[0] <= min(low, 0) + layer.input_scale and ends[1] >= max(high, 0) - layer.input_scale


def test_symmetric(store, options):
    _, plan, _ = options(RTNConfig(symmetric=True), store)
    assert {layer.input_zero_point for layer in plan.layers.values()} == {0}
    _, _, low, high = store.input_of("conv_in")
    assert plan.layers["conv_in"].input_scale == pytest.approx(max(-low, high) / 127, rel=1e-6)


@pytest.mark.parametrize("first_last, bits", [("int8", 8), ("same", 4), ("keep", None)])
def test_first_and_last(first_last, bits, options):
    model, plan, _ = options(RTNConfig(weight_bits=4, activations="dynamic", first_last=first_last))
    assert plan.layers["mid_block.resnets.0.conv1"].weight_bits == 4
    for name in ("conv_in", "conv_out"):
        layer = model.get_submodule(name)
        if bits is None:
            assert name not in plan.layers and type(layer) is nn.Conv2d and layer.weight.is_floating_point()
        else:
            assert plan.layers[name].weight_bits == bits
            codes = layer.codes() if layer.qweight.dtype == torch.uint8 else layer.qweight
            assert codes.abs().max() == 2 ** (bits - 1) - 1


def test_modules_to_not_convert(options):
    model, plan, report = options(RTNConfig(activations="dynamic", modules_to_not_convert=("*.to_q", "mid_block")))
    left = {name for name, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    assert left and all(name.endswith("to_q") or name.startswith("mid_block") for name in left)
    assert left.isdisjoint(plan.layers) and len(left) + len(report.layers) == len(kernel_report(model))
    rows = {row["layer"]: row for row in kernel_report(model)}
    assert {rows[name]["kernel"] for name in left} == {"torch"} and {rows[name]["format"] for name in left} == {
        "float32"
    }
    assert stored_bytes(model) == report.bytes_after < report.bytes_before


@pytest.mark.parametrize("weight_bits, activation_bits", [(5, 8), (8, 6), (6, 6), (5, 2)])
def test_narrow_grids_are_labelled(weight_bits, activation_bits, store, options):
    config = RTNConfig(weight_bits=weight_bits, activation_bits=activation_bits)
    model, plan, report = options(config, store)
    label = f"W{weight_bits}A{activation_bits} static (simulated)"
    inner = "mid_block.resnets.0.conv1"
    assert str(plan.layers[inner]) == label
    assert {r["format"] for r in report.layers} == {label, "W8A8 static"} and label in report.table()
    row = next(r for r in kernel_report(model) if r["layer"] == inner)
    assert row["format"] == label and row["kernel"] == KERNEL  # the same kernel: the bytes are those of int8
    layer = model.get_submodule(inner)
    assert layer.qweight.dtype == torch.int8 and layer.qweight.abs().max() == 2 ** (weight_bits - 1) - 1
    assert report.bytes_after == options(RTNConfig(), store)[2].bytes_after


@pytest.mark.parametrize("bits, affine, ends", [(3, False, (-3, 3)), (3, True, (-4, 3)), (2, False, (-1, 1))])
def test_narrow_weights_are_stored_in_four_bits(bits, affine, ends, store, options):
    model, plan, report = options(RTNConfig(weight_bits=bits, affine=affine), store)
    inner = "mid_block.resnets.0.conv1"
    assert str(plan.layers[inner]) == f"W{bits}A8 in 4 bits{' affine' if affine else ''} static"
    layer = model.get_submodule(inner)
    assert layer.qweight.dtype == torch.uint8 and (layer.codes().min(), layer.codes().max()) == ends
    assert report.bytes_after == options(RTNConfig(weight_bits=4, affine=affine), store)[2].bytes_after


def test_four_bits_are_stored_as_such(store, options):
    model, plan, report = options(RTNConfig(weight_bits=4), store)
    inner = "mid_block.resnets.0.conv1"
    assert str(plan.layers[inner]) == "W4A8 static" and not plan.layers[inner].simulated
    assert {r["format"] for r in report.layers} == {"W4A8 static", "W8A8 static"}
    assert model.get_submodule(inner).qweight.dtype == torch.uint8
    eight = options(RTNConfig(), store)[2].bytes_after
    assert report.bytes_after < eight
    layer = model.get_submodule(inner)  # rows are filled up to a multiple of 64 codes
    assert layer.qweight.nbytes == len(layer.qweight) * -(-layer.weight[0].numel() // 64) * 32


def test_narrow_activations_use_a_narrow_grid(store, monkeypatch, options):
    model, plan, _ = options(RTNConfig(activation_bits=3, first_last="same"), store)
    layer, choice = model.conv_in, plan.layers["conv_in"]
    x = torch.linspace(-4, 4, 4 * 3 * 64).reshape(4, 3, 8, 8)
    steps = (x / choice.input_scale).round() + choice.input_zero_point
    q = (steps.clamp(-4, 3) - choice.input_zero_point) * choice.input_scale
    expected = nn.functional.conv2d(q, layer.dequantized_weight(), layer.bias, padding=1)
    assert len(q.unique()) <= 8
    assert (layer(x) - expected).abs().max() < 1e-4


def test_fewer_bits_are_worse(store, options):
    errors = []
    for bits in (8, 6, 4):
        _, _, report = options(RTNConfig(weight_bits=bits, activation_bits=bits), store)
        errors.append(sum(row["sqnr"] for row in report.layers) / len(report.layers))
    assert errors[0] > errors[1] + 6 > errors[2] + 12


# --- reports ------------------------------------------------------------------------------------------------


def test_report_on_outputs(store, tmp_path, options):
    model, _, report = options(RTNConfig(), store)
    assert [r["sqnr"] for r in report.layers] == sorted(r["sqnr"] for r in report.layers)
    assert {r["basis"] for r in report.layers} == {"output"} and "layer output" in report.table()
    assert all(20 < r["sqnr"] < 80 for r in report.layers)
    assert report.method == {"method": "rtn"}
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()


def test_a_failure_leaves_the_model_as_it_was(store, monkeypatch, unet):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(importlib.import_module("ptq4dm.reconstruction.layer_errors"), "answers", fail)
    model = unet().train()
    with pytest.raises(RuntimeError):
        ptq4dm.quantize(model, RTNConfig(), store)
    assert not any(is_quantized(m) or m._forward_hooks for m in model.modules()) and model.training
    assert quantization_config(model) is None


def test_report_on_weights(options):
    _, _, report = options(RTNConfig(activations="dynamic"))
    assert {r["basis"] for r in report.layers} == {"weight"} and "(weight" in report.table()


def test_error_ratio():
    ratio = Ratio()
    ratio.update(torch.full((10,), 10.0), torch.full((10,), 9.0))
    assert ratio.decibel == pytest.approx(20)
    ratio.update(torch.full((10,), 10.0), torch.full((10,), 10.0))
    assert ratio.decibel == pytest.approx(20 + 3.0103, abs=1e-3)


def test_zero_weights_and_their_report(tmp_path, unet):
    """Layers that start at zero (DiT's modulation) have no error; JSON knows no infinity."""
    model = unet()
    nn.init.zeros_(model.conv_out.weight)
    report = ptq4dm.quantize(model, RTNConfig(activations="dynamic"))
    assert report.layers[-1]["layer"] == "conv_out"
    report.save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert "Infinity" not in text and json.loads(text)["layers"][-1]["sqnr"] is None
    assert torch.equal(run(model), model.conv_out.bias[:, None, None].expand(2, 3, 8, 8))


# --- what can go wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_name_their_layer(value, unet):
    model = unet()
    with torch.no_grad():
        model.mid_block.resnets[0].conv1.weight[1, 2, 0, 0] = value
    with pytest.raises(UserError, match=r"mid_block\.resnets\.0\.conv1"):
        ptq4dm.quantize(model, RTNConfig(activations="dynamic"))
    assert not any(is_quantized(m) for m in model.modules())  # it is left as it was
    assert quantization_config(model) is None


def test_store_of_another_model(store, unet):
    with pytest.raises(UserError, match="another model"):
        ptq4dm.quantize(unet(seed=1), RTNConfig(), store)
    with pytest.raises(UserError, match="another model"):
        ptq4dm.quantize(odd_dit(), RTNConfig(), store)


def test_static_needs_calibration(unet):
    with pytest.raises(UserError, match="collect"):
        ptq4dm.quantize(unet(), PTQ4DMConfig())


def test_twice_is_refused(unet):
    model = unet()
    ptq4dm.quantize(model, RTNConfig(activations="dynamic"))
    with pytest.raises(UserError, match="already"):
        ptq4dm.quantize(model, RTNConfig(activations="dynamic"))


def test_nothing_left_to_quantize(unet):
    with pytest.raises(UserError, match="modules_to_not_convert"):
        ptq4dm.quantize(unet(), RTNConfig(activations="dynamic", modules_to_not_convert=("*",)))


def test_calibration_folder(store, tmp_path, unet, options):
    config = CalibrationConfig(**store.config)
    ptq4dm.collect(pipeline(unet()), config, tmp_path / "store")
    model, plan, report = options(RTNConfig(calibration=str(tmp_path / "store")))
    assert same(codes(model), codes(options(RTNConfig(), store)[0]))
    assert report.layers[0]["basis"] == "output"
    assert quantization_config(model).calibration is None  # a model tells nothing of the folders it came from
    assert isinstance(CalibrationStore.load(tmp_path / "store"), CalibrationStore)


def test_layers_that_calibration_never_reached_stay_dynamic(store, options):
    unseen = copy.deepcopy(store)
    index = list(unseen.fingerprint).index("mid_block.attentions.0.to_q")
    unseen.statistics.low[index], unseen.statistics.high[index] = float("inf"), -float("inf")
    unseen.statistics.counts[index] = 0
    _, plan, _ = options(RTNConfig(), unseen)
    assert [name for name, layer in plan.layers.items() if not layer.static] == ["mid_block.attentions.0.to_q"]


# --- plain modules and casts --------------------------------------------------------------------------------


def test_plain_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Sequential(nn.Linear(20, 5, bias=False)))
    x = torch.randn(4, 12)
    exact = model(x)
    ptq4dm.quantize(model, RTNConfig(activations="dynamic"))
    assert is_quantized(model[0]) and is_quantized(model[2][0]) and model[2][0].bias is None
    assert (model(x) - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_leave_scales_alone(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Conv1d(4, 4, 1))
    ptq4dm.quantize(model, RTNConfig(plan=Plan("rtn", {"0": LayerPlan(input_scale=0.123456, input_zero_point=3)})))
    layer, before = model[0], copy.deepcopy(model[0])
    model.to(dtype)
    assert layer.bias.dtype == dtype and model[1].weight.dtype == dtype
    assert torch.equal(layer.weight_scale, before.weight_scale) and torch.equal(layer.qweight, before.qweight)
    assert layer.input_scale.dtype == torch.float32 and layer.input_scale == before.input_scale
    assert layer(torch.randn(4, 12, dtype=dtype)).dtype == dtype
    model.double()
    assert layer.weight_scale.dtype == torch.float32 and layer.bias.dtype == torch.float64
    assert model.to("meta")[0].weight_scale.is_meta


def test_deepcopy_and_state_dict(store, unet, options):
    model, _, _ = options(RTNConfig(), store)
    answer = run(model)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin), answer)
    assert twin.conv_in.qweight.data_ptr() != model.conv_in.qweight.data_ptr()
    other = unet(seed=3)
    plan = quantization_config(model).plan
    ptq4dm.quantize(other, RTNConfig(plan=plan))
    assert not torch.equal(run(other), answer)
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other), answer)  # the kernels' own copies follow
    with torch.no_grad():
        twin.conv_in.qweight.zero_()
    assert torch.equal(run(model), answer) and not torch.equal(run(twin), answer)
