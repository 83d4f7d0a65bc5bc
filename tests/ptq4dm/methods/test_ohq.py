"""OHQ: formats mixed under budgets, times by a clock of the test's; saved, loaded, followed."""

import copy
from functools import partial

import pytest
import torch

import ptq4dm
from fake_clock import FakeClock
from helpers import normal, run, same
from models import plain_unet
from ptq4dm import OHQConfig, RTNConfig, UserError
from ptq4dm.budgets.candidates import recipe_of
from ptq4dm.calibration.measure import store_of
from ptq4dm.layers.plan import Plan
from ptq4dm.layers.sizes import bytes_in_16_bits, stored_bytes
from ptq4dm.layers.view import find_layers
from ptq4dm.methods import ohq
from ptq4dm.quantization.planning import make_plan

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"num_tuples": 2, "draws": 2, "rounds": 1, "timed_batch": 2, "costs": ""}
W8, W4 = "rtn activations=dynamic first_last=same", "rtn weight_bits=4 activations=dynamic first_last=same"


@pytest.fixture
def clock(monkeypatch):
    clock = FakeClock().install(monkeypatch)
    monkeypatch.setattr(ohq, "measured", partial(ohq.measured, clock=clock))
    return clock


@pytest.fixture
def unet():
    return plain_unet


@pytest.fixture
def calls(unet):
    model = unet()
    with ptq4dm.record(model) as recorded, torch.no_grad():
        for seed in range(4):
            model(normal(2, 3, 8, 8, seed=seed), 200 * seed + 20)
    return recorded


def config(**options):
    return OHQConfig(**{**FAST, "candidates": (W8, W4), **options})


def resolved(unet, calls, **options):
    model, recipe = unet(), config(**options)
    report = ptq4dm.quantize(model, recipe, calls)
    found = ptq4dm.quantization_config(model)
    return model, recipe.outcome, found, report


def test_formats_are_mixed_within_the_budget_of_bytes(unet, calls, clock):
    model, _, found, _ = resolved(unet, calls, bytes=0.52)
    whole, kinds = bytes_in_16_bits(unet()), {type(layer).__name__ for layer in found.plan.layers.values()}
    assert found.method == found.plan.method == "ohq" and kinds == {"LayerPlan", "Int4Plan"}
    assert bytes_in_16_bits(model) <= 0.52 * whole
    more, _, _, _ = resolved(unet, calls, bytes=0.7)
    assert bytes_in_16_bits(more) > bytes_in_16_bits(model)


def test_predicted_bytes_and_times_are_those_of_the_model(unet, calls, clock):
    model, outcome, found, _ = resolved(unet, calls, bytes=0.52, latency=0.7)
    table, chosen = outcome.table, outcome.allocation
    assert chosen.bytes <= 0.52 and chosen.latency <= 0.7 and chosen.latency < 1
    assert chosen.bytes == pytest.approx(bytes_in_16_bits(model) / bytes_in_16_bits(unet()), rel=1e-6)
    times = []
    for net in (model, unet()):
        start = clock.now
        with torch.no_grad():
            net(normal(2, 3, 8, 8), 20)
        times.append(clock.now - start)
    assert chosen.latency == pytest.approx(times[0] / times[1], rel=1e-6)
    assert table.step == pytest.approx(times[1] * 1e6) and set(found.plan.layers) <= set(table.layers)


def test_under_a_budget_of_time_alone_8_bits_serve_where_they_are_fastest(unet, calls, clock):
    _, outcome, found, _ = resolved(unet, calls, latency=0.75, bytes=None)
    assert {layer.format for layer in found.plan.layers.values()} == {"int8"}
    assert "8 bits are the fastest" in outcome.allocation.notes[0]


def test_where_4_bits_are_faster_a_budget_of_time_asks_for_them(unet, calls, monkeypatch):
    monkeypatch.setattr(ohq, "measured", partial(ohq.measured, clock=FakeClock().install(monkeypatch, int4=1e-9)))
    _, outcome, found, _ = resolved(unet, calls, latency=0.5, bytes=None)
    assert "int4" in {layer.format for layer in found.plan.layers.values()} and not outcome.allocation.notes


def test_a_mixed_model_saves_and_loads_and_its_plan_is_followed_to_the_bit(unet, calls, clock, tmp_path):
    model, _, found, _ = resolved(unet, calls, bytes=0.52)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert same(loaded, model) and torch.equal(run(loaded), run(model))
    found.plan.save(tmp_path / "plan.json")
    followed = unet()
    ptq4dm.quantize(followed, OHQConfig(plan=Plan.load(tmp_path / "plan.json")))
    assert same(followed, model)
    again, _, _, _ = resolved(unet, calls, bytes=0.52)
    assert same(again, model)


def test_layers_that_share_an_input_take_one_activation_format(unet, clock):
    static = "rtn first_last=same"
    model = unet(add_attention=True)
    with ptq4dm.record(model) as recorded, torch.no_grad():
        model(normal(2, 3, 8, 8), 20)
    recipe = config(candidates=(W8, W4, f"{static} weight_bits=4"), bytes=0.52)
    ptq4dm.quantize(model, recipe, recorded)
    plan, ties = ptq4dm.quantization_config(model).plan, recipe.outcome.table.ties
    shared = [[recipe.outcome.table.layers[number] for number in group] for group in ties]
    assert any({name.rpartition(".")[2] for name in group} == {"to_q", "to_k", "to_v"} for group in shared)
    for group in shared:
        assert len({name in plan.layers and plan.layers[name].static for name in group}) == 1


