"""Plans whose blocks are trained: followed, saved, interrupted and gone on with, damaged, refused."""

import copy
import json

import pytest
import torch

import ptq4dm
import trained
from helpers import same
from ptq4dm.errors import UserError
from ptq4dm.layers.plan import LayerPlan
from ptq4dm.quantization import packing
from ptq4dm.quantization.planning import check_plan
from ptq4dm.reconstruction import block
from trained import FEW, calls_of, codes, model_of, plan_of

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = ptq4dm.GradPTQConfig(**FEW)


@pytest.fixture(scope="module")
def dit():
    """(float model, its calls, the model quantized with CONFIG)."""
    model = model_of("small")
    calls, whole = calls_of(model, 3), copy.deepcopy(model)
    ptq4dm.quantize(whole, CONFIG, calls)
    return model, calls, whole


def followed(dit, plan, **options):
    model = copy.deepcopy(dit[0])
    ptq4dm.quantize(model, ptq4dm.GradPTQConfig(**FEW | options, plan=plan), dit[1])
    return model


def test_a_completed_plan_gives_the_same_codes(dit, tmp_path):
    """Ranges were trained: the plan says where they began, and that is where following it begins."""
    plan = plan_of(dit[2])
    trained_ranges = {name: [one.input_scale, one.input_zero_point] for name, one in plan.layers.items()}
    assert plan.starts.keys() == plan.layers.keys() and plan.learning.steps == FEW["steps"]
    assert sum(plan.starts[name] != grid for name, grid in trained_ranges.items()) > 8
    plan.save(tmp_path / "plan.json")
    again = followed(dit, ptq4dm.Plan.load(tmp_path / "plan.json"))
    assert same(codes(again), codes(dit[2])) and plan_of(again) == plan
    assert same(codes(followed(dit, plan, seed=5, num_tuples=1)), codes(dit[2]))  # the plan's own count
    plan.packing["seed"] = 5
    assert not same(codes(followed(dit, plan)), codes(dit[2]))
    plan.packing["magic"] = 1
    with pytest.raises(UserError, match="packing has no option 'magic'"):
        followed(dit, plan)


def test_a_saved_model_computes_the_same_to_the_bit(dit, tmp_path):
    dit[2].save_pretrained(tmp_path)
    loaded = type(dit[2]).from_pretrained(tmp_path)
    assert same(codes(loaded), codes(dit[2])) and torch.equal(trained.run(loaded), trained.run(dit[2]))
    assert plan_of(loaded) == plan_of(dit[2]) and ptq4dm.quantization_config(loaded).train == CONFIG.train


def interrupt_at(monkeypatch, number):
    """Ctrl-C at the training of the block of this number."""
    run, count = block.BlockTraining.run, []

    def stop(self):
        count.append(self)
        if len(count) == number:
            raise KeyboardInterrupt
        return run(self)

    monkeypatch.setattr(block.BlockTraining, "run", stop)
    return count


