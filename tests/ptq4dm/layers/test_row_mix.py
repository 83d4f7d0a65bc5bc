"""Layers whose rows have two widths: against the formula, against layers of each width, their bytes, and the plan."""

import copy
from dataclasses import asdict

import pytest
import torch
from torch import nn

import ptq4dm
from helpers import correlated, distance, normal, same
from ptq4dm import RTNConfig, UserError
from ptq4dm.evidence import LayerEvidence
from ptq4dm.kernels.cpu import w4a8 as cpu
from ptq4dm.kernels.w4.row_mix import codes_of, row_mix_grouped
from ptq4dm.layers.plan import Int4Plan, LayerPlan, Plan
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.layers.row_mix import RowMixPlan
from ptq4dm.layers.sizes import stored_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = {"one": [3], "some": [0, 1, 6, 10], "all but one": [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]}
LAYERS = {
    "linear": (lambda: nn.Linear(37, 11), (3, 5, 37)),
    "linear without bias": (lambda: nn.Linear(128, 11, bias=False), (4, 128)),
    "conv": (lambda: nn.Conv2d(5, 11, 3, padding=1), (2, 5, 6, 7)),
    "strided conv": (lambda: nn.Conv2d(64, 11, (3, 1), stride=2, dilation=(1, 2), bias=False), (2, 64, 7, 6)),
    "conv of one pixel": (lambda: nn.Conv2d(66, 11, 1), (2, 66, 3, 3)),
}


