"""split_inputs=True where texts begin with a token far above the rest: who gets a grid for it, what that saves."""

import copy

import pytest
import torch

import models
import ptq4dm
from helpers import distance, same
from ptq4dm import GradPTQConfig, PDQuantConfig, PTQ4DMConfig, RTNConfig
from ptq4dm.layers.plan import LayerPlan
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.layers.split.first import FirstTokenLinear
from ptq4dm.layers.view import find_layers
from ptq4dm.seams.first import LARGER, with_first_tokens
from ptq4dm.seams.observe import one_of_each_kind

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ("attn2.to_k", "attn2.to_v")


def unet():
    return models.conditional_unet(
        block_out_channels=(8,), cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None, up_block_types=("UpBlock2D",),
    )  # fmt: skip


def texts(seed, times=24.0):
    """Two texts of nine words, the first `times` as large as the others."""
    words = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(seed))
    words[:, 0] = times * torch.randn(12, generator=torch.Generator().manual_seed(99))
    return words


def answer(model, seed, times=24.0):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed + 100))
    return model(x, torch.tensor([10, 70]), encoder_hidden_states=texts(seed, times), return_dict=False)[0]


def recorded(times=24.0):
    model = unet()
    with ptq4dm.record(model) as calls, torch.no_grad():
        for seed in range(3):
            answer(model, seed, times)
    return calls


@pytest.fixture(scope="module")
def calls():
    return recorded()


def quantized(config, calls):
    model = unet()
    return model, ptq4dm.quantize(model, config, calls)


def apart(model):
    return {name for name, one in model.named_modules() if isinstance(one, FirstTokenLinear)}


def readers(model):
    return {name for name, _ in model.named_modules() if name.endswith(WORDS)}


@pytest.mark.parametrize(
    "recipe",
    [
        RTNConfig(split_inputs=True),
        PTQ4DMConfig(split_inputs=True, activation_bits=6),
        RTNConfig(split_inputs=True, symmetric=True),
        PTQ4DMConfig(split_inputs=True, objective="output"),
        RTNConfig(split_inputs=True, rounding="gptq"),
        PDQuantConfig(split_inputs=True, num_tuples=1, modules_to_not_convert=("*.resnets.*", "*.ff.*")),
        GradPTQConfig(
            split_inputs=True, weight_bits=8, activations="static", steps=2, num_tuples=2, train=("ranges",)
        ),
    ],
    ids=["rtn", "W8A6", "symmetric", "output ranges", "gptq", "prediction", "trained"],
)
def test_the_layers_that_read_the_text_get_a_grid_for_its_first_token(recipe, calls, few_looks):
    model, report = quantized(recipe, calls)
    assert apart(model) == readers(model) != set()
    told = {row["layer"]: row for row in report.layers}
    for name in apart(model):
        layer = model.get_submodule(name)
        assert "first token apart" in told[name]["format"] and "static" in told[name]["format"]
        assert told[name]["kernel"] == told[name.replace("attn2", "attn1")]["kernel"]
        assert 1 / 40 < layer.plan.first_factor < 1 / 6
    assert distance(answer(model, 7), answer(unet(), 7)) < 0.5


@torch.no_grad()
def test_what_the_words_lose(calls):
    """Of the keys and values of words, one static scale loses far more than two; a scale for each token, found in
    the call, loses least."""
    exact, words = unet(), texts(1)
    errors = {}
    for name, config in {
        "one": RTNConfig(), "two": RTNConfig(split_inputs=True), "dynamic": RTNConfig(activations="dynamic"),
    }.items():  # fmt: skip
        model, _ = quantized(config, calls)
        left = [model.get_submodule(one)(words) - exact.get_submodule(one)(words) for one in readers(exact)]
        errors[name] = sum(float(one[:, 1:].square().sum()) for one in left)
    assert errors["two"] < 0.1 * errors["one"]
    assert errors["dynamic"] < errors["two"] < 8 * errors["dynamic"]


def test_first_tokens_like_the_others_are_no_parts():
    model = unet()
    for times, expected in ((1.0, set()), (8 * LARGER, readers(model))):
        calls = recorded(times)
        found = with_first_tokens(model, find_layers(model), one_of_each_kind(calls))
        assert set(found) == expected


def test_other_layers_are_the_same_to_the_bit(calls):
    model, _ = quantized(RTNConfig(split_inputs=True), calls)
    again, _ = quantized(RTNConfig(split_inputs=True), recorded(1.0))
    plain, _ = quantized(RTNConfig(), calls)
    assert not apart(again)
    for name in apart(model):
        assert torch.equal(model.get_submodule(name).qweight, plain.get_submodule(name).qweight)
    for name, layer in plain.named_modules():
        if hasattr(layer, "plan") and ".attn" in name and name not in apart(model):
            assert same(layer, model.get_submodule(name))


def test_it_is_saved_and_loaded_and_its_plan_used_again(calls, tmp_path):
    model, _ = quantized(RTNConfig(split_inputs=True), calls)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert same(model, loaded) and apart(loaded) == apart(model)
    assert torch.equal(answer(loaded, 7), answer(model, 7))
    plan = ptq4dm.quantization_config(model).plan
    assert same(model, quantized(RTNConfig(split_inputs=True, plan=copy.deepcopy(plan)), None)[0])


def test_the_halves_of_a_gated_projection_have_scales_of_their_own():
    """Hidden and gate half of GEGLU are rows of one weight: cut in two layers it has the same codes and scales, and
    the layer after it reads their product, which has no halves."""
    torch.manual_seed(0)
    whole = torch.nn.Linear(16, 24)
    with torch.no_grad():
        whole.weight[12:] *= 30
    one = quantized_copy(whole, LayerPlan(), "layer")
    for rows in (slice(0, 12), slice(12, 24)):
        half = torch.nn.Linear(16, 12)
        half.weight.data, half.bias.data = whole.weight.data[rows], whole.bias.data[rows]
        part = quantized_copy(half, LayerPlan(), "layer")
        assert torch.equal(part.qweight, one.qweight[rows])
        assert torch.equal(part.weight_scale, one.weight_scale[rows])
