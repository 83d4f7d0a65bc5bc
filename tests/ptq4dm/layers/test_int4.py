"""Layers with weights of 4 bits: their codes against the formula, their bytes, and what computes them."""

import copy

import pytest
import torch
from torch import nn

import ptq4dm
from ptq4dm import RTNConfig, UserError
from ptq4dm.evidence import LayerEvidence
from ptq4dm.kernels.cpu import library
from ptq4dm.kernels.formats.int4 import pack_int4, unpack_int4
from ptq4dm.layers import int4_ops
from ptq4dm.layers.plan import Int4Plan, LayerPlan
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.layers.sizes import stored_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

GRIDS = {
    "row": {},
    "row-affine": {"affine": True},
    "g32": {"group_size": 32},
    "g64-affine": {"group_size": 64, "affine": True},
    "g128": {"group_size": 128},
}


def linear(outputs=24, inputs=256, bias=True):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=0.05)
    with torch.no_grad():
        layer.weight[:, 3] += 0.1  # a range that is not symmetric
    return layer


def conv(outputs=12, channels=64, kernel=3, **options):
    torch.manual_seed(1)
    return nn.Conv2d(channels, outputs, kernel, **{"padding": kernel // 2, **options})


def rounded_by_formula(rows, affine):
    """[R, C] -> values on the 4-bit grid of each row, from the definition, in float64."""
    rows = rows.double()
    if not affine:
        scale = rows.abs().amax(1, keepdim=True) / 7
        return (rows / scale).round().clamp(-7, 7) * scale
    low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    return ((rows / scale).round() + zero).clamp(0, 15).sub(zero) * scale


@pytest.mark.parametrize("choice", GRIDS.values(), ids=GRIDS)
def test_linear_weights_are_what_the_formula_says(choice):
    layer = linear()
    found = quantized_copy(layer, Int4Plan(**choice), "layer").dequantized_weight()
    size = choice.get("group_size") or 256
    expected = rounded_by_formula(layer.weight.detach().reshape(-1, size), choice.get("affine", False)).view(24, 256)
    step = layer.weight.detach().abs().max() / 7
    assert (found - expected).abs().max() < 0.002 * step + 1e-6 or (found - expected).abs().gt(step / 4).sum() <= 3
    assert (found - layer.weight).abs().max() <= 0.52 * (2 * step if choice.get("affine") else step)


@pytest.mark.parametrize("choice", GRIDS.values(), ids=GRIDS)
def test_groups_of_a_convolution_hold_channels_of_one_pixel(choice):
    if choice.get("group_size") == 128:
        choice = {**choice, "group_size": 64}
    layer = conv()
    found = quantized_copy(layer, Int4Plan(**choice), "layer").dequantized_weight()
    pixel_first = layer.weight.detach().permute(0, 2, 3, 1).reshape(12, 9 * 64)
    rows = pixel_first.reshape(-1, choice.get("group_size") or 9 * 64)
    expected = rounded_by_formula(rows, choice.get("affine", False)).view(12, 3, 3, 64).permute(0, 3, 1, 2)
    off = (found - expected).abs() > 0.02 * layer.weight.abs().max()  # scales in 16 bits move some to a neighbour
    assert off.float().mean() < 0.01


def test_four_bits_are_four_bits():
    """Codes take half a byte, in memory and on disk; scales are all that is beside them, and one number
    that tells the model's dtype where no bias does."""
    like = 4
    layer = quantized_copy(linear(bias=False), Int4Plan(group_size=64), "layer")
    assert layer.qweight.dtype == torch.uint8 and layer.qweight.shape == (24, 128)
    assert stored_bytes(layer) == 24 * 128 + 24 * 4 * 2 + like
    assert stored_bytes(quantized_copy(linear(bias=False), Int4Plan(), "layer")) == 24 * 128 + 24 * 4 + like
    odd = quantized_copy(nn.Linear(37, 5, bias=False), Int4Plan(), "layer")  # filled up to 64
    assert stored_bytes(odd) == 5 * 32 + 5 * 4 + like


def test_the_codes_of_rows_are_those_of_eight_bit_containers():
    """One scale an output: the same codes as the simulated format had, in half the bytes."""
    for layer in (linear(), conv(kernel=1), conv(groups=4), conv(channels=20, stride=2)):
        simulated = quantized_copy(layer, LayerPlan(weight_bits=4), "layer")
        stored = quantized_copy(layer, Int4Plan(), "layer")
        assert torch.equal(stored.codes(), simulated.qweight)
        assert torch.equal(stored.wscales[:, 0], simulated.weight_scale)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("choice", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("kind", ["linear", "conv", "grouped-conv", "strided-conv"])
def test_layers_compute_what_their_codes_stand_for(kind, choice, static):
    layer, x = {
        "linear": (linear(), torch.randn(3, 5, 256)),
        "conv": (conv(channels=128), torch.randn(2, 128, 6, 5)),
        "grouped-conv": (conv(channels=256, groups=2), torch.randn(2, 256, 6, 5)),
        "strided-conv": (conv(channels=128, stride=2, bias=False), torch.randn(2, 128, 7, 7)),
    }[kind]
    grid = {"input_scale": 0.03, "input_zero_point": 5} if static else {}
    quantized = quantized_copy(layer, Int4Plan(**choice, **grid), "layer")
    exact = copy.deepcopy(layer)
    with torch.no_grad():
        exact.weight.copy_(quantized.dequantized_weight())
        if static:
            rounded = ((x / 0.03).round().add(5).clamp(-128, 127) - 5) * 0.03
        else:
            dims = (-1,) if kind == "linear" else (1, 2, 3)
            scale = x.abs().amax(dims, keepdim=True) / 127
            rounded = (x / scale).round() * scale
        expected, found = exact(rounded), quantized(x)
    assert found.dtype == x.dtype and found.shape == expected.shape
    assert (found - expected).abs().max() < 3e-3 * expected.abs().max()


def test_the_kernel_is_named_as_it_is():
    cpu = torch.device("cpu")
    rows = quantized_copy(linear(), Int4Plan(), "layer").kernel_name()
    groups = quantized_copy(linear(), Int4Plan(group_size=64), "layer").kernel_name()
    compiled = library.available()
    assert groups == ("cpu-w4a8" if compiled else "reference")
    assert rows in (["cpu-w4a8"] if compiled else ["onednn-int8 on an int8 copy", "reference"])
    convolution = quantized_copy(conv(), Int4Plan(), "layer").kernel_name()
    assert convolution == rows
    grouped = quantized_copy(conv(), Int4Plan(group_size=32), "layer").kernel_name()
    assert grouped == groups
    assert rows == int4_ops.kernel_name(cpu, True, 256, 1, False, False, 8, 1)


def test_hessian_rounding_sees_the_columns_where_they_are():
    """Columns of a convolution are permuted for storage: evidence must follow, or Hessian rounding gains nothing."""
    layer = conv(outputs=16, channels=8)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(72, 72, generator=generator) * torch.logspace(0, -2, 72)[:, None]
    rows = torch.randn(2048, 72, generator=generator) @ mixing
    error = {}
    for rounding in ("nearest", "gptq"):
        quantized = quantized_copy(layer, Int4Plan(rounding=rounding), "layer", LayerEvidence(rows))
        wrong = (quantized.dequantized_weight() - layer.weight.detach()).flatten(1)
        error[rounding] = float((rows @ wrong.T).square().sum())
    shuffled = LayerEvidence(rows[:, torch.randperm(72, generator=generator)])
    quantized = quantized_copy(layer, Int4Plan(rounding="gptq"), "layer", shuffled)
    wrong = (quantized.dequantized_weight() - layer.weight.detach()).flatten(1)
    error["shuffled"] = float((rows @ wrong.T).square().sum())
    assert error["gptq"] < 0.6 * error["nearest"] and error["shuffled"] > error["gptq"] * 1.3


def test_small_scales_keep_their_precision():
    """Scales below what float16 holds with all its digits are stored in bfloat16."""
    layer = linear()
    with torch.no_grad():
        layer.weight.mul_(1e-4)
    quantized = quantized_copy(layer, Int4Plan(group_size=32), "layer")
    assert quantized.wscales.dtype == torch.bfloat16
    relative = (quantized.dequantized_weight() - layer.weight).norm() / layer.weight.norm()
    assert relative < 0.15


@pytest.mark.parametrize(
    "options, word",
    [
        ({"weight_bits": 4, "group_size": 48}, "group_size must be one of 32, 64, 128 or None; got 48"),
        ({"group_size": 64}, "weight_bits=4"),
        ({"affine": True}, "weight_bits=4"),
        ({"weight_bits": 4, "rounding": "down"}, "rounding 'down' is unknown"),
    ],
)
def test_wrong_options(options, word):
    with pytest.raises(UserError, match=word):
        RTNConfig(activations="dynamic", **options)


def test_a_model_of_mixed_layers_saves_and_loads_to_the_bit(unet, tmp_path):
    from diffusers import UNet2DModel

    model = unet()
    report = ptq4dm.quantize(model, RTNConfig(weight_bits=4, activations="dynamic"))
    formats = {row["format"] for row in report.layers}
    assert formats == {"W4A8 dynamic", "W8A8 dynamic"}  # the ends have 8 bits
    model.save_pretrained(tmp_path)
    again = UNet2DModel.from_pretrained(tmp_path)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(x, 10).sample, again(x, 10).sample)
    half = UNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    kept = [module for module in half.modules() if hasattr(module, "wscales")]
    assert kept and all(module.wscales.dtype == torch.float32 for module in kept)


def test_packing_is_the_inverse_of_unpacking_over_filled_rows():
    codes = torch.randint(-8, 8, (3, 128), dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(codes, 64), 64), codes)


@pytest.mark.parametrize("choice", [{}, {"group_size": 64, "affine": True}], ids=["row", "g64-affine"])
def test_the_ops_are_whole_and_compile(choice):
    """Schema and fake kernels fit the real ones; a compiled layer gives what it gives eagerly."""
    fully = quantized_copy(linear(), Int4Plan(**choice), "layer")
    window = quantized_copy(conv(stride=2), Int4Plan(**choice), "layer")
    geometry = ([3, 3], [2, 2], [1, 1], [1, 1], 1)
    torch.library.opcheck(torch.ops.ptq4dm.int4_linear.default, (torch.randn(3, 256), *fully.operands))
    torch.library.opcheck(
        torch.ops.ptq4dm.int4_conv2d.default, (torch.randn(2, 64, 7, 6), *window.operands, *geometry)
    )
    x = torch.randn(2, 5, 256)
    with torch.no_grad():
        assert torch.equal(torch.compile(fully, backend="aot_eager")(x), fully(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("choice", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("kind", ["linear", "few-rows", "odd-linear", "conv", "strided-conv", "grouped-conv"])
def test_kernels_on_a_gpu_give_what_the_reference_gives(kind, choice, static):
    """One scale an output is exact, and so are scales after the sums of groups; folding those of groups into codes
    rounds weights to 1 / 30 of a step (affine: 1 / 16)."""
    layer, x = {
        "linear": (linear(72), torch.randn(3, 50, 256)),
        "few-rows": (linear(72), torch.randn(3, 256)),
        "odd-linear": (linear(17, 96, bias=False), torch.randn(70, 96)),
        "conv": (conv(24, 128), torch.randn(2, 128, 9, 8)),
        "strided-conv": (conv(24, 128, stride=2, bias=False), torch.randn(2, 128, 9, 9)),
        "grouped-conv": (conv(24, 256, groups=2), torch.randn(2, 256, 6, 5)),
    }[kind]
    if kind == "odd-linear" and choice.get("group_size"):
        choice = {**choice, "group_size": 32}
    grid = {"input_scale": 0.03, "input_zero_point": 5} if static else {}
    quantized = quantized_copy(layer, Int4Plan(**choice, **grid), "layer")
    with torch.no_grad():
        expected = quantized(x)
        on_gpu = copy.deepcopy(quantized).cuda()
        found = on_gpu(x.cuda())
    assert found.shape == expected.shape and found.dtype == expected.dtype
    relative = (found.cpu() - expected).norm() / expected.norm()
    row, whole = choice.get("group_size") is None, "conv" not in kind and not static
    sums = on_gpu.kernel_name() in ("triton-w4a8-channel", "triton-w4a8-grouped")
    assert sums == (whole and (row or choice.get("affine", False)))
    exact = row or sums or kind == "grouped-conv"
    assert relative < (0.004 if exact else 0.06 if choice.get("affine") else 0.03)
    assert (on_gpu.kernel_name() == "reference") == (kind == "grouped-conv")


@pytest.mark.parametrize("layer", [linear(inputs=64), conv(kernel=1)], ids=["linear", "conv"])
def test_one_group_that_is_the_whole_row(layer):
    """Its scales are 16-bit, as those of groups are, and the kernels for one scale an output take float32."""
    quantized = quantized_copy(layer, Int4Plan(group_size=64), "layer")
    x = torch.randn(3, 64, *layer.weight.shape[2:], generator=torch.Generator().manual_seed(0))
    assert quantized.wscales.dtype == torch.float16 and quantized.wscales.shape[1] == 1
    assert (quantized(x) - layer(x)).norm() < 0.3 * layer(x).norm()