def test_it_goes_on_where_it_was_interrupted(dit, tmp_path, monkeypatch):
    model = copy.deepcopy(dit[0])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 3)
        ptq4dm.quantize(model, CONFIG, dit[1], checkpoint=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    with monkeypatch.context() as patch:
        count = interrupt_at(patch, 0)
        report = ptq4dm.quantize(model, CONFIG, dit[1], checkpoint=tmp_path)
    blocks = len(list(tmp_path.glob("*.safetensors")))
    assert len(count) == blocks - 2 and same(codes(model), codes(dit[2]))
    assert plan_of(model) == plan_of(dit[2])  # what was kept says where it began, too
    assert all("flips" in row for row in report.layers) and "trained: " in report.table()
    again = copy.deepcopy(dit[0])  # all of it is there
    monkeypatch.setattr(block.BlockTraining, "run", lambda self: pytest.fail("a block is trained again"))
    ptq4dm.quantize(again, CONFIG, dit[1], checkpoint=tmp_path)
    assert same(codes(again), codes(dit[2]))


def test_a_folder_of_other_options_is_refused(dit, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2)
        ptq4dm.quantize(copy.deepcopy(dit[0]), CONFIG, dit[1], checkpoint=tmp_path)
    monkeypatch.setattr(block.BlockTraining, "run", lambda self: pytest.fail("work before the refusal"))
    for other in ({"steps": 13}, {"learning_rate": 0.02}, {"seed": 1}, {"train": ("rounding",)}):
        with pytest.raises(UserError, match="holds the blocks of another quantization"):
            ptq4dm.quantize(copy.deepcopy(dit[0]), ptq4dm.GradPTQConfig(**FEW | other), dit[1], checkpoint=tmp_path)


NAME = "transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data["learning"].update(steps=0),
        lambda data: data["learning"].update(steps="many"),
        lambda data: data["learning"].update(more=1),
        lambda data: data["learning"].update(loss="x"),
        lambda data: data["learning"].update(train=[]),
        lambda data: data["learning"].update(train=[1]),
        lambda data: data["learning"].update(train="rounding"),
        lambda data: data["learning"].update(learning_rate="quick"),
        lambda data: data["learning"].update(time_weights=[-1.0]),
        lambda data: data["learning"].update(variable=3),
        lambda data: data.update(learning=[]),
        lambda data: data.update(learning="gptq"),
        lambda data: data.update(starts=[]),
        lambda data: data.update(starts=None),
        lambda data: data["starts"].update({"nobody": [1.0, 0]}),
        lambda data: data["starts"].update({NAME: None}),
        lambda data: data["starts"].update({NAME: [1.0]}),
        lambda data: data["starts"].update({NAME: [1.0, 500]}),
        lambda data: data["starts"].update({NAME: [-1.0, 0]}),
        lambda data: data["starts"].update({NAME: ["a", 0]}),
        lambda data: data["starts"].update({NAME: [1.0, 0.5]}),
        lambda data: data["starts"].update({NAME: [None, None]}),
        lambda data: data["starts"].update({NAME: {}}),
    ],
)
def test_damaged_plans_are_one_sentence(dit, tmp_path, damage):
    data = plan_of(dit[2]).to_dict()
    damage(data := json.loads(json.dumps(data)))
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(UserError) as error:
        ptq4dm.Plan.load(tmp_path / "plan.json")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("which", ["one", "all"])
@pytest.mark.parametrize("format", ["fp8", "svdq"])
def test_formats_that_cannot_be_trained_are_refused_before_any_work(dit, format, which, monkeypatch):
    """Also beside layers that are trained: no gradient passes them."""
    plan = plan_of(dit[2])
    for name in [NAME] if which == "one" else plan.layers:
        if format == "fp8":
            plan.layers[name] = LayerPlan("fp8", rounding="nearest")
        else:
            plan.layers[name] = packing.FORMATS[format].plan(rounding="gptq")
        plan.starts.pop(name)
    if which == "all":
        next(iter(plan.layers.values())).rounding = "learned"
    monkeypatch.setattr(packing, "Evidence", lambda *_, **__: pytest.fail("work before the refusal"))
    for work in (lambda: check_plan(dit[0], plan), lambda: followed(dit, plan)):
        with pytest.raises(UserError, match=f"format '{format}'.*(no gradient passes|does not serve)") as error:
            work()
        assert "\n" not in str(error.value)


def test_recipes_that_cannot_be_are_refused():
    for kind in (ptq4dm.GradPTQConfig, ptq4dm.RTNConfig):
        with pytest.raises(UserError, match="rounding 'learned' does not serve format 'fp8'"):
            kind(weight_bits=8, format="fp8", rounding="learned")
    with pytest.raises(UserError, match="take format='int8', or, with weight_bits=8 and .*roundings gptq, nearest"):
        ptq4dm.GradPTQConfig(format="fp8")  # not of its weight_bits, which nobody gave
    with pytest.raises(UserError, match="give weight_bits=8 with it, or take format='int8'"):
        ptq4dm.GradPTQConfig(format="fp8", rounding="nearest")
    assert ptq4dm.GradPTQConfig(format="fp8", rounding="nearest", weight_bits=8).learning() is None
    with pytest.raises(UserError, match="steps"):
        ptq4dm.GradPTQConfig(steps=0)
    with pytest.raises(UserError, match="loss must be one of"):
        ptq4dm.PDQuantConfig(loss="x")


def test_without_calibration_it_says_so(dit):
    for activations in ("static", "dynamic"):
        with pytest.raises(UserError, match="calibration"):
            ptq4dm.quantize(copy.deepcopy(dit[0]), ptq4dm.GradPTQConfig(**FEW, activations=activations))
