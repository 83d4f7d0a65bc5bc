"""SVDQuant as a recipe: plans that repeat to the bit, roles, what it refuses; and its layers in other hands."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import denoisers
import ptq4dm
from helpers import same
from ptq4dm import Plan, RTNConfig, SVDQuantConfig, UserError
from ptq4dm.calibration.evidence import Evidence, calibration_batches
from ptq4dm.calibration.record import replay
from ptq4dm.calibration.store import fingerprint
from ptq4dm.layers.registry import Problem
from ptq4dm.layers.view import find_layers
from ptq4dm.layers.w8a8 import Int8Linear
from ptq4dm.quantization.diffusers_bridge import quantization_config
from ptq4dm.quantization.quantize import make_plan
from ptq4dm.quantization.recipe import QuantConfig
from ptq4dm.quantization.report import kernel_report
from ptq4dm.svdquant.group import Group, search, split_weight, squared_error
from ptq4dm.svdquant.layers.plan import SVDQPlan
from ptq4dm.svdquant.packing import _module_error as module_error
from ptq4dm.svdquant.packing import build_layer
from ptq4dm.transforms.smooth import candidates

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = SVDQuantConfig(rank=4, num_tuples=4, smoothing=0.5, rounding="nearest", refinements=0)
QKV = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
SHIFTED = "transformer_blocks.0.ff.net.2"
EMBEDDED = "transformer_blocks.0.norm1.linear"


@pytest.fixture
def flux():
    """(a model in full precision, its store)"""
    return denoisers.pair("flux")


@pytest.fixture
def made():
    """(a quantized model, its store, its report). Tests must not change it."""
    return denoisers.quantized("flux")


@pytest.fixture
def recipe():
    """What it was made with."""
    return denoisers.CONFIG


def plan_of(model):
    return quantization_config(model).plan


# --- plans --------------------------------------------------------------------------------------------------


def test_the_same_recipe_gives_the_same_codes(made, flux, recipe):
    model, store = flux
    ptq4dm.quantize(model, recipe, store)
    assert same(model, made[0]) and plan_of(model) == plan_of(made[0])
    assert recipe.plan is None  # and serves for the next model


def test_the_plan_holds_what_was_found(made, flux, recipe):
    open_plan, plan = make_plan(flux[0], recipe, flux[1]), plan_of(made[0])
    assert open_plan.layers.keys() == plan.layers.keys()
    for name, choice in plan.layers.items():
        before = open_plan.layers[name]
        if before.activation == "int4":
            assert before.alpha is before.beta is before.shift is None
            assert (choice.alpha, choice.beta) in candidates(10) and choice.shift in (0.0, 0.171875)
            assert replace(choice, alpha=None, beta=None, shift=None) == before
        else:
            assert choice == before
    assert plan.layers[SHIFTED].shift == 0.171875 and plan.layers[QKV[0]].shift == 0
    assert len({(c.alpha, c.beta) for c in plan.layers.values()}) > 3
    assert len({(c.alpha, c.beta) for c in (plan.layers[name] for name in QKV)}) == 1


def through_a_file(model, folder, recipe):
    plan_of(model).save(folder / "plan.json")
    return replace(recipe, plan=Plan.load(folder / "plan.json"))


def through_config_json(model, folder, recipe):
    model.save_pretrained(folder)  # diffusers sorts what it writes
    config = QuantConfig.from_dict(json.loads((folder / "config.json").read_text())["quantization_config"])
    assert list(config.plan.layers) == sorted(config.plan.layers) != list(plan_of(model).layers)
    return config


@pytest.mark.parametrize("way", [through_a_file, through_config_json])
def test_following_a_plan_gives_the_same_codes(way, made, flux, recipe, tmp_path):
    config = way(made[0], tmp_path, recipe)
    before = copy.deepcopy(config.plan)
    ptq4dm.quantize(flux[0], config, flux[1])
    assert same(flux[0], made[0]) and config.plan == before


def test_following_an_open_plan_searches_as_the_recipe_does(made, flux, recipe):
    plan = make_plan(flux[0], recipe, flux[1])
    ptq4dm.quantize(flux[0], replace(recipe, plan=plan), flux[1])
    assert same(flux[0], made[0])


def test_every_choice_of_a_plan_reaches_the_layer(flux):
    model, store = flux
    plan = make_plan(model, QUICK, store)
    changes = {"rank": 2, "alpha": 0.9, "beta": 0.0, "shift": 0.28125, "rounding": "gptq", "refinements": 3}
    plan.layers = {SHIFTED: replace(plan.layers[SHIFTED], shift=0.0)}

    def layer(**change):
        copied, one = copy.deepcopy(model), copy.deepcopy(plan)
        one.layers[SHIFTED] = replace(one.layers[SHIFTED], **change)
        ptq4dm.quantize(copied, replace(QUICK, plan=one), store)
        return copied.get_submodule(SHIFTED)

    first = layer()
    assert all(not same(layer(**{name: value}), first) for name, value in changes.items())
    assert same(layer(), first)


def test_tuples_are_taken_evenly(made):
    calls = made[1].calls
    rows = torch.cat([part.timestep for part in calibration_batches(calls, 2)])
    assert torch.equal(rows, calls.timestep[[0, -1]])
    assert sum(len(part) for part in calibration_batches(calls, 99)) == 4


def test_the_report_tells_what_each_part_is_worth(made):
    rows = [row for row in made[2].layers if "A4" in row["format"]]
    stages = ("sqnr_rounded", "sqnr_smoothed", "sqnr_branched", "sqnr_final")
    means = [sum(row[stage] for row in rows) / len(rows) for stage in stages]
    assert all(later > earlier + 0.5 for earlier, later in zip(means, means[1:], strict=False)), means
    shapes = {row["layer"]: row["shape"] for row in kernel_report(made[0])}
    assert shapes[SHIFTED] == [64, 256]


# --- the search ---------------------------------------------------------------------------------------------


def test_smoothing_is_judged_by_what_the_module_would_give(flux):
    """The error that the search is told is that of the module with the quantized layers in it."""
    model, store = flux
    name, layers = "transformer_blocks.0.attn", [model.get_submodule(n) for n in QKV]
    rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.cat([layer.weight.detach() for layer in layers])
    group = Group(weight, rows, rows.abs().amax(0), SVDQPlan(rank=4, alpha=0.5, beta=0.5), torch.float16)
    split = split_weight(group, group.divisors(0.5, 0.5))
    evidence = Evidence(model, QKV[:1], [name], [store.calls])
    problem = Problem({n: model.get_submodule(n) for n in QKV}, {n: group.plan for n in QKV}, evidence, name)
    attention, ((args, kwargs),) = model.get_submodule(name), evidence.calls(name)
    with torch.no_grad():
        exact = attention(*args, **kwargs)
        error = module_error(problem, group)(split)
        assert all("forward" not in vars(layer) for layer in layers)
        for i, layer in enumerate(layers):
            rows = slice(64 * i, 64 * i + 64)
            setattr(attention, f"to_{'qkv'[i]}", build_layer(layer, group.plan, split, rows, torch.float16, None))
        found = attention(*args, **kwargs)
    assert error == pytest.approx(sum(squared_error(a, b) for a, b in zip(exact, found, strict=True)), rel=1e-3)
    assert error > 0


@pytest.mark.parametrize("smoothing", ["search", "exhaustive"])
def test_layers_that_share_are_judged_together(smoothing, monkeypatch):
    model, store = denoisers.pair("dit")
    names, tried = [f"transformer_blocks.0.attn1.to_{x}" for x in "qkv"], []

    def spy(group, exhaustive, module_error):
        def counted(split):
            tried.append(split.smooth)
            return module_error(split)

        assert len(group.weight) == 3 * 64 and exhaustive == (smoothing == "exhaustive")
        return search(group, exhaustive, counted)

    monkeypatch.setattr("ptq4dm.svdquant.packing.search", spy)
    roles = {name: "w4" for name in names} | {"*": "keep"}
    ptq4dm.quantize(model, replace(QUICK, smoothing=smoothing, roles=roles), store)
    assert len(tried) == (39 if smoothing == "exhaustive" else 3)
    layers = [model.get_submodule(name) for name in names]
    assert any(torch.equal(layers[0].smooth.float(), smooth) for smooth in tried)
    assert all(torch.equal(layer.smooth, layers[0].smooth) for layer in layers)


def test_dropout_has_no_say():
    """A model in training mode is quantized as the same model in evaluation mode, and stays in its mode."""
    (evaluated, store), (trained, _) = denoisers.pair("dit"), denoisers.pair("dit")
    only_qkv = replace(QUICK, smoothing="exhaustive", roles={"*attn1.to_?": "w4", "*": "keep"})
    for model in (evaluated, trained):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        model.transformer_blocks[0].attn1.register_module("noise", nn.Dropout(0.5))
        model.transformer_blocks[0].attn1.register_forward_hook(lambda m, _, y: m.noise(y))
    trained.train().transformer_blocks[1].eval()
    before = {name: module.training for name, module in trained.named_modules()}
    for model in (evaluated, trained):
        ptq4dm.quantize(model, only_qkv, store)
    assert same(trained, evaluated) and plan_of(trained) == plan_of(evaluated)
    assert {name: module.training for name, module in trained.named_modules()} == before


def test_smoothing_by_hand(flux, recipe):
    model, store = flux
    for smoothing, expected in ((0.25, (0.25, 0.75)), ("none", (0.0, 0.0)), (1, (1.0, 0.0))):
        plan = make_plan(model, replace(recipe, smoothing=smoothing), store)
        assert {(c.alpha, c.beta) for c in plan.layers.values() if c.activation == "int4"} == {expected}


def test_wider_activations_are_better(flux):
    exact, errors = replay(*(flux[0], flux[1].calls)), {}
    for activations in ("int4", "fp8", "int8"):
        model = copy.deepcopy(flux[0])
        ptq4dm.quantize(model, replace(QUICK, activations=activations, rank=16), flux[1])
        choice = plan_of(model).layers[SHIFTED]
        assert choice.activation == activations and choice.shift == 0
        errors[activations] = (replay(model, flux[1].calls) - exact).norm() / exact.norm()
    assert 0.1 < errors["int8"] < errors["fp8"] < 0.95 * errors["int4"] < 0.25


# --- roles --------------------------------------------------------------------------------------------------


def test_roles_by_hand(flux, monkeypatch):
    monkeypatch.setattr("ptq4dm.ranges.clipping.ACTIVATION_STEPS", 6)  # a coarser search for 8-bit ranges
    model, store = flux
    roles = {
        QKV[0]: "weight-only", "*.attn.to_k": "keep", "context_embedder": "w4",
        "*norm1.linear": "int8", "*ff*": "int8",
    }  # fmt: skip
    ptq4dm.quantize(model, replace(QUICK, roles=roles), store)
    plan = plan_of(model)
    assert str(plan.layers[QKV[0]]) == "W4A16 g64" and QKV[1] not in plan.layers
    assert plan.layers[QKV[2]].lender == "" and plan.layers[QKV[2]].activation == "int4"  # not the weight-only one's
    assert str(plan.layers["context_embedder"]) == "W4A4 g64 r4"
    assert str(plan.layers[EMBEDDED]) == "W8A8 dynamic" and str(plan.layers[SHIFTED]) == "W8A8 static"
    assert isinstance(model.get_submodule(EMBEDDED), Int8Linear)
    assert "x_embedder" not in plan.layers
    assert replay(model, store.calls).isfinite().all()


def test_the_first_pattern_that_fits_counts(flux):
    plan = make_plan(flux[0], replace(QUICK, roles={"*to_q": "int8", "*attn*": "keep"}), flux[1])
    names = [name for name in plan.layers if "attn" in name]
    assert names and all(name.endswith("to_q") for name in names)


def test_layers_with_one_input_but_in_another_order_of_calls(flux):
    """The first in the model's order lends, whoever is called first; and what is kept lends nothing."""
    plan = make_plan(flux[0], replace(QUICK, roles={"single*proj_mlp": "keep"}), flux[1])
    lenders = {name: c.lender for name, c in plan.layers.items() if name.startswith("single") and "attn" in name}
    first = "single_transformer_blocks.0.attn.to_q"
    assert set(lenders.values()) == {"", first} and lenders[first] == "" and len(lenders) == 3


