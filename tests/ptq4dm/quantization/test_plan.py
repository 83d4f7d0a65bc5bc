"""Plans and recipes: JSON there and back, labels, and one clear sentence for whatever is wrong."""

import json
from dataclasses import replace

import pytest

from ptq4dm import Plan, PTQ4DMConfig, QuantConfig, RTNConfig, UserError
from ptq4dm.layers.plan import LayerPlan


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
