"""split_inputs=True on static recipes: what it changes and what not, saved and loaded, and where it is refused."""

import copy

import pytest
import torch

import models
import ptq4dm
from helpers import distance, run, same
from ptq4dm import GradPTQConfig, PDQuantConfig, PTQ4DMConfig, RTNConfig, UserError
from ptq4dm.calibration.measure import store_of
from ptq4dm.evaluation.paired import EpsilonError
from ptq4dm.layers.sizes import stored_bytes
from ptq4dm.layers.split.choices import SplitChoices
from ptq4dm.layers.view import find_layers
from ptq4dm.pipelines.denoiser import denoiser
from ptq4dm.pipelines.sampling import sample
from ptq4dm.seams.measure import parted_inputs
from ptq4dm.seams.parts import SAVED, together

pytestmark = pytest.mark.usefixtures("one_thread")


def unlike_parts(seed=0):
    """A small UNet whose skips are far smaller than its hidden states."""
    model = models.plain_unet(seed)
    with torch.no_grad():
        for block in (*model.mid_block.resnets, *(one for up in model.up_blocks for one in up.resnets)):
            block.conv2.weight.mul_(6)
    return model


@pytest.fixture(scope="module")
def calls():
    model = unlike_parts()
    with ptq4dm.record(model) as found:
        for seed in range(3):
            run(model, seed)
    return found


def quantized(config, calls):
    model = unlike_parts()
    report = ptq4dm.quantize(model, config, calls)
    return model, report


def split_layers(model):
    return {name for name, one in model.named_modules() if isinstance(getattr(one, "plan", None), SplitChoices)}


