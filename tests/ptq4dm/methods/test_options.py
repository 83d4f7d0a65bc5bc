"""Options that would change nothing are refused in one sentence, defaults never; what is offered instead serves."""

import json
from dataclasses import fields, replace

import pytest

import models
import ptq4dm
from ptq4dm.errors import UserError
from ptq4dm.layers.plan import LayerPlan, Plan
from ptq4dm.quantization.planning import make_plan
from ptq4dm.quantization.recipe import METHODS, QuantConfig
from ptq4dm.rounding.learned import Learning

TRAINED = [ptq4dm.GradPTQConfig, ptq4dm.PDQuantConfig]
LEARNING = {
    "steps": 7, "step_tuples": 3, "loss": "cosine", "time_weights": (1.0, 2.0), "train": ("scales",),
    "variable": "sigmoid", "moves": "wide", "optimizer": "sgd", "learning_rate": 0.1, "start": "nearest",
    "augmentation": "noise", "unit": "layer", "prediction": 0.5, "correction": True,
}  # fmt: skip


def refused(kind, options, *words):
    with pytest.raises(UserError) as error:
        kind(**options)
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and all(word in text for word in words), text


def again(config):
    """The config as its file gives it back, and as a copy."""
    loaded = QuantConfig.from_dict(json.loads(config.to_json_string()))
    assert loaded == config == replace(config)
    return loaded


@pytest.mark.parametrize("kind", TRAINED)
def test_ranges_alone_of_dynamic_inputs_are_refused(kind):
    learned = {"rounding": "learned", "train": ("ranges",)}
    refused(kind, learned | {"activations": "dynamic"}, "train", "activations='dynamic' has none")
    refused(kind, learned | {"train": ["ranges"], "activations": "dynamic"}, "activations='static'")
    assert again(kind(**learned)).learning().train == ("ranges",)
    for train in (("rounding", "ranges"), ("scales",), ("ranges", "biases")):
        again(kind(**learned | {"train": train}, activations="dynamic"))


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("name", LEARNING)
def test_options_of_training_without_training_are_refused(kind, name):
    assert LEARNING.keys() == {item.name for item in fields(Learning)}
    given = {name: LEARNING[name]}
    for rounding in ("nearest", "gptq"):
        refused(kind, given | {"rounding": rounding}, f"rounding='{rounding}'", name, "leave it out", "learned")
    assert getattr(again(kind(rounding="learned", **given)), name) == LEARNING[name]


@pytest.mark.parametrize("kind", TRAINED)
def test_all_idle_options_are_named(kind):
    options = LEARNING | {"rounding": "nearest"}
    refused(kind, options, "steps, step_tuples, loss", "leave them out")
    defaults = {item.name: item.default for item in fields(kind) if item.name in LEARNING}
    assert len(defaults) == len(LEARNING) and kind(rounding="nearest", **defaults) == again(kind(rounding="nearest"))


def test_a_number_for_an_objective_without_one_is_refused():
    for objective in ("max", "mse", "output", "prediction"):
        given = {"objective": objective, "objective_parameter": 3.0}
        refused(ptq4dm.PTQ4DMConfig, given, f"objective '{objective}' has no parameter", "3.0")
        assert again(ptq4dm.PTQ4DMConfig(objective=objective)).ranges() == (
            objective,
            2.0 if objective == "mse" else None,
        )
    assert again(ptq4dm.PTQ4DMConfig(objective="mse", objective_parameter=2.0)).ranges() == ("mse", 2.0)


def test_the_default_of_one_objective_does_not_follow_to_another():
    lp = again(ptq4dm.PTQ4DMConfig())
    assert lp.ranges() == ("lp", 2.4) and lp.objective_parameter is None
    assert replace(lp, objective="percentile").ranges() == ("percentile", 99.99)
    assert replace(lp, objective="max").ranges() == ("max", None)
    assert again(ptq4dm.PTQ4DMConfig(objective_parameter=3)).ranges() == ("lp", 3.0)


@pytest.mark.parametrize("kind", [ptq4dm.PTQ4DMConfig, ptq4dm.RTNConfig, ptq4dm.GradPTQConfig])
def test_a_ranking_of_rows_without_an_average_is_refused(kind):
    refused(kind, {"weight_bits": 4, "importance": "random"}, "importance='random'", "average_bits")
    assert again(kind(weight_bits=4, importance="random", average_bits=5.0)).importance == "random"
    assert kind(weight_bits=4, importance="integrated") == again(kind(weight_bits=4))


def test_models_that_were_saved_with_idle_options_load():
    """Their plan has settled all, and options tell how it was made."""
    idle = {"steps": 7, "importance": "random", "rounding": "nearest"}
    plan = Plan("gradptq", {"layer": LayerPlan()})
    refused(ptq4dm.GradPTQConfig, idle, "importance")
    assert again(ptq4dm.GradPTQConfig(**idle, plan=plan)).steps == 7


