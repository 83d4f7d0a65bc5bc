"""Plans and recipes: JSON there and back, labels, and one clear sentence for whatever is wrong."""

import json
from dataclasses import replace

import pytest

from ptq4dm import LUTGEMMConfig, Plan, PTQ4DMConfig, QuantConfig, RTNConfig, UserError
from ptq4dm.errors import DamagedFile
from ptq4dm.layers.plan import LayerPlan
from ptq4dm.quantization.components import load_plans


def some_plan():
    static = LayerPlan("int8", 8, 8, "lp", 2.4, 0.1234567890123, -17)
    return Plan("ptq4dm", {"conv_in": static, "block.0.to_q": LayerPlan(weight_bits=4, activation_bits=6)})


def test_file_there_and_back(tmp_path):
    plan = some_plan()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_saving_replaces_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    some_plan().save(path)
    broken = Plan("ptq4dm", {"x": LayerPlan(input_scale=object())})
    with pytest.raises(TypeError):
        broken.save(path)
    assert Plan.load(path) == some_plan()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'{"method": "rtn"}', b"\xff\xfe\x00binary"])
def test_not_a_plan(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="plan"):
        Plan.load(path)


def test_plan_with_an_unknown_entry():
    data = some_plan().to_dict()
    data["layers"]["conv_in"]["colour"] = "blue"
    with pytest.raises(UserError, match="colour"):
        Plan.from_dict(data)


def test_no_such_plan(tmp_path):
    with pytest.raises(UserError, match="missing.json"):
        Plan.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    "plan, label",
    [
        (LayerPlan(), "W8A8 dynamic"),
        (LayerPlan(input_scale=0.1, input_zero_point=3), "W8A8 static"),
        (LayerPlan(weight_bits=4), "W4A8 dynamic (simulated)"),
        (LayerPlan(activation_bits=6, input_scale=0.1, input_zero_point=0), "W8A6 static (simulated)"),
    ],
)
def test_label(plan, label):
    assert str(plan) == label
    assert plan.simulated == ("simulated" in label) and plan.static == ("static" in label)


# --- recipes ------------------------------------------------------------------------------------------------


def test_config_there_and_back():
    config = PTQ4DMConfig(
        modules_to_not_convert=["*.to_q"],
        weight_bits=4,
        symmetric=True,
        first_last="keep",
        objective="percentile",
        objective_parameter=99.9,
        plan=some_plan(),
    )
    data = json.loads(config.to_json_string())
    assert data["quant_method"] == "ptq4dm" and data["method"] == "ptq4dm"
    again = QuantConfig.from_dict(data)
    assert type(again) is PTQ4DMConfig and again == config
    assert again.plan == some_plan() and again.modules_to_not_convert == ("*.to_q",)
    assert "percentile" in repr(config)


def test_method_chooses_the_class():
    assert type(QuantConfig.from_dict({"method": "rtn", "activations": "dynamic"})) is RTNConfig
    config, unused = PTQ4DMConfig.from_dict({"objective": "mse"}, return_unused_kwargs=True)
    assert config == PTQ4DMConfig(objective="mse") and unused == {}


def test_summary_names_what_was_changed():
    assert RTNConfig().summary() == {"method": "rtn"}
    config = PTQ4DMConfig(weight_bits=6, plan=some_plan(), calibration="somewhere")
    assert config.summary() == {"method": "ptq4dm", "weight_bits": 6}
    assert LUTGEMMConfig(group_size=None).summary() == {"method": "lutgemm", "group_size": None}


def test_needs_calibration():
    assert RTNConfig().needs_calibration and not RTNConfig(activations="dynamic").needs_calibration