def layer_and_input(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return make(), normal(*shape)


def others(rows):
    return [row for row in range(11) if row not in rows]


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("wide", WIDE.values(), ids=WIDE)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_are_what_the_formula_says(name, wide, static, bits):
    """In float64: weights on a grid of their row's width, inputs on one of 8 bits, the same for all rows."""
    layer, x = layer_and_input(name)
    grid = {"input_scale": 0.03, "input_zero_point": 5} if static else {}
    found = quantized_copy(layer, RowMixPlan(weight_bits=bits, wide=wide, **grid), "layer")(x)
    exact = copy.deepcopy(layer).double()
    rows = layer.weight.detach().double().flatten(1)
    limit = torch.tensor([127 if row in wide else 2 ** (bits - 1) - 1 for row in range(11)]).double()[:, None]
    scale = (rows.abs().amax(1, keepdim=True) / limit).float().double()
    exact.weight.data = ((rows / scale).round() * scale).view(exact.weight.shape)
    if static:
        rounded = ((x / 0.03).round().add(5).clamp(-128, 127) - 5) * 0.03
    else:
        step = x.abs().amax((-1,) if layer.weight.ndim == 2 else (1, 2, 3), keepdim=True) / 127
        rounded = (x / step).round() * step
    expected = exact(rounded.double())
    assert found.dtype == x.dtype and found.shape == expected.shape
    assert distance(found, expected) < 1e-3  # a code that lies between two of float32 may go to either


GROUPED = {
    "linear": (lambda: nn.Linear(256, 11), (3, 5, 256)),
    "conv": (lambda: nn.Conv2d(128, 11, 3, padding=1), (2, 128, 6, 7)),
    "strided conv": (lambda: nn.Conv2d(128, 11, (3, 1), stride=2, dilation=(1, 2), bias=False), (2, 128, 7, 6)),
}


@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("size", [None, 32, 64, 128])
@pytest.mark.parametrize("name", GROUPED)
def test_rows_of_groups_are_those_of_layers_of_one_width(name, size, affine):
    """Narrow rows to the bit those of an int4 layer; wide ones within half a step of each group's largest weight."""
    torch.manual_seed(0)
    make, shape = GROUPED[name]
    layer, x, wide = make(), normal(*shape), WIDE["some"]
    plan = RowMixPlan(group_size=size, affine=affine, wide=wide)
    mixed = quantized_copy(layer, plan, "layer")
    four = quantized_copy(layer, Int4Plan(group_size=size, affine=affine), "layer")
    narrow = others(wide)
    assert torch.equal(mixed.qweight[-11:][narrow], four.qweight[narrow])
    assert torch.equal(mixed.wscales[narrow], four.wscales[narrow])
    assert mixed.wscales.dtype == (torch.float32 if size is None else torch.float16)
    if affine:
        assert torch.equal(mixed.wzeros, four.wzeros[narrow])
    weight = mixed.dequantized_weight()
    assert torch.equal(weight[narrow], four.dequantized_weight()[narrow])
    rows = mixed.matrix(layer.weight.detach())[wide]
    groups = rows.view(len(wide), -1, size or rows.shape[1])
    step = groups.abs().amax(-1, keepdim=True) / 127
    wrong = (mixed.matrix(weight)[wide].view_as(groups) - groups).abs()
    assert (wrong <= step * 0.57).all() and wrong.max() > 0.4 * step.min()  # 127 steps of a scale of 16 bits
    dims = (-1,) if layer.weight.ndim == 2 else (1, 2, 3)
    scale = x.abs().amax(dims, keepdim=True) / 127
    exact = copy.deepcopy(layer).double()
    exact.weight.data = weight.double()
    with torch.no_grad():
        assert distance(mixed(x), exact(((x / scale).round() * scale).double())) < 1e-3
    if size is not None:
        assert mixed.kernel_name() == ("cpu-w4a8" if cpu.serves(torch.device("cpu")) else "reference")


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("name", GROUPED)
def test_groups_under_static_inputs(name, bits):
    torch.manual_seed(0)
    make, shape = GROUPED[name]
    layer, x = make(), normal(*shape)
    step, limit = 4 / 2 ** (bits - 1), 2 ** (bits - 1)
    grid = {"activation_bits": bits, "input_scale": step, "input_zero_point": 3}
    mixed = quantized_copy(layer, RowMixPlan(group_size=64, affine=True, wide=WIDE["some"], **grid), "layer")
    rounded = ((x / step).round().add(3).clamp(-limit, limit - 1) - 3) * step
    exact = copy.deepcopy(layer).double()
    exact.weight.data = mixed.dequantized_weight().double()
    with torch.no_grad():
        assert distance(mixed(x), exact(rounded.double())) < 1e-3


def test_scales_too_small_for_float16_are_bfloat16():
    layer = nn.Linear(64, 11)
    layer.weight.data *= 1e-5
    mixed = quantized_copy(layer, RowMixPlan(group_size=32, affine=True, wide=[3]), "layer")
    assert mixed.wscales.dtype == torch.bfloat16
    assert distance(mixed.dequantized_weight(), layer.weight.detach()) < 0.1


def test_bytes_of_groups_count_scales_zero_points_and_the_index():
    layer, wide = nn.Linear(256, 11), WIDE["some"]
    found = stored_bytes(quantized_copy(layer, RowMixPlan(group_size=64, affine=True, wide=wide), "layer"))
    n, w = 11 - len(wide), len(wide)
    stored = 16 + 11  # rows of 4 bits
    assert found == stored * 128 + w * (4 * 2 + 4) + n * 4 * (2 + 1) + 11 * 4


@pytest.mark.parametrize("name", GROUPED)
def test_hessian_rounding_and_clipping_of_groups_gain_on_both_widths(name):
    torch.manual_seed(0)
    layer = GROUPED[name][0]()
    weight, fed = layer.weight.detach().flatten(1), LayerEvidence(correlated(2048, layer.weight[0].numel()))
    errors = {}
    for label, choice in {
        "nearest": {}, "both": {"objective": "output-checked", "rounding": "gptq"}
    }.items():  # fmt: skip
        plan = RowMixPlan(group_size=64, affine=True, wide=WIDE["some"], **choice)
        wrong = quantized_copy(layer, plan, "layer", fed).dequantized_weight().flatten(1) - weight
        errors[label] = (fed.rows @ wrong.T).square().sum(0)
    for rows in (WIDE["some"], others(WIDE["some"])):
        assert errors["both"][rows].sum() < 0.7 * errors["nearest"][rows].sum()


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_those_of_layers_of_one_width(name, static):
    """To the bit: what is stored, what it stands for, and, where they have the same kernel, what comes out."""
    layer, x = layer_and_input(name)
    grid = {"input_scale": 0.03, "input_zero_point": 5} if static else {}
    wide = WIDE["some"]
    narrow, axis = others(wide), -1 if layer.weight.ndim == 2 else 1
    mixed = quantized_copy(layer, RowMixPlan(wide=wide, objective="mse", **grid), "layer")
    four = quantized_copy(layer, Int4Plan(objective="mse", **grid), "layer")
    eight = quantized_copy(layer, LayerPlan(objective="mse", **grid), "layer")
    codes = codes_of(mixed.qweight, mixed.wide, layer.weight[0].numel())
    assert torch.equal(mixed.qweight[-11:][narrow], four.qweight[narrow])
    assert torch.equal(mixed.shaped(codes)[wide], eight.qweight[wide])
    for rows, one in ((narrow, four), (wide, eight)):
        assert torch.equal(mixed.dequantized_weight()[rows], one.dequantized_weight()[rows])
        index = torch.tensor(rows)
        found, right = mixed(x).index_select(axis, index), one(x).index_select(axis, index)
        same = one.kernel_name() != "cpu-w4a8"  # which rounds in another order
        assert torch.equal(found, right) if same else distance(found, right) < 1e-6


@pytest.mark.parametrize("wide", WIDE.values(), ids=WIDE)
def test_bytes_are_those_of_each_row(wide):
    layer = nn.Linear(130, 11, bias=False)
    found = stored_bytes(quantized_copy(layer, RowMixPlan(wide=wide), "layer"))
    like, scale, number = 4, 4, 4
    stored = 16 + 11  # rows of 4 bits
    assert found == stored * 192 // 2 + 11 * scale + len(wide) * number + like


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_the_kernel_is_that_of_int8_rows(name):
    """On a copy; a layer of 4-bit weights alone may have one on a CPU that needs no copy."""
    layer, _ = layer_and_input(name)
    mixed, eight = (quantized_copy(layer, plan, "layer") for plan in (RowMixPlan(wide=[3]), LayerPlan()))
    served = eight.kernel_name() == "onednn-int8"
    assert mixed.kernel_name() == ("onednn-int8 on an int8 copy" if served else "reference")


@pytest.mark.parametrize("name", ["qweight", "wscales"])
def test_the_copy_follows_what_is_stored(name):
    layer, x = layer_and_input("linear")
    mixed = quantized_copy(layer, RowMixPlan(wide=WIDE["some"]), "layer")
    before = mixed(x)
    getattr(mixed, name).add_(1)
    assert not torch.equal(mixed(x), before)
    assert torch.equal(mixed(x), copy.deepcopy(mixed)(x))


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_hessian_rounding_gains_on_both_widths(name):
    layer, _ = layer_and_input(name)
    weight = layer.weight.detach().flatten(1)
    rows = correlated(2048, weight.shape[1])
    errors = {}
    for rounding in ("nearest", "gptq"):
        plan = RowMixPlan(wide=WIDE["some"], rounding=rounding)
        wrong = quantized_copy(layer, plan, "layer", LayerEvidence(rows)).dequantized_weight().flatten(1) - weight
        errors[rounding] = (rows @ wrong.T).square().sum(0)
    for chosen in (WIDE["some"], others(WIDE["some"])):
        assert errors["gptq"][chosen].sum() < 0.7 * errors["nearest"][chosen].sum()


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_codes_can_come_from_elsewhere(name):
    """Training rounds steps up or down between ends; a gradient goes through the values; `fill` takes the codes."""
    layer, _ = layer_and_input(name)
    mixed = quantized_copy(layer, RowMixPlan(weight_bits=3, wide=WIDE["some"]), "layer")
    matrix = mixed.matrix(layer.weight.detach())
    grid = mixed.rounded(layer.weight.detach(), "nearest")[1]
    low, high = grid.ends(matrix.shape[1])
    assert low[:, 0].tolist() == [-127 if row in WIDE["some"] else -3 for row in range(11)] and torch.equal(
        high, -low
    )
    codes = grid.steps(matrix).floor().clamp(low, high).requires_grad_()
    values = grid.values(codes)
    values.sum().backward()
    assert torch.equal(codes.grad, grid.scales.expand_as(codes))
    mixed.fill(codes.detach().to(torch.int8), grid)
    assert torch.equal(mixed.dequantized_weight(), mixed.shaped(values.detach()))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"wide": []}, "wide names none"),
        ({"wide": [2, 2]}, "rising"),
        ({"wide": [3, 1]}, "rising"),
        ({"wide": [-1, 1]}, "from 0 on"),
        ({"wide": ["1"]}, "wide must be"),
        ({"wide": [1, 6]}, "names output 6, and there are 6"),
        ({"wide": [0, 1, 2, 3, 4, 5]}, "names all outputs"),
        ({"weight_bits": 5, "wide": [1]}, "4 bits and less, not 5"),
        ({"group_size": 16, "wide": [1]}, "group_size is none, 32, 64 or 128, not 16"),
        ({"group_size": 32, "wide": [1]}, "4 inputs do not divide into groups of 32"),
    ],
)
def test_plans_that_are_wrong(change, words):
    model = nn.Sequential(nn.Linear(4, 6))
    plan = Plan.from_dict({"method": "rtn", "layers": {"0": {"format": "row-mix", **change}}})
    with pytest.raises(UserError, match=f"layer '0' of the plan: .*{words}"):
        ptq4dm.quantize(model, RTNConfig(plan=plan))