@pytest.mark.parametrize(
    ("config", "end"),
    [
        (ptq4dm.RTNConfig(), ", or choose activations='dynamic'."),
        (ptq4dm.PTQ4DMConfig(rounding="gptq"), "(pipe)."),
        (ptq4dm.GradPTQConfig(), "(pipe)."),
        (ptq4dm.PDQuantConfig(), "activations='dynamic' would leave nothing of it."),
        (ptq4dm.PDQuantConfig(rounding="learned"), "(pipe)."),
        (ptq4dm.PDQuantConfig(rounding="learned", activations="dynamic"), "(pipe)."),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value.summary()),
)
def test_what_is_offered_instead_of_calibration_serves(config, end):
    with pytest.raises(UserError, match="needs calibration: pass a store") as error:
        make_plan(models.plain_unet(), config)
    assert str(error.value).endswith(end)


def test_the_options_of_every_method_come_back():
    assert len(METHODS) > 4
    for kind in METHODS.values():
        changed = {name: value for name, value in kind().summary().items() if name != "method"}
        assert again(kind()) == kind(**changed)


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("name", ["variable", "moves", "optimizer", "learning_rate", "start"])
def test_options_of_rounding_where_it_is_not_trained_are_refused(kind, name):
    for train in (("scales",), ["biases", "ranges"]):
        given = {"rounding": "learned", "train": train, name: LEARNING[name]}
        refused(kind, given, "train has no 'rounding'", name, "leave it out, or train rounding too")
    for train in (("rounding",), ("scales", "rounding")):
        assert getattr(again(kind(rounding="learned", train=train, **{name: LEARNING[name]})), name) == LEARNING[name]
    plan = Plan(kind.method, {"layer": LayerPlan()})
    assert again(kind(rounding="learned", train=("scales",), plan=plan, **{name: LEARNING[name]}))


INTEGER = sorted(name for name, kind in METHODS.items() if "symmetric" in {item.name for item in fields(kind)})


@pytest.mark.parametrize("name", INTEGER)
def test_symmetric_grids_of_inputs_that_have_none_are_refused(name):
    kind = METHODS[name]
    learned = {"rounding": "learned"} if name == "pdquant" else {}
    refused(kind, {"symmetric": True, "activations": "dynamic", **learned}, "symmetric", "activations='static'")
    assert again(kind(symmetric=True, activations="static", **learned)).symmetric
    assert not again(kind(activations="dynamic", **learned)).symmetric
    if name in ("rtn", "ptq4dm"):
        refused(kind, {"symmetric": True, "format": "fp8"}, "symmetric", "give format='int8' with it")
    if name == "mixpe":
        wanted = "give activations='static' and activation_bits=8 with it"
        refused(kind, {"symmetric": True, "activation_bits": 16}, wanted)
    assert again(kind(symmetric=True, activations="dynamic", plan=Plan(name, {"layer": LayerPlan()}), **learned))


@pytest.mark.parametrize("name", INTEGER)
def test_a_prefix_that_nothing_looks_at_is_refused(name):
    kind = METHODS[name]
    other = "exact" if kind.prefix == "quantized" else "quantized"
    assert again(kind(rounding="gptq", prefix=other)).prefix == other
    idle = {"rounding": "nearest", "prefix": other, "activations": "dynamic"}
    if name == "ptq4dm":
        idle["objective"] = "max"
    if name == "qoq":
        idle |= {"rotation": "none"}
    if name == "mixllm":
        idle |= {"clip": "none", "rows": 0.0}
    if name != "pdquant":  # of which nothing is left there
        refused(kind, idle, "prefix would change nothing", "rounding='gptq'")
        assert again(kind(**{**idle, "prefix": kind.prefix}))


def test_options_of_masks_without_masks_are_refused():
    kind = METHODS["ohq"]
    for given in ({"share": 0.2}, {"scale": "outputs"}, {"share": 0.2, "scale": "outputs"}):
        refused(kind, {"sensitivity": "direct", **given}, *given, "take sensitivity='masked'")
        again(kind(**given))
    again(kind(sensitivity="direct", draws=2))


def test_unsigned_inputs_of_8_bits_are_refused():
    for activations in ("int8", "fp8"):
        refused(
            ptq4dm.SVDQuantConfig, {"unsigned": True, "activations": activations}, "unsigned", "activations='int4'"
        )
        again(ptq4dm.SVDQuantConfig(activations=activations))
    assert again(ptq4dm.SVDQuantConfig(unsigned=True)).unsigned


@pytest.mark.parametrize("options", [{"activations": "dynamic"}, {"format": "fp8"}], ids=str)
def test_an_objective_of_input_ranges_is_refused_where_there_are_none(options):
    with pytest.raises(UserError, match="objective 'prediction' chooses static int8 ranges"):
        METHODS["ptq4dm"](objective="prediction", **options)