@pytest.mark.parametrize(
    "data, word",
    [
        ({"method": "magic"}, "magic"),
        ({}, "unknown"),
        ({"method": "rtn", "weigth_bits": 4}, "weigth_bits"),
        ({"method": "rtn", "objective": "mse"}, "objective"),
        ({"method": "ptq4dm", "objective": "best"}, "best"),
        ({"method": "rtn", "plan": {"layers": {}}}, "plan"),
    ],
)
def test_wrong_entries(data, word):
    with pytest.raises(UserError, match=word):
        QuantConfig.from_dict(data)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"weight_bits": 9}, "weight_bits"),
        ({"weight_bits": 1}, "weight_bits"),
        ({"activation_bits": 4.0}, "activation_bits"),
        ({"activations": "adaptive"}, "adaptive"),
        ({"first_last": "int16"}, "int16"),
        ({"objective": "best"}, "best"),
        ({"objective": "percentile", "objective_parameter": 101}, "101"),
        ({"objective": "percentile", "objective_parameter": 50}, "50"),
        ({"objective_parameter": 0}, "exponent"),
        ({"objective_parameter": float("nan")}, "exponent"),
    ],
)
def test_wrong_options(options, word):
    with pytest.raises(UserError, match=word):
        PTQ4DMConfig(**options)


def test_equal_configs_are_equal():
    assert PTQ4DMConfig() == PTQ4DMConfig() != replace(PTQ4DMConfig(), weight_bits=4)


# --- values from outside ------------------------------------------------------------------------------------

SVDQ = {"format": "svdq", "alpha": 0.5, "beta": 0.5}
SPLIT = {"format": "svdq-split", "inputs": [64, 64], "parts": [SVDQ, SVDQ]}


@pytest.mark.parametrize(
    "choices, words",
    [
        ({"format": "int8", "weight_bits": "8"}, "weight_bits must be a whole number; got '8'"),
        ({"format": "int8", "weight_bits": True}, "whole number; got True"),
        ({"format": "int8", "activation_bits": 1}, "2 to 8 bits"),
        ({"format": "int8", "input_scale": 1e-60, "input_zero_point": 0}, "above zero, as a float32"),
        ({"format": "int8", "input_scale": 0.1}, "go together"),
        ({"format": "int8", "input_scale": 0.1, "input_zero_point": 8, "activation_bits": 4}, r"lies in \[-8, 7\]"),
        ({"format": "int8", "objective": "lp", "objective_parameter": -1}, "lp"),
        ({"format": "fp8", "input_zero_point": 0, "input_scale": 1}, "go together"),
        ({"format": "int4", "group_size": 31}, "group_size"),
        ({"format": "int4", "affine": 1}, "affine must be True or False; got 1"),
        ({**SVDQ, "rank": -1}, "rank"),
        ({**SVDQ, "rank": 2**70}, "rank"),
        ({**SVDQ, "group_size": 0}, "group_size is even"),
        ({**SVDQ, "alpha": "x"}, "alpha must be a number or None; got 'x'"),
        ({**SVDQ, "search": "magic"}, "search is one of"),
        ({**SVDQ, "adapters": {"style": [4]}}, "adapter 'style'"),
        ({**SVDQ, "adapters": {"style": [4, float("inf")]}}, "adapter 'style'"),
        ({**SVDQ, "lender": "nowhere"}, "nothing to lend"),
        ({**SVDQ, "rounding": "magic"}, "rounding 'magic' is unknown"),
        ({**SPLIT, "inputs": [128]}, "ranges of inputs"),
        ({**SPLIT, "inputs": [64, -64]}, "ranges of inputs"),
        ({**SPLIT, "inputs": [64, 64.0]}, "inputs must be a list of whole numbers"),
        ({**SPLIT, "parts": [SVDQ, {**SVDQ, "rank": -1}]}, "rank"),
        ({**SPLIT, "parts": [SVDQ, {**SVDQ, "lender": "x"}]}, "neither a lender"),
        ({**SPLIT, "parts": 5}, "cannot be read"),
        ({"format": "nvfp4", "rank": -1}, "rank"),
        ({"format": ["int8"]}, "format"),
        ({}, "format"),
        (None, "no object"),
    ],
)
def test_choices_out_of_their_type_or_range(choices, words, tmp_path):
    """In a plan by itself, and in one of several."""
    (tmp_path / "plan.json").write_text(json.dumps({"method": "rtn", "layers": {"to_q": choices}}))
    with pytest.raises(DamagedFile, match=words):
        Plan.load(tmp_path / "plan.json")
    (tmp_path / "several.json").write_text(
        json.dumps({"components": {"unet": {"method": "rtn", "layers": {"to_q": choices}}}})
    )
    with pytest.raises(DamagedFile, match=words):
        load_plans(tmp_path / "several.json")