def test_grouped_convolutions_are_refused():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    with pytest.raises(UserError, match="grouped convolutions have outputs of one width"):
        ptq4dm.quantize(model, RTNConfig(plan=Plan("rtn", {"0": RowMixPlan(wide=[1])})))


def test_a_plan_is_json_and_back():
    plan = Plan("rtn", {"0": RowMixPlan(weight_bits=3, wide=[1, 4])})
    again = Plan.from_dict(plan.to_dict())
    assert again == plan and asdict(again.layers["0"])["wide"] == [1, 4]
    assert str(again.layers["0"]) == "W3A8 in 4 bits + 2 rows W8 dynamic" and not again.layers["0"].simulated
    assert str(RowMixPlan(group_size=64, affine=True, wide=[1])) == "W4A8 g64 affine + 1 rows W8 dynamic"


def test_a_model_saves_and_loads_to_the_bit(unet, tmp_path):
    from diffusers import UNet2DModel

    model = unet()
    recipe = RTNConfig(weight_bits=3, average_bits=4.5, importance="magnitude", activations="dynamic")
    report = ptq4dm.quantize(model, recipe)
    assert any("rows W8" in row["format"] for row in report.layers)
    model.save_pretrained(tmp_path)
    again = UNet2DModel.from_pretrained(tmp_path)
    assert same(model, again)
    x = normal(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(x, 10).sample, again(x, 10).sample)
    half = UNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    kept = [module for module in half.modules() if hasattr(module, "wide")]
    assert kept and all(module.wscales.dtype == torch.float32 for module in kept)
    assert distance(half(x.bfloat16(), 10).sample.float(), model(x, 10).sample) < 0.1


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_compiled_layers_give_what_they_give_eagerly(name):
    layer, x = layer_and_input(name)
    mixed = quantized_copy(layer, RowMixPlan(wide=WIDE["some"]), "layer")
    with torch.no_grad():
        assert torch.equal(torch.compile(mixed, backend="aot_eager", fullgraph=True)(x), mixed(x))