def test_more_ranks_than_a_layer_has(tmp_path):
    model, store = denoisers.pair("dit")
    exact = replay(model, store.calls)
    report = ptq4dm.quantize(model, replace(QUICK, rank=100, roles={"*norm1*": "keep"}), store)
    assert "layers have: their branch has 64, the whole weight" in report.table()
    assert {c.rank for c in plan_of(model).layers.values() if getattr(c, "activation", "") == "int4"} == {64}
    error = (replay(model, store.calls) - exact).norm() / exact.norm()
    assert error < 2e-3  # the branch is the weight
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(replay(again, store.calls), replay(model, store.calls))


# --- what it refuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": -1}, "rank must be a whole number from 0 to 1024; got -1."),
        ({"rank": 2.5}, "rank must be"),
        ({"group_size": 48}, "group_size must be one of 16, 32, 64, 128; got 48."),
        ({"activations": "static"}, "activations must be one of int4, int8, fp8; got 'static'."),
        ({"activations": "none"}, "activations must be"),
        ({"rounding": "up"}, "rounding 'up' is unknown"),
        ({"smoothing": "some"}, "smoothing must be search, exhaustive, none or a number in \\[0, 1\\]; got 'some'."),
        ({"smoothing": 1.5}, "smoothing must be"),
        ({"refinements": -1}, "refinements must not be negative"),
        ({"num_tuples": 0}, "num_tuples must be at least 1"),
        ({"roles": {"*": "w3"}}, "unknown role 'w3'; choose from w4, weight-only, int8, keep."),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        SVDQuantConfig(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"roles": {"blocks.*": "keep"}}, "'blocks.\\*' in roles names no layer"),
        ({"roles": {"x_embedder": "w4"}}, "'x_embedder' cannot be w4: it does not divide into groups"),
        ({"roles": {"*": "keep"}}, "no layer of the model can take 4 bits in groups of 64"),
        ({"modules_to_not_convert": ("nothing",)}, "'nothing' in modules_to_not_convert"),
    ],
)
def test_roles_that_do_not_fit(flux, options, message):
    with pytest.raises(UserError, match=message):
        ptq4dm.quantize(flux[0], replace(QUICK, **options), flux[1])