RECIPES = {
    "rtn": RTNConfig(),
    "ptq4dm W8A6": PTQ4DMConfig(activation_bits=6),
    "symmetric": PTQ4DMConfig(symmetric=True),
    "output ranges": PTQ4DMConfig(objective="output"),
    "gptq": PTQ4DMConfig(weight_bits=4, rounding="gptq"),
    "progressive": RTNConfig(weight_bits=4, weight_grid="progressive"),
    "power": RTNConfig(weight_bits=4, weight_grid="power"),
    "prediction": PDQuantConfig(num_tuples=2),
    "trained": GradPTQConfig(activations="static", steps=2, num_tuples=2, train=("rounding", "ranges", "scales")),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_static_recipe_splits(recipe, calls, few_looks):
    recipe = copy.copy(recipe)
    recipe.split_inputs = True
    model, report = quantized(recipe, calls)
    found = split_layers(model)
    joined = {name for name, _ in model.named_modules() if name.startswith(("up_blocks", "time_embedding.linear_1"))}
    assert any(".conv_shortcut" in name for name in found) and found <= joined
    told = {row["layer"]: row["format"] for row in report.layers}
    assert {name for name, kind in told.items() if "split at" in kind} == found
    for name in found:
        assert f"split at {model.get_submodule(name).plan.seams[0]}" in told[name]
        if recipe.symmetric:
            assert model.get_submodule(name).plan.input_offsets == [0, 0]
    assert distance(run(model), run(unlike_parts())) < 0.5


def test_layers_without_a_seam_are_the_same_to_the_bit(calls):
    whole, _ = quantized(RTNConfig(), calls)
    model, _ = quantized(RTNConfig(split_inputs=True), calls)
    found = split_layers(model)
    others = [name for name, one in whole.named_modules() if hasattr(one, "plan") and name not in found]
    assert found and len(others) > 10
    for name in others:
        assert whole.get_submodule(name).plan == model.get_submodule(name).plan
        assert same(whole.get_submodule(name), model.get_submodule(name))


def test_a_split_model_is_saved_and_loaded(calls, tmp_path):
    model, _ = quantized(RTNConfig(split_inputs=True), calls)
    model.save_pretrained(tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert same(model, loaded) and split_layers(loaded) == split_layers(model)
    assert torch.equal(run(loaded), run(model))


def test_its_plan_gives_the_same_codes_without_looking_again(calls, tmp_path):
    """Also while a model is loaded, layer by layer, where nothing can be observed."""
    model, _ = quantized(RTNConfig(split_inputs=True), calls)
    plan = ptq4dm.quantization_config(model).plan
    again, _ = quantized(RTNConfig(split_inputs=True, plan=plan), None)
    assert same(model, again)
    unlike_parts().save_pretrained(tmp_path / "exact")
    loaded = type(model).from_pretrained(tmp_path / "exact", quantization_config=RTNConfig(plan=plan))
    assert same(model, loaded)


def test_without_a_plan_it_is_refused_while_loading(tmp_path):
    unlike_parts().save_pretrained(tmp_path / "exact")
    with pytest.raises(UserError, match="cannot pack them while a model loads"):
        type(unlike_parts()).from_pretrained(
            tmp_path / "exact", quantization_config=RTNConfig(split_inputs=True, calibration="store")
        )


REFUSED = {
    "dynamic": ({"activations": "dynamic"}, "activations='dynamic' has none"),
    "fp8": ({"format": "fp8"}, "format='fp8' has none"),
    "rows of two widths": ({"weight_bits": 4, "average_bits": 4.5}, "rows of two widths"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_it_can_change_nothing_it_is_refused(name):
    options, says = REFUSED[name]
    RTNConfig(**options)
    with pytest.raises(UserError, match=says):
        RTNConfig(split_inputs=True, **options)


def test_a_model_that_joins_nothing_is_refused():
    model = models.dit()
    with ptq4dm.record(model) as calls:
        run(model)
    before = copy.deepcopy(model.state_dict())
    kept = [name for name, _ in model.named_modules() if name.endswith("timestep_embedder")]  # sines and cosines
    config = RTNConfig(split_inputs=True, modules_to_not_convert=tuple(kept))
    with pytest.raises(UserError, match="split_inputs=True.*has one; leave it out"):
        ptq4dm.quantize(model, config, calls)
    assert same(model, before)


def test_a_model_whose_parts_are_alike_is_refused():
    """What it joins are the sines and cosines of times: one grid serves both."""
    model = models.dit()
    with ptq4dm.record(model) as calls:
        for seed in range(2):
            run(model, seed)
    with pytest.raises(UserError, match=f"change nothing.*less than {SAVED:.0%}"):
        ptq4dm.quantize(model, RTNConfig(split_inputs=True), calls)


def test_statistics_of_parts_make_up_those_of_the_whole(calls):
    model = unlike_parts()
    store = store_of(model, calls)
    for name, found in parted_inputs(model, find_layers(model), store.recorded()).items():
        counts, limit, low, high = together(found.parts)
        whole, reach, bottom, top = store.input_of(name)
        assert (low, high, limit) == (bottom, top, reach) and counts.sum() == whole.sum()
        assert torch.equal(counts.view(64, -1).sum(1), whole.view(64, -1).sum(1))


def test_the_embedded_unet_loses_less_than_half_of_its_error():
    """At W8A6 on times that calibration did not see; bytes grow by less than a thousandth."""
    pipe = ptq4dm.load_reference("unet-cifar10")
    exact = denoiser(pipe)
    recorded = []
    for seed in (0, 2):
        with ptq4dm.record(pipe) as found:
            sample(pipe, [seed], num_inference_steps=2)
        recorded.append(found)
    errors, sizes = [], []
    for split in (False, True):
        model = copy.deepcopy(exact)
        ptq4dm.quantize(model, RTNConfig(activation_bits=6, split_inputs=split), recorded[0])
        error = EpsilonError(1, 1000)
        error.update(model, exact, recorded[1])
        errors.append(error.result()["overall"])
        sizes.append(stored_bytes(model))
    assert errors[1] < 0.6 * errors[0] and sizes[0] < sizes[1] < 1.001 * sizes[0]