def test_the_ops_are_whole():
    """Schema and fake kernels fit the real ones."""
    fully, x = layer_and_input("linear")
    fully = quantized_copy(fully, RowMixPlan(wide=WIDE["some"]), "layer")
    torch.library.opcheck(torch.ops.ptq4dm.row_mix_linear.default, (x, *fully.operands))
    groups = quantized_copy(nn.Linear(64, 11), RowMixPlan(group_size=32, affine=True, wide=[3]), "layer")
    torch.library.opcheck(torch.ops.ptq4dm.row_mix_linear.default, (normal(3, 64), *groups.operands))
    parts = (groups.qweight, groups.wscales, groups.wzeros, groups.wide)
    torch.library.opcheck(torch.ops.ptq4dm.row_mix_grouped.default, (normal(3, 64), *parts, groups.bias))
    window, x = layer_and_input("strided conv")
    window = quantized_copy(window, RowMixPlan(wide=WIDE["some"]), "layer")
    geometry = (list(window.weight_shape[2:]), list(window.stride), list(window.padding), list(window.dilation))
    torch.library.opcheck(torch.ops.ptq4dm.row_mix_conv2d.default, (x, *window.operands, *geometry))


def test_empty_inputs_and_models_of_16_bits():
    """No row of an input, and models of 16 bits."""
    layer, _ = layer_and_input("linear")
    mixed = quantized_copy(layer, RowMixPlan(wide=[3]), "layer")
    assert mixed(torch.zeros(0, 37)).shape == (0, 11)
    half = copy.deepcopy(mixed).half()
    assert half.wscales.dtype == torch.float32 and half.bias.dtype == torch.float16
    x = normal(4, 37)
    assert half(x.half()).dtype == torch.float16 and distance(half(x.half()), mixed(x)) < 0.02