@pytest.mark.parametrize(
    "layers",
    [
        {"a": {**SVDQ, "shift": float("nan")}},
        {"a": {**SVDQ, "seed": -float("inf")}},
        {"a": {**SVDQ, "rounding": 3}},
        {"a": {**SVDQ, "activation": True}},
        {"a": {"format": "int4", "weight_bits": 10**30}},
        {"a": {"format": "int4", "activation_bits": 9}},
        {"a": {"format": "row-mix", "wide": [10**30, 1]}},
        {"a": {"format": "progressive", "rotation": 3}},
        {"a": {"format": "progressive", "group_size": 16}},
        {"a": {"format": "int8", "input_scale": -0.0, "input_zero_point": 0}},
        {"a": {**SVDQ, "lender": "nowhere"}},
        {"a": {"format": "nvfp4", "rank": -1}},
        {"a": {**SPLIT, "inputs": [128]}},
    ],
)
@pytest.mark.parametrize("method", ["svdquant", "rtn"])
def test_the_plan_inside_a_recipe_is_checked_with_it(layers, method):
    """In a config.json it lies there. A plan that is only made from a dict is checked by who follows or loads it."""
    plan = {"method": method, "layers": layers}
    with pytest.raises(DamagedFile, match="of the plan|the plan is damaged"):
        QuantConfig.from_dict({"method": method, "plan": plan})
    made = Plan.from_dict(plan)
    with pytest.raises(DamagedFile, match="of the plan|the plan is damaged"):
        made.check()


def test_choices_of_all_formats_that_are_in_order(tmp_path):
    layers = {
        "a": {
            "format": "int8",
            "objective": "lp",
            "objective_parameter": 2.4,
            "input_scale": 1,
            "input_zero_point": 0,
        },
        "b": {"format": "fp8", "input_scale": 0.5},
        "c": {"format": "int4", "group_size": 128, "affine": True},
        "d": SVDQ,
        "e": {**SVDQ, "lender": "d", "shift": None, "adapters": {"style": [4, 1]}},
        "f": SPLIT,
        "g": {"format": "nvfp4", "rank": 0},
        "h": {"format": "row-mix", "weight_bits": 2, "wide": [0, 7]},
        "i": {"format": "progressive", "group_size": 64, "rotation": 128},
        "j": {"format": "int4", "group_size": 128, "affine": True, "activation_bits": 16},
        "k": {"format": "bcq", "weight_bits": 1, "group_size": 32, "rounds": 0, "uniform": True},
    }
    (tmp_path / "plan.json").write_text(json.dumps({"method": "rtn", "layers": layers}))
    plan = Plan.load(tmp_path / "plan.json")
    assert QuantConfig.from_dict({"method": "rtn", "plan": plan.to_dict()}).plan == plan
    assert [one.format for one in plan.layers.values()] == [one["format"] for one in layers.values()]


def test_choices_of_another_class():
    with pytest.raises(UserError, match="format 'int4' takes a Int4Plan, not a LayerPlan"):
        Plan("rtn", {"x": LayerPlan("int4")}).check()


@pytest.mark.parametrize("text", ["[" * 100000, '{"a": ' + "9" * 5000 + "}", "\ufeff{}", '{"a": 1, "a": 2}', "5"])
def test_texts_that_are_no_plans(text, tmp_path):
    (tmp_path / "plan.json").write_text(text, encoding="utf-8")
    for load in (Plan.load, load_plans):
        with pytest.raises(DamagedFile, match="plan.json"):
            load(tmp_path / "plan.json")
