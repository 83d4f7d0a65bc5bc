"""Training of blocks, from a recipe to codes: on UNets and transformers, the same for the same seed."""

import copy
from dataclasses import dataclass

import pytest
import torch

import denoisers
import ptq4dm
import trained
from helpers import same
from ptq4dm.errors import UserError
from ptq4dm.layers.base import is_quantized
from ptq4dm.layers.plan import Int4Plan
from ptq4dm.quantization import training
from ptq4dm.quantization.recipe import METHODS, QuantConfig
from ptq4dm.rounding.learned import Learning
from ptq4dm.rounding.optimizers import OPTIMIZERS, Choice
from ptq4dm.rounding.variables import VARIABLES, StraightThrough
from trained import blocks, calls_of, codes, gain, model_of, plan_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dit():
    """(model, its calls)."""
    model = model_of("small")
    return model, calls_of(model, 4)


def made(dit, **options):
    """(report, codes, model) of a fresh copy."""
    model = copy.deepcopy(dit[0])
    return *trained.trained(model, dit[1], **options), model


@pytest.mark.parametrize("kind", ["unet", "sd"])
def test_the_error_of_a_unets_blocks_falls(kind):
    model = model_of(kind)
    report, _ = trained.trained(model, calls_of(model, 2), step_tuples=1, steps=12)
    assert gain(report) < 0.97 and len(blocks(report)) >= 9
    assert all(is_quantized(model.get_submodule(row["layer"])) and row["flips"] < 0.5 for row in report.layers)
    assert sum(row["flips"] for row in report.layers) > 0.02 * len(report.layers)
    assert "a block's error is 0." in report.table()


@pytest.mark.parametrize("kind", ["dit", "sd3", "flux"])
def test_the_error_of_a_transformers_blocks_falls(kind):
    """SD3's and FLUX's blocks give two tensors."""
    model, store = denoisers.pair(kind)
    config = ptq4dm.GradPTQConfig(num_tuples=8, steps=8, step_tuples=4, start="nearest", learning_rate=0.02)
    report = ptq4dm.quantize(model, config, store)
    assert gain(report) < 0.85


def test_a_seed_gives_its_codes_and_another_others(dit):
    one, again, other = (made(dit, seed=seed)[1] for seed in (0, 0, 1))
    assert same(one, again)
    differ = [name for name in one if name.endswith("qweight") and not torch.equal(one[name], other[name])]
    assert len(differ) > 5


def test_the_global_generator_has_no_say_and_is_left_alone(dit):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one = made(dit, augmentation="noise", loss="fisher", steps=3)[1]
    assert torch.equal(torch.rand(3), expected)
    assert same(one, made(dit, augmentation="noise", loss="fisher", steps=3)[1])


def test_ranges_alone_leave_codes_nearest_and_move_grids(dit):
    report, found, model = made(dit, train=("ranges",), activation_bits=4, steps=20)  # bits where ranges matter
    nearest = copy.deepcopy(dit[0])
    config = ptq4dm.GradPTQConfig(**trained.UNTRAINED, activation_bits=4, rounding="nearest")
    ptq4dm.quantize(nearest, config, dit[1])
    expected = codes(nearest)
    assert found.keys() == expected.keys()
    moved = {name.rpartition(".")[2] for name in found if not torch.equal(found[name], expected[name])}
    assert "input_scale" in moved and moved <= {"input_scale", "input_zero_point"}
    assert all(row["flips"] == 0 for row in report.layers)


def test_training_that_makes_a_block_worse_is_left_out(dit):
    report, found, _ = made(dit, train=("rounding",), learning_rate=100.0)
    rows = [row for row in report.layers if "block_error" in row]
    assert rows and all(row["block_error"] <= row["block_error_start"] for row in rows)
    assert any(row["block_error"] == row["block_error_start"] for row in rows)


def test_rounding_alone_leaves_scales(dit):
    report, found, _ = made(dit, train=("rounding",))
    nearest = copy.deepcopy(dit[0])
    ptq4dm.quantize(nearest, ptq4dm.GradPTQConfig(**trained.UNTRAINED, rounding="nearest"), dit[1])
    expected = codes(nearest)
    moved = {name.rpartition(".")[2] for name in found if not torch.equal(found[name], expected[name])}
    assert moved == {"qweight"} and gain(report) < 0.95


def test_scales_and_biases_move_where_they_are_trained(dit):
    _, found, _ = made(dit, train=("scales", "biases"))
    nearest = copy.deepcopy(dit[0])
    ptq4dm.quantize(nearest, ptq4dm.GradPTQConfig(**trained.UNTRAINED, rounding="nearest"), dit[1])
    expected = codes(nearest)
    moved = {name.rpartition(".")[2] for name in found if not torch.equal(found[name], expected[name])}
    assert moved == {"wscales", "bias"}