def test_the_grouped_product_is_what_the_layer_gives():
    """The op that a GPU's layers call, by its formula: scales after sums."""
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 11), normal(3, 5, 256)
    mixed = quantized_copy(layer, RowMixPlan(group_size=64, affine=True, wide=WIDE["some"]), "layer")
    parts = (mixed.qweight, mixed.wscales, mixed.wzeros, mixed.wide)
    assert distance(row_mix_grouped(x, *parts, mixed.bias), mixed(x)) < 1e-5
    with pytest.raises(ValueError, match="10 outputs, 4 of 8 bits, have 26 stored rows; got 27"):
        row_mix_grouped(x, mixed.qweight, mixed.wscales[1:], *parts[2:], mixed.bias)
    with pytest.raises(ValueError, match="11 outputs, 4 of 8 bits, have 27 stored rows; got 54"):
        row_mix_grouped(x, torch.cat([mixed.qweight] * 2), *parts[1:], mixed.bias)
    with pytest.raises(ValueError, match=r"packed as \[7, 128\] bytes"):
        row_mix_grouped(x, mixed.qweight[:, 1:], *parts[1:], mixed.bias)
    with pytest.raises(ValueError, match="12 of 11 outputs"):
        row_mix_grouped(x, *parts[:3], torch.arange(12, dtype=torch.int32), mixed.bias)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("size", [None, 32, 64, 128])
@pytest.mark.parametrize("name", GROUPED)
def test_kernels_on_a_gpu_give_what_groups_give(name, size, affine):
    torch.manual_seed(0)
    make, shape = GROUPED[name]
    mixed, x = (
        quantized_copy(make(), RowMixPlan(group_size=size, affine=affine, wide=[3, 7]), "layer"),
        normal(*shape),
    )
    with torch.no_grad():
        found = copy.deepcopy(mixed).cuda()(x.cuda())
        folded = size is not None and name != "linear"  # scales of groups in 8 bits
        assert distance(found, mixed(x)) < (0.05 if folded else 0.004)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", LAYERS)
def test_kernels_on_a_gpu_give_what_the_reference_gives(name, static):
    layer, x = layer_and_input(name)
    grid = {"input_scale": 0.03, "input_zero_point": 5} if static else {}
    mixed = quantized_copy(layer, RowMixPlan(wide=WIDE["some"], **grid), "layer")
    with torch.no_grad():
        found = copy.deepcopy(mixed).cuda()(x.cuda())
        assert distance(found, mixed(x)) < 0.004