def test_hessian_rounding_is_a_candidate_and_keeps_its_own_options(unet, calls, clock):
    options = "weight_bits=4 activations=dynamic objective=mse num_tuples=3"
    _, _, found, _ = resolved(
        unet, calls, candidates=(W8, f"ptq4dm {options} rounding=gptq"), bytes=0.52, scale="outputs"
    )
    assert found.plan.packing == {"num_tuples": 3, "seed": 0, "prefix": "exact"}
    assert "gptq" in {layer.rounding for layer in found.plan.layers.values()}


def test_rounding_learned_layer_by_layer_is_a_candidate_and_its_plan_is_followed_to_the_bit(clock):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(2)))
    with ptq4dm.record(model) as recorded, torch.no_grad():
        for seed in range(4):
            model(normal(8, 128, seed=seed))
    learned = "ptq4dm weight_bits=4 activations=dynamic rounding=learned first_last=same num_tuples=4"
    found, again = copy.deepcopy(model), copy.deepcopy(model)
    recipe = config(candidates=(W8, learned), bytes=0.45)
    ptq4dm.quantize(found, recipe, recorded)
    assert {layer.plan.rounding for layer in found} == {"nearest", "learned"}
    plan = Plan("ohq", {name: layer.plan for name, layer in found.named_children()}, packing=recipe.packing_options())
    ptq4dm.quantize(again, OHQConfig(plan=plan), recorded)
    assert same(found, again)


def test_the_direct_way_and_noise_choose_too(unet, calls, clock):
    for options in ({"sensitivity": "direct"}, {"inputs": "noise"}, {"scale": "outputs"}):
        model, outcome, _, _ = resolved(unet, calls, bytes=0.52, **options)
        assert bytes_in_16_bits(model) <= 0.52 * bytes_in_16_bits(unet()) and outcome.allocation.error > 0


def test_bytes_of_16_bits_are_those_of_a_float16_model(unet):
    model = unet()
    ptq4dm.quantize(model, RTNConfig(activations="dynamic", weight_bits=4))
    assert bytes_in_16_bits(model) == stored_bytes(torch.nn.Module.to(model, torch.float16))


def test_svdquant_is_a_candidate_whose_groups_stay_together(clock):
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(8, 12, 12),
    ).eval()  # fmt: skip
    arguments = {
        "hidden_states": normal(1, 6, 64), "encoder_hidden_states": normal(1, 3, 64),
        "pooled_projections": normal(1, 64), "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(3, 3),
    }  # fmt: skip
    with ptq4dm.record(model) as recorded, torch.no_grad():
        model(**arguments)
    svd = "svdquant rank=8 num_tuples=1 refinements=1 activations=int8"
    recipe = config(candidates=(W8, svd), bytes=0.43)
    ptq4dm.quantize(model, recipe, recorded)
    plan = ptq4dm.quantization_config(model).plan
    kinds = {layer.format for layer in plan.layers.values()}
    assert kinds == {"int8", "svdq"}
    followers = {name: layer.lender for name, layer in plan.layers.items() if getattr(layer, "lender", "")}
    assert followers and all(plan.layers[leader].format == "svdq" for leader in followers.values())


@pytest.mark.parametrize(
    "text, words",
    [
        ("rtnn", "quantization method 'rtnn' is unknown"),
        ("rtn weight_bits", "'weight_bits' is no option; write option=value"),
        ("rtn weight_bits=40", "weight_bits must be"),
        ("rtn colour=red", "RTNConfig has no option colour"),
        ("rtn transforms=('smooth',)", "transforms, plan and modules_to_not_convert are of the whole model"),
        ("ohq", "'ohq' has no plan of its own for each layer"),
        ("gradptq", "trains whole blocks"),
        ("", "quantization method '' is unknown"),
    ],
)
def test_candidates_that_are_none(text, words):
    with pytest.raises(UserError, match=words):
        OHQConfig(candidates=(W8, text))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"bytes": None}, "give a budget"),
        ({"bytes": 0.0}, "bytes is a share of the full-precision model, above 0 and at most 1; got 0"),
        ({"bytes": 2.0}, "bytes is a share of the full-precision model, above 0 and at most 1; got 2"),
        ({"latency": 1.01}, "latency is a share of the full-precision model, above 0 and at most 1; got 1.01"),
        ({"latency": -1.0}, "latency is a share"),
        ({"share": 1.0}, "above 0 and below 1"),
        ({"sensitivity": "hessian"}, "sensitivity must be one of masked, direct"),
        ({"candidates": (W8, W8)}, "stands twice"),
        ({"candidates": "rtn"}, "candidates"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(UserError, match=words):
        OHQConfig(**options)


def test_a_store_is_needed_and_a_budget_that_can_be_kept(unet, calls, clock):
    with pytest.raises(UserError, match="OHQConfig needs calibration: pass a store"):
        ptq4dm.quantize(unet(), config())
    with pytest.raises(UserError, match=r"no choice of formats is within bytes 0.1 .* the least is bytes 0\.\d+"):
        ptq4dm.quantize(unet(), config(bytes=0.1), calls)


def test_candidates_that_look_at_different_inputs_are_refused(unet, calls, clock):
    gptq = "ptq4dm activations=dynamic rounding=gptq num_tuples="
    with pytest.raises(UserError, match="look at calibration inputs in different ways"):
        ptq4dm.quantize(unet(), config(candidates=(f"{gptq}3", f"{gptq}2 weight_bits=4")), calls)


def test_the_defaults_are_candidates_and_plans_of_the_model(unet, calls, clock):
    assert all(recipe_of(text) for text in (*ohq.CANDIDATES, *ohq.ON_GPU))
    recipe = OHQConfig(**FAST, bytes=0.8)
    plan = make_plan(unet(), recipe, store_of(unet(), calls))
    assert len(recipe.outcome.table.labels) == 5 and set(plan.layers) <= {view.name for view in find_layers(unet())}