def test_layers_that_calibration_does_not_reach():
    model, store = denoisers.pair("dit")
    model.transformer_blocks[0].unused, model.transformer_blocks[0].idle = nn.Linear(64, 64), nn.Linear(64, 64)
    store = replace(store, fingerprint=fingerprint(model))
    name = "transformer_blocks.0.unused"
    plan = make_plan(model, QUICK, store)
    assert name not in plan.layers
    with pytest.raises(UserError, match=f"'{name}' cannot be w4: it was not called in calibration"):
        make_plan(model, replace(QUICK, roles={name: "w4"}), store)
    for alpha in (None, 0.5):
        choice = SVDQPlan(alpha=alpha, beta=alpha, rank=4)
        plan.layers = {name: choice, name.replace("unused", "idle"): replace(choice, lender=name)}
        with pytest.raises(UserError, match=f"'{name}' of the plan was not called"):
            ptq4dm.quantize(model, replace(QUICK, plan=plan), store)


def test_it_needs_a_store(flux, made, recipe):
    words = "SVDQuantConfig needs calibration: pass a store from ptq4dm.collect\\(pipe\\)"
    with pytest.raises(UserError, match=words + ", or choose evidence='calls'.$"):
        ptq4dm.quantize(flux[0], recipe)
    with pytest.raises(UserError, match=words + ", or choose evidence='calls' or evidence='none'.$"):
        ptq4dm.quantize(flux[0], ptq4dm.SVDQuantConfig())
    with pytest.raises(UserError, match="needs a calibration store here, also to follow a plan"):
        ptq4dm.quantize(flux[0], replace(recipe, plan=plan_of(made[0])))