@pytest.mark.parametrize(
    "options",
    [
        {"weight_bits": 3},
        {"weight_bits": 8},
        {"weight_bits": 2, "affine": True},
        {"weight_grid": "power"},
        {"average_bits": 5.0, "importance": "magnitude"},
        {"activations": "dynamic"},
        {"symmetric": True},
        {"prefix": "exact"},
        {"loss": "fisher"},
        {"loss": "cosine"},
        {"loss": "relative"},
        {"time_weights": (1.0, 3.0)},
        {"augmentation": "noise"},
        {"augmentation": "none", "moves": "wide"},
        {"unit": "layer"},
        {"start": "gptq", "learning_rate": 0.001},
        {"prediction": 1.0},
        {"correction": True, "num_tuples": 2},
        {"optimizer": "adamax"},
        {"optimizer": "signsgd"},
        {"optimizer": "sgd", "learning_rate": 1.0},
        *({"variable": kind} for kind in VARIABLES),
    ],
    ids=str,
)
def test_every_option_trains(dit, options):
    """Blocks come closer to full precision than rounded to nearest, and the model computes."""
    report, found, model = made(dit, **options)
    assert gain(report) < 1 and all(torch.isfinite(value.float()).all() for value in found.values())
    answers = trained.run(model), trained.run(dit[0])
    assert trained.distance(*answers) < (0.9 if options.get("weight_bits") == 2 else 0.5)


def test_skips_and_nested_blocks_let_the_prediction_term_through():
    """In SD's attention a layer after the transformer block is packed before it."""
    model = model_of("sd")
    report, _ = trained.trained(model, calls_of(model, 1), prediction=1.0, steps=2, num_tuples=1)
    assert gain(report) < 1.05 and len(report.layers) == 51


def test_exact_predictions_are_made_once_for_all_blocks(dit, monkeypatch):
    made_of, kept = training.predictions_of, []

    def counted(model, batches):
        kept.append(made_of(model, batches))
        return kept[-1]

    monkeypatch.setattr(training, "predictions_of", counted)
    report = made(dit, steps=2)[0]
    assert not kept and len(blocks(report)) > 2
    model = copy.deepcopy(dit[0])
    with torch.inference_mode():  # a caller's mode, in which what is made has no gradient
        trained.trained(model, dit[1], steps=2, prediction=0.5)
    assert len(kept) == 1 and sum(map(len, kept[0])) == 2 * len(dit[1])  # recorded calls are of two samples each
    assert not any(one.is_inference() or one.requires_grad for one in kept[0])


def test_groups_of_inputs_are_trained():
    model, store = denoisers.pair("dit")
    config = ptq4dm.GradPTQConfig(group_size=32, affine=True, num_tuples=4, steps=4, step_tuples=4)
    report = ptq4dm.quantize(model, config, store)
    assert gain(report) < 0.95 and plan_of(model).layers["transformer_blocks.0.attn1.to_q"].group_size == 32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_models_of_16_bits(kind, dtype):
    model = model_of(kind, dtype)
    report, found = trained.trained(model, calls_of(model, 3), loss="fisher", prediction=0.5)
    assert gain(report) < 0.95 and model.dtype == dtype
    assert all(one.dtype == dtype for name, one in found.items() if name.endswith("bias"))
    assert trained.run(model).isfinite().all()


def test_a_correction_towards_what_is_trained_on_is_refused(dit):
    with pytest.raises(UserError, match="correction would change nothing"):
        made(dit, correction=True, num_tuples=len(dit[1]))


def test_pdquant_chooses_ranges_and_trains(dit, few_looks):
    found = {}
    for rounding, correction in (("nearest", False), ("learned", False), ("learned", True)):
        model = copy.deepcopy(dit[0])
        options = trained.UNTRAINED | {"num_tuples": 2}
        if rounding == "learned":
            options = trained.FEW | options | {"correction": correction, "steps": 6}
        config = ptq4dm.PDQuantConfig(weight_bits=4, rounding=rounding, **options)
        report = ptq4dm.quantize(model, config, dit[1])
        assert ("flips" in report.layers[0]) == (rounding == "learned")
        found[rounding, correction] = codes(model)
        if rounding == "learned":
            assert plan_of(model).learning.prediction == 1.0 and len(blocks(report)) > 2
    assert not same(found["learned", False], found["learned", True])


@dataclass(repr=False)
class OwnConfig(QuantConfig, Learning):
    """A recipe that trains, as CONTRIBUTING.md says it is written."""

    method = "own"
    needs_calibration = True

    def __post_init__(self):
        super().__post_init__()
        Learning.check(self)

    def resolve(self, model, views, store):
        return {view.name: Int4Plan(rounding="learned") for view in views}

    def learning(self):
        return Learning.of(self)


def test_variables_optimizers_and_recipes_of_ones_own_train(dit, monkeypatch):
    moved = []

    class Own(StraightThrough):
        paces = {"gptq": 2.0, "nearest": 20.0}

        def project(self):
            super().project()
            moved.append(self)

    monkeypatch.setitem(VARIABLES, "own", Own)
    monkeypatch.setitem(OPTIMIZERS, "own", Choice(torch.optim.NAdam, 0.01))
    monkeypatch.setitem(METHODS, "own", OwnConfig)
    model = copy.deepcopy(dit[0])
    config = OwnConfig(variable="own", optimizer="own", steps=10, step_tuples=2, start="nearest")
    report = ptq4dm.quantize(model, config, dit[1])
    assert gain(report) < 0.95 and moved and config.learning().rate == pytest.approx(0.01 * 20)
    assert plan_of(model).learning.variable == "own"