def test_another_method_follows_its_plan_to_the_bit(flux, made, recipe):
    """One driver packs for all methods: the plan says what to do, not who made it."""
    model, store = flux
    ptq4dm.quantize(model, RTNConfig(plan=plan_of(made[0]), num_tuples=recipe.num_tuples), store)
    assert same(model, made[0])


def test_a_store_of_other_weights(flux, made, recipe):
    model, store = flux
    with torch.no_grad():
        model.get_submodule(SHIFTED).weight.mul_(2)
    for config in (QUICK, replace(recipe, plan=plan_of(made[0]))):
        with pytest.raises(UserError, match="another model"):
            ptq4dm.quantize(model, config, store)


def test_weights_that_are_no_numbers_are_named(flux):
    model, store = flux
    with torch.no_grad():
        model.get_submodule(QKV[1]).weight[0, 1] = float("nan")
    with pytest.raises(UserError, match=f"'{QKV[1]}' holds NaN"):
        ptq4dm.quantize(model, QUICK, store)


def test_damaged_plans(flux, made, recipe):
    def damaged(change):
        plan = copy.deepcopy(plan_of(made[0]))
        change(plan.layers)
        with pytest.raises(UserError, match="the plan is damaged"):
            ptq4dm.quantize(flux[0], replace(recipe, plan=plan), flux[1])

    damaged(lambda layers: layers.pop(QKV[0]))  # two layers borrow from it
    damaged(lambda layers: layers.update({QKV[2]: replace(layers[QKV[2]], lender=QKV[1])}))  # which borrows itself


@pytest.mark.parametrize("how", ["recipe", "plan", "dict"])
def test_it_cannot_pack_while_loading(how, made, flux, tmp_path, recipe):
    flux[0].save_pretrained(tmp_path)
    config = {
        "recipe": recipe,
        "plan": replace(recipe, plan=plan_of(made[0])),
        "dict": {"quant_method": "ptq4dm", "method": "svdquant", "rank": 8},
    }[how]
    with pytest.raises(UserError, match="cannot pack them while a model loads; load it in full precision, then"):
        type(flux[0]).from_pretrained(tmp_path, quantization_config=config)


def test_quantized_layers_are_not_found_again(made, flux):
    left = {view.name for view in find_layers(flux[0])} - set(plan_of(made[0]).layers)
    assert {view.name for view in find_layers(made[0])} == left
    with pytest.raises(UserError, match="quantized already"):
        ptq4dm.quantize(made[0], QUICK, made[1])
