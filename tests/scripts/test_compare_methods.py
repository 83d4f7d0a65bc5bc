"""The table of all methods on a tiny model: rows, what resumes, and whether the shuffled controls shuffle."""

import copy
import dataclasses
import importlib
import json
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import ptq4dm
from models import plain_unet
from ptq4dm.calibration.record import replay
from ptq4dm.errors import UserError
from ptq4dm.kernels.formats.grid import Grid
from ptq4dm.kernels.formats.int8 import quantize_weight
from ptq4dm.layers import progressive
from ptq4dm.layers.sizes import bytes_in_16_bits, stored_bytes
from ptq4dm.quantization.planning import make_plan
from ptq4dm.quantization.transforming import transformed

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "comparisons"
SMALL = ["--steps", "3", "--num-paired", "3", "--calibration-samples", "4", "--batch-size", "4"]
SMALL += ["--timed-batch", "1", "--timed-steps", "1", "--device", "cpu", "--model", "tiny", "--output", "m.json"]
FIELDS = {
    "model", "row", "kind", "of", "psnr", "psnr_stderr", "psnr_interval", "mse", "eps_error", "eps_error_bins",
    "feature_fid", "bytes", "bytes_share", "step_time", "recipe", "formats", "simulated", "kernels",
    "seconds_to_quantize", "memory_to_quantize", "seconds", "device", "commit", "version", "seed",
}  # fmt: skip


@pytest.fixture
def unet():
    return plain_unet


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Imports a file of scripts/comparisons; the working folder is a new one."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.chdir(tmp_path)
    return importlib.import_module


def tiny_unet(unet):
    from diffusers import DDIMScheduler, DDPMPipeline

    pipe = DDPMPipeline(unet(), DDIMScheduler(timestep_spacing="trailing"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def calibrated(unet, one_thread):
    """(exact model, calibration store)."""
    pipe = tiny_unet(unet)
    return pipe.unet, ptq4dm.collect(pipe, ptq4dm.CalibrationConfig("solver", 4, 3, batch_size=4))


def split_model():
    """A calibrated DiT of width 64, wide enough for groups of 64, with two strong directions in each weight: (exact,
    store)."""
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=3, out_channels=3, num_layers=1, sample_size=8,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    for module in model.transformer_blocks.modules():
        if isinstance(module, torch.nn.Linear):
            outputs, inputs = module.weight.shape
            module.weight.data += 0.2 * torch.randn(outputs, 2) @ torch.randn(2, inputs)
    pipe = ptq4dm.PixelDiTPipeline(transformer=model.eval(), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return model, ptq4dm.collect(pipe, ptq4dm.CalibrationConfig("solver", 8, 2, batch_size=4))


def quantized(exact, config, store):
    model = copy.deepcopy(exact)
    ptq4dm.quantize(model, config, store)
    return model


# ------------------------------------------------------------------------------------------------ the table


def test_rows_resume_and_hold_all_fields(script, unet, one_thread, monkeypatch, capsys):
    compare, Row, made = script("compare_methods"), script("method_rows").Row, []
    narrow = partial(ptq4dm.RTNConfig, weight_bits=6, activation_bits=6)
    ranges = {"plan": script("controls").shuffle_input_ranges, "packed": script("controls").shuffle_weight_ranges}
    table = [
        Row("full precision", "baseline", None),
        Row("RTN W8A8", "baseline", ptq4dm.RTNConfig),
        Row("RTN W6A6", "method", narrow),
        Row("RTN W6A6, shuffled", "shuffled", narrow, "RTN W6A6", **ranges),
        Row("to come", "method", partial(ptq4dm.RTNConfig, no_such_option=1), needs="an option"),
    ]
    monkeypatch.setattr(compare, "all_rows", lambda: table)

    def bench(model, args):
        made.append(model)
        return compare.Bench(model, args, tiny_unet(unet))

    compare.main([*SMALL, "--rows", "full precision", "RTN W8A8"], bench)
    first = json.loads(Path("m.json").read_text())["rows"]
    compare.main(SMALL, bench)
    rows = json.loads(Path("m.json").read_text())["rows"]
    assert made == ["tiny", "tiny"] and rows[:2] == first and len(rows) == 4
    compare.main(SMALL, lambda *_: pytest.fail("all is there already"))
    reference, rtn, six, shuffled = rows
    assert set(rtn) == set(six) == set(shuffled) == FIELDS
    assert (reference["bytes_share"], six["simulated"], rtn["simulated"]) == (1.0, True, False)
    low, high = rtn["psnr_interval"]
    assert low < rtn["psnr"] < high and rtn["eps_error"] < min(six["eps_error"], shuffled["eps_error"])
    assert len(rtn["eps_error_bins"]) == 10 and sum(error is not None for error in rtn["eps_error_bins"]) == 3
    assert rtn["bytes_share"] == rtn["bytes"] / reference["bytes"] < 1 and rtn["step_time"]["ratio"] > 0
    assert sum(rtn["kernels"].values()) == sum(rtn["formats"].values()) > 10
    out = capsys.readouterr().out.split("tiny, 3 DDIM steps")[-1]
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert [line.startswith(f"| {row['row']}") for row, line in zip(rows, lines[1:], strict=True)] == [True] * 4
    assert "feature-FID" not in lines[0] and f"{rtn['psnr']:.2f} ± {(high - low) / 2:.2f}" in lines[2]
    assert "RTN W6A6 (simulated) | method" in lines[3]
    assert "left out: to come: it waits for an option (" in out
    with Image.open("m-tiny.png") as picture:
        assert picture.format == "PNG"


def test_shards_join_and_time_ends(script, unet, one_thread, capsys):
    compare = script("compare_methods")
    rows = ["--rows", "full precision", "RTN W8A8", "RTN W8A8, dynamic"]

    def bench(model, args):
        return compare.Bench(model, args, tiny_unet(unet))

    compare.main([*SMALL, *rows, "--shard", "1/2", "--output", "one.json"], bench)
    assert [row["row"] for row in json.loads(Path("one.json").read_text())["rows"]] == ["RTN W8A8"]
    compare.main([*SMALL, *rows, "--minutes", "0", "--join", "one.json"], lambda *_: pytest.fail("no time is left"))
    out = capsys.readouterr().out
    assert "3 rows are still to do" in out and "| RTN W8A8 | baseline |" in out
    with pytest.raises(UserError, match="other settings"):
        compare.main([*SMALL, *rows, "--steps", "4", "--join", "one.json", "--output", "new.json", "--minutes", "0"])
    with pytest.raises(UserError, match="no row is called 'PTQ5DM"):
        compare.main([*SMALL, "--rows", "PTQ5DM*"])
    for words in (["--shard", "2/2"], ["--shard", "x"], ["--join", "none.json"], ["--num-paired", "0"]):
        with pytest.raises(UserError, match="shard is|no none.json|num-paired must"):
            compare.main([*SMALL, *rows, *words])


def test_a_row_that_a_model_cannot_take_is_said(script, unet, one_thread, monkeypatch, capsys):
    compare, Row = script("compare_methods"), script("method_rows").Row
    wrong = Row("wrong", "method", partial(ptq4dm.RTNConfig, modules_to_not_convert=("nowhere",)))
    monkeypatch.setattr(compare, "all_rows", lambda: [wrong, Row("full precision", "baseline", None)])
    compare.main(SMALL, lambda model, args: compare.Bench(model, args, tiny_unet(unet)))
    assert "left out: tiny: wrong: 'nowhere' in modules_to_not_convert names no layer" in capsys.readouterr().out
    assert [row["row"] for row in json.loads(Path("m.json").read_text())["rows"]] == ["full precision"]


def test_every_method_stands_beside_its_baselines_and_controls(script):
    rows = script("method_rows").all_rows()
    names = [row.name for row in rows]
    assert len(set(names)) == len(names) and {row.kind for row in rows} == set(script("method_rows").KINDS)
    methods = {row.name: row for row in rows if row.kind == "method"}
    assert all(row.of in methods for row in rows if row.of)
    assert all(row.of and (row.plan or row.packed) for row in rows if row.kind == "shuffled")
    for name, method in methods.items():
        if not method.needs:
            assert {"ablation", "shuffled"} <= {row.kind for row in rows if row.of == name}, name
    # Only rows that say what they wait for may fail to be made.
    ready, left_out = script("compare_methods").available(rows)
    assert len(ready) + len(left_out) == len(rows) and {r.name for r in rows if not r.needs} <= {
        r.name for r in ready
    }
    broken = script("method_rows").Row("broken", "method", lambda: ptq4dm.RTNConfig(no_such_option=1))
    with pytest.raises(TypeError):
        script("compare_methods").available([broken])


def test_rows_beside_trained_blocks_have_their_grid(script):
    rows = {row.name: row for row in script("method_rows").trained_blocks()}
    shared = (
        "weight_bits",
        "activation_bits",
        "activations",
        "group_size",
        "average_bits",
        "num_tuples",
        "first_last",
    )
    beside = 0
    for name, row in rows.items():
        if row.kind == "method":
            for rounding in ("nearest", "gptq"):
                own, other = row.recipe(), rows[f"{rounding} as {name}"].recipe()
                assert [getattr(own, key) for key in shared] == [getattr(other, key) for key in shared]
                assert own.ranges()[0] == other.ranges()[0] == "mse" and other.rounding == rounding
                beside += 1
    assert beside == 12 and {rows[f"GradPTQ W{bits}A8 per row, dynamic"].recipe().weight_bits for bits in (3, 4)} == {
        3,
        4,
    }
    pd = {row.name: row.recipe() for row in script("method_rows").trained_prediction()}
    assert pd["PD-Quant W4A4, trained"].prediction == 1.0 and pd["PD-Quant W4A4, trained"].rounding == "learned"
    assert pd["PD-Quant W4A4, trained, without prediction"].prediction == 0.0


@pytest.mark.parametrize(
    "name", ["GradPTQ W4A8 g64, dynamic", "GradPTQ W4A8 per row", "GradPTQ W4.5A8 rows, dynamic"]
)
def test_flips_of_trained_rows_are_as_many(script, one_thread, name):
    exact, store = split_model()
    rows = {row.name: row for row in script("method_rows").trained_blocks()}
    row = rows[f"{name}, flips at random"]
    trained, nearest = row.recipe(), rows[f"nearest as {name}"].recipe()
    trained.steps = 2
    model, beside = quantized(exact, trained, store), quantized(exact, nearest, store)
    flipped = copy.deepcopy(model)
    row.packed(flipped, exact, store, 0)

    def off(one, layer):
        codes = [each.get_submodule(layer).dequantized_weight() for each in (one, beside)]
        return int((codes[0] - codes[1]).abs().gt(1e-6).sum())

    layers = [layer for layer, module in model.named_modules() if hasattr(module, "dequantized_weight")]
    counts = [off(model, layer) for layer in layers]
    assert counts == [off(flipped, layer) for layer in layers] and sum(counts) > 100
    assert any(
        not torch.equal(*(one.get_submodule(n).dequantized_weight() for one in (model, flipped))) for n in layers
    )


def test_tasks_reach_other_processes(script, tmp_path):
    """Recipes and controls stay at home: a task knows its row by the name."""
    compare = script("compare_methods")
    args = compare.arguments().parse_args([*SMALL, "--workers", "3", "--shard", "1/2"])
    rows = script("method_rows").all_rows()
    tasks = compare.tasks([{"model": "tiny", "row": rows[1].name}], rows, args)
    assert [task.key for task in pickle.loads(pickle.dumps(tasks))] == [row.name for row in rows[3::2]]

    class Bench:
        measure = staticmethod(lambda row: row)

    assert compare.measure(Bench, "PD-Quant W4A4, trained", []).name == "PD-Quant W4A4, trained"
    assert pickle.loads(pickle.dumps(compare.measure)) is compare.measure
    with pytest.raises(UserError, match="--workers must be"):
        compare.main([*SMALL, "--workers", "0"], lambda *_: pytest.fail("no work before"))


def test_the_front_is_what_nothing_beats(script):
    front = script("methods_report").front
    assert front([(3, 1), (1, 5), (2, 2), (2, 3), (3, 4)]) == [(1, 5), (2, 2), (3, 1)] and front([]) == []


# ------------------------------------------------------------------------------------------------ controls


def test_shuffled_input_ranges_are_a_permutation(script, calibrated):
    controls, (exact, store) = script("controls"), calibrated
    plan = make_plan(exact, ptq4dm.PTQ4DMConfig(weight_bits=6, activation_bits=6, first_last="same"), store)
    before, given = controls.input_ratios(plan, store), copy.deepcopy(plan)
    shuffled = controls.shuffle_input_ranges(exact, plan, store, seed=1)
    assert plan == given and shuffled != plan  # the caller's plan stays
    after = controls.input_ratios(shuffled, store)
    expected = dict(zip(before, controls.permuted(list(before.values()), 1), strict=True))
    step = 1 / 63
    checked = 0
    for name, ends in after.items():
        low, high = controls._extremes(store, name)
        if low and high:  # ends move by half a step when the zero point is rounded
            width = high * expected[name][1] - low * expected[name][0]
            errors = [abs(a - b) * abs(e) for a, b, e in zip(ends, expected[name], (low, high), strict=True)]
            assert max(errors) <= 0.51 * step * width
            checked += 1
    assert checked > 10 and len(set(before.values())) > 5
    assert controls.shuffle_input_ranges(exact, plan, store, 1) == shuffled
    assert controls.shuffle_input_ranges(exact, plan, store, 2) != shuffled


def test_shuffled_weight_ranges_are_a_permutation_of_each_layers(script, calibrated):
    controls, (exact, store) = script("controls"), calibrated
    model = quantized(exact, ptq4dm.PTQ4DMConfig(weight_bits=5), store)
    before = copy.deepcopy(model)
    controls.shuffle_weight_ranges(model, exact, store, 0)
    moved = 0
    for (layer, weight), (old, _) in zip(
        controls._int8_layers(model, exact), controls._int8_layers(before, exact), strict=True
    ):
        full = controls.weight_scale(weight, layer.plan.weight_bits)
        torch.testing.assert_close(
            (layer.weight_scale / full).sort().values, (old.weight_scale / full).sort().values, rtol=1e-5, atol=0
        )
        assert torch.equal(layer.qweight, quantize_weight(weight, layer.weight_scale, layer.plan.weight_bits))
        moved += not torch.equal(layer.weight_scale, old.weight_scale)
    assert moved > 10


def test_predictions_of_other_tuples_take_the_gain_away(script, one_thread, few_looks):
    """Ranges by the prediction difference lower the prediction's error; with those of other tuples they do not."""
    from models import plain_unet

    controls, pipe = script("controls"), tiny_unet(plain_unet)
    exact, store = pipe.unet, ptq4dm.collect(pipe, ptq4dm.CalibrationConfig("solver", 8, 3, batch_size=4))
    recipe = partial(ptq4dm.PTQ4DMConfig, activation_bits=3, num_tuples=4, first_last="same")
    mse, plans = make_plan(exact, recipe(objective="mse"), store), {}
    for objective in ("prediction", "prediction, of other tuples"):
        change = controls.input_ranges_of(partial(recipe, objective=objective))
        plans[objective] = change(exact, mse, store, 1)
        assert {layer.objective for layer in plans[objective].layers.values()} == {"mse"}
    assert make_plan(exact, recipe(objective="mse"), store) == mse  # the caller's plan stays
    calls = store.recorded()
    truth = replay(exact, calls)
    error = {
        name: float((replay(quantized(exact, recipe(plan=plan), store), calls) - truth).square().sum())
        for name, plan in {"mse": mse, **plans}.items()
    }
    assert error["prediction"] < 0.8 * error["mse"] < error["prediction, of other tuples"], error


def test_other_tuples_are_others(script):
    controls, parts = script("controls"), [torch.arange(3.0)[:, None], torch.arange(3.0, 5.0)[:, None]]
    seen = set()
    for controls.DRAWS["seed"] in range(8):
        moved = controls.OfOtherTuples.targets(parts)
        assert [len(one) for one in moved] == [3, 2]
        order = torch.cat(moved).flatten().tolist()
        assert sorted(order) == [0, 1, 2, 3, 4] and not any(place == i for i, place in enumerate(order))
        seen.add(tuple(order))
    assert len(seen) > 1
    with pytest.raises(UserError, match="cannot change places"):
        controls.OfOtherTuples.targets([torch.zeros(1, 3)])


def test_flips_are_as_many_and_to_the_other_neighbour(script):
    controls = script("controls")
    torch.manual_seed(0)
    weight, grid = torch.randn(8, 32), Grid(torch.full((8, 1), 0.3), None, -7, 7)
    weight[0, :4] = torch.tensor([100.0, -100.0, 0.3, 0.0])  # beyond the grid on either side; right on codes
    nearest = grid.codes(weight)
    rounded = nearest.clone()
    rounded[:, ::4] = torch.where(rounded[:, ::4] < 0, rounded[:, ::4] + 1, rounded[:, ::4] - 1)
    count = int((rounded != nearest).sum())
    codes = controls.random_flips(weight, rounded, grid, controls.generator(0))
    flipped = codes != nearest
    assert int(flipped.sum()) == count == 64 and not torch.equal(codes, rounded) and codes.abs().max() <= 7
    assert ((codes.float() - weight / 0.3).abs()[flipped] <= 1 + 1e-4).all()  # the neighbours lie a step apart
    assert torch.equal(codes, controls.random_flips(weight, rounded, grid, controls.generator(0)))
    assert not torch.equal(codes, controls.random_flips(weight, rounded, grid, controls.generator(1)))


@pytest.mark.parametrize("bits", [8, 4])
def test_hessian_rounding_gains_and_its_controls_lose_the_gain(script, calibrated, bits):
    controls, (exact, store) = script("controls"), calibrated
    nearest, gptq = (
        ptq4dm.RTNConfig(weight_bits=bits, first_last="same", activations="dynamic", rounding=rounding)
        for rounding in ("nearest", "gptq")
    )
    plan = make_plan(exact, gptq, store)
    with pytest.raises(UserError, match="no rounding to shuffle"):
        controls.shuffle_rounding(exact, make_plan(exact, nearest, store), store, 0)
    recipes = {"nearest": nearest, "gptq": gptq}
    for name, control in (("random", controls.shuffle_rounding), ("wrong", controls.shuffle_hessian)):
        recipes[name] = dataclasses.replace(gptq, plan=control(exact, plan, store, 0))
    models = {name: copy.deepcopy(exact) for name in recipes}
    error = {}
    for name, recipe in recipes.items():
        report = ptq4dm.quantize(models[name], recipe, store)
        error[name] = sum(10 ** (-row["sqnr"] / 10) for row in report.layers)
    assert {layer.rounding for layer in plan.layers.values()} == {"gptq"}  # the controls leave it as it is

    def codes(name: str, layer: str) -> torch.Tensor:
        module = models[name].get_submodule(layer)
        return module.codes() if bits == 4 and hasattr(module, "codes") else module.qweight

    def flips(name: str) -> list[int]:
        layers = [n for n, module in models[name].named_modules() if hasattr(module, "qweight")]
        pairs = [(codes(name, n), codes("nearest", n)) for n in layers]
        return [int((a != b).sum()) for a, b in pairs]

    assert flips("random") == flips("gptq") and sum(flips("gptq")) > 1000
    most = 0.8 if bits == 4 else 0.98  # in 8 bits rounding of the inputs is most of the error
    assert error["gptq"] < most * error["nearest"] < most * min(error["wrong"], error["random"])


def test_svdquant_is_split_anew_to_the_bit_and_shuffled_otherwise(script, one_thread):
    controls, (exact, store) = script("controls"), split_model()
    config = ptq4dm.SVDQuantConfig(activations="int8", rank=8, rounding="nearest", refinements=0, smoothing=0.5)
    model = quantized(exact, config, store)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in model.modules():
        if getattr(getattr(layer, "plan", None), "activation", "none") != "none":
            for name in ("qweight", "wscales", "up", "down"):
                if getattr(layer, name) is not None:
                    getattr(layer, name).zero_()
    controls.split_anew(model, exact)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    size = stored_bytes(model)
    controls.shuffle_smoothing(model, exact, store, 0)
    smooth = [name for name in before if name.endswith(".smooth")]
    assert len(smooth) >= 4 and stored_bytes(model) == size
    for name in smooth:
        now = model.state_dict()[name]
        assert torch.equal(now.sort().values, before[name].sort().values) and not torch.equal(now, before[name])

    def error(model) -> float:
        names = [name.removesuffix(".smooth") for name in smooth]
        pairs = [(model.get_submodule(n).dequantized_weight(), exact.get_submodule(n).weight) for n in names]
        return sum(float(((a - b).square().sum() / b.square().sum()).detach()) for a, b in pairs)

    best, anyhow = quantized(exact, config, store), quantized(exact, config, store)
    controls.random_branch(anyhow, exact, store, 0)
    none = quantized(exact, ptq4dm.SVDQuantConfig(**{**plain(config), "rank": 0}), store)
    assert error(best) < 0.5 * error(anyhow) and 0.7 < error(anyhow) / error(none) < 1.1
    gptq = quantized(exact, ptq4dm.SVDQuantConfig(rank=8, smoothing=0.5), store)
    with pytest.raises(UserError, match="rounding='nearest'"):
        controls.shuffle_smoothing(gptq, exact, store, 0)


def plain(config) -> dict:
    return {name: getattr(config, name) for name in ("activations", "rank", "rounding", "refinements", "smoothing")}


def test_rounding_at_the_bytes_of_a_method(script, one_thread):
    budgets, (exact, store) = script("budgets"), split_model()
    method = lambda: ptq4dm.SVDQuantConfig(activations="int8", rank=16)  # noqa: E731
    rtn = ptq4dm.SVDQuantConfig(activations="int8", rank=0, smoothing="none", rounding="nearest")
    narrow = make_plan(exact, rtn, store)
    plan = budgets.at_bytes_of(method, ptq4dm.RTNConfig)(exact, narrow, store, 0)
    budget = sum(budgets.plan_bytes(exact, make_plan(exact, method(), store)).values())
    sizes = budgets.plan_bytes(exact, plan)
    assert sum(budgets.plan_bytes(exact, narrow).values()) < sum(sizes.values()) <= budget
    rtn.plan = plan
    model = quantized(exact, rtn, store)
    assert sizes == {name: stored_bytes(model.get_submodule(name)) for name in plan.layers}
    assert {"int8", "svdq"} == {choice.format for choice in plan.layers.values()}


def test_as_many_rows_of_each_layer_are_wide_but_others(script, calibrated):
    exact, store = calibrated
    controls = script("controls")
    config = ptq4dm.RTNConfig(activations="dynamic", weight_bits=4, average_bits=5.0, importance="magnitude")
    plan = make_plan(exact, config, store)
    found = [controls.shuffle_rows(exact, plan, store, seed) for seed in (0, 1, 0)]
    assert found[0] == found[2] and len({str(one.layers) for one in (plan, *found)}) == 3
    for name, layer in plan.layers.items():
        rows = getattr(found[0].layers[name], "wide", [])
        assert len(rows) == len(getattr(layer, "wide", [])) == len(set(rows)) and rows == sorted(rows)
    models = [quantized(exact, dataclasses.replace(config, plan=one), store) for one in (plan, found[0])]
    assert stored_bytes(models[0]) == stored_bytes(models[1])
    with pytest.raises(UserError, match="no rows to shuffle"):
        controls.shuffle_rows(exact, make_plan(exact, ptq4dm.RTNConfig(), store), store, 0)


# ------------------------------------------------------------------------------------------------ QoQ and MixPE


def found_by(exact, store, control, **options):
    """(the plan before a control, after it, the model quantized by the latter), as the table makes them."""
    config = ptq4dm.QoQConfig(group_size=32, num_tuples=4, **options)
    model = copy.deepcopy(exact)
    transforms, measured = transformed(model, config.changes, None, store)
    plan = make_plan(model, config, measured)
    plan.transforms = transforms
    before, after = copy.deepcopy(plan), control(model, plan, measured, 0)
    assert plan == before
    return before, after, quantized(exact, dataclasses.replace(config, plan=after), store)


def test_transforms_are_shuffled_and_keep_the_function(script, one_thread):
    controls, (exact, store) = script("controls_steps"), split_model()
    for kind, tensor, control in (
        ("smooth", "divisors", controls.shuffle_divisors),
        ("reorder", "order", controls.shuffle_order),
    ):
        before, after, model = found_by(exact, store, control, rotation="none")
        pairs = list(zip(before.transforms, after.transforms, strict=True))
        changed = [(a.tensors[tensor], b.tensors[tensor]) for a, b in pairs if a.kind == kind]
        assert changed and all(torch.equal(a.sort().values, b.sort().values) for a, b in changed)
        assert any(not torch.equal(a, b) for a, b in changed)
        assert all(a == b for a, b in pairs if a.kind != kind)
        calls = store.recorded()[:4]
        right = replay(exact, calls)
        assert (replay(model, calls) - right).norm() < 0.2 * right.norm()
    with pytest.raises(UserError, match="no transform 'smooth' to shuffle"):
        found_by(exact, store, controls.shuffle_divisors, smoothing="none")


def test_rotations_are_dealt_to_other_layers(script, one_thread, monkeypatch):
    chosen = lambda self, *_: 1.0 + (bool(self.plan.rotation) == (self.weight_shape[0] <= 64))  # noqa: E731
    monkeypatch.setattr(progressive.ProgressiveLayer, "_error", chosen)  # layers of a drawn model gain nothing
    controls, (exact, store) = script("controls_steps"), split_model()
    before, after, model = found_by(exact, store, controls.shuffle_rotation)
    usual = quantized(exact, ptq4dm.QoQConfig(group_size=32, num_tuples=4), store)
    found = {
        name: layer.rotation
        for name, layer in ptq4dm.quantization_config(usual).plan.layers.items()
        if layer.format == "progressive"
    }
    dealt = {name: layer.rotation for name, layer in after.layers.items() if layer.format == "progressive"}
    assert {before.layers[name].rotation for name in found} == {None}
    assert sorted(found.values()) == sorted(dealt.values()) and found != dealt and {*found.values()} > {0}
    everywhere = controls.rotate_all(exact, before, store, 0)
    assert all(everywhere.layers[name].rotation > 0 for name in found)
    with pytest.raises(UserError, match="no rotation to shuffle"):
        found_by(exact, store, controls.shuffle_rotation, rotation="none")


def test_shuffled_zero_points_are_as_many_and_hurt(script, one_thread):
    controls, (exact, store) = script("controls_steps"), split_model()
    config = ptq4dm.MixPEConfig(group_size=32)
    right, wrong = quantized(exact, config, store), quantized(exact, config, store)
    controls.shuffle_zeros(wrong, exact, store, 0)
    layers = [name for name, module in right.named_modules() if getattr(module, "wzeros", None) is not None]
    zeros = [[model.get_submodule(name).wzeros.flatten() for name in layers] for model in (right, wrong)]
    assert layers and all(torch.equal(a.sort().values, b.sort().values) for a, b in zip(*zeros, strict=True))
    calls = store.recorded()[:4]
    exactly = replay(exact, calls)
    errors = [float((replay(model, calls) - exactly).norm()) for model in (right, wrong)]
    assert errors[0] < 0.7 * errors[1]
    with pytest.raises(UserError, match="has zero points to shuffle"):
        controls.shuffle_zeros(copy.deepcopy(exact), exact, store, 0)


def test_shuffled_scales_of_planes_are_as_many_and_hurt(script, calibrated):
    controls, (exact, store) = script("controls_steps"), calibrated
    right, wrong = (
        quantized(exact, ptq4dm.LUTGEMMConfig(group_size=32, rounding="nearest"), store) for _ in range(2)
    )
    controls.shuffle_scales(wrong, exact, store, 0)
    layers = [name for name, module in right.named_modules() if getattr(module, "wscales", None) is not None]
    assert layers
    errors: list[float] = []
    for name in layers:
        one, other = (model.get_submodule(name) for model in (right, wrong))
        scales = [layer.wscales.movedim(-1, 0).flatten(0, 2) for layer in (one, other)]
        assert torch.equal(*(part.sort(0).values for part in scales)) and not torch.equal(*scales)
        weight = exact.get_submodule(name).weight.detach()
        errors += [float((layer.dequantized_weight() - weight).square().sum()) for layer in (one, other)]
    assert sum(errors[::2]) < 0.9 * sum(errors[1::2])
    with pytest.raises(UserError, match="no layer of the model has sign planes"):
        controls.shuffle_scales(copy.deepcopy(exact), exact, store, 0)


def test_formats_are_dealt_out_anew_and_chosen_greedily(script, calibrated):
    """Other layers have the formats, within the same budget, at no less predicted error."""

    exact, store = calibrated
    controls = script("controls")
    options = {"num_tuples": 2, "draws": 2, "rounds": 1, "timed_batch": 1, "costs": "", "bytes": 0.52}
    texts = tuple(f"rtn activations=dynamic first_last=same{more}" for more in ("", " weight_bits=4"))
    recipe = partial(ptq4dm.OHQConfig, candidates=texts, **options)
    config = recipe()
    plan, table = make_plan(exact, config, store), config.outcome.table
    for choose in (controls.permuted_errors, controls.greedily, controls.at_random):
        picks = choose(table, config, 0)
        assert table.fits(picks, None, 0.52) and table.error(picks) >= config.outcome.allocation.error * (1 - 1e-9)
    other = controls.chosen_by(recipe, controls.permuted_errors)(exact, plan, store, 0)
    assert {str(one) for one in other.layers.values()} == {str(one) for one in plan.layers.values()}
    assert other.layers != plan.layers and other.method == "ohq"
    model = quantized(exact, dataclasses.replace(config, plan=other), store)
    assert bytes_in_16_bits(model) <= 0.52 * bytes_in_16_bits(exact)


def test_rows_of_eight_bits_are_dealt_out_and_chosen_by_other_scores(script, one_thread):
    """As many in all, or in each layer; draws differ; norms and the recipe's own scores choose what is largest."""
    steps, controls = script("controls_steps"), script("controls")
    exact, store = split_model()
    recipe = partial(ptq4dm.MixLLMConfig, group_size=32, rounding="nearest", clip="none", num_tuples=8)
    plain, own = make_plan(exact, recipe(rows=0.0), store), make_plan(exact, recipe(), store)

    def wide(plan):
        counts = {}
        for name, choice in plan.layers.items():
            whole = choice.format == "int8" and plain.layers[name].format == "int4"
            counts[name] = len(exact.get_submodule(name).weight) if whole else len(getattr(choice, "wide", []))
        return counts

    every = sum(len(exact.get_submodule(name).weight) for name, one in plain.layers.items() if one.format == "int4")
    total = sum(wide(own).values())
    assert total == every // 10
    draws = [steps.rows_of(steps.draw_of(i), 0.1)(exact, plain, store, 0) for i in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    norms = steps.rows_of(steps.row_norms, 0.1)(exact, plain, store, 0)
    again = steps.rows_of(steps.salience_of(recipe), 0.1)(exact, plain, store, 0)
    each = steps.rows_of(steps.salience_of(recipe), 0.1, each=True)(exact, plain, store, 0)
    assert {sum(wide(plan).values()) for plan in (*draws, norms)} == {total} and again.layers == own.layers
    for name, count in wide(each).items():
        outputs = len(exact.get_submodule(name).weight)
        assert count == (outputs // 10 if plain.layers[name].format == "int4" else 0)
    shuffled = controls.shuffle_rows(exact, own, store, 1)
    assert wide(shuffled) == wide(own) and shuffled != own
    with pytest.raises(UserError, match="no rows to choose"):
        steps.rows_of(steps.row_norms, 0.1)(exact, make_plan(exact, ptq4dm.RTNConfig(), store), store, 0)


def test_predicted_errors_stand_beside_measured_ones(tmp_path, monkeypatch, one_thread, unet):
    monkeypatch.syspath_prepend(str(SCRIPTS.parent / "benchmarks"))
    compare, out = importlib.import_module("compare_mixllm"), tmp_path / "made" / "m.json"
    words = ["--tuples", "6", "--held-out", "4", "--steps", "3", "--batch-size", "4", "--device", "cpu"]
    words += ["--rounding", "nearest", "--shares", "0", "0.3", "1", "--output", str(out)]
    compare.main(words, tiny_unet(unet))
    curves = json.loads(out.read_text())["curves"]
    assert [one["importance"] for one in curves] == ["gauss-newton", "fisher"]
    for one in curves:
        rows = one["rows"]
        assert [row["share"] for row in rows] == [0, 0.3, 1] and rows[2]["predicted"] == pytest.approx(0, abs=1e-12)
        assert rows[0]["measured"] > rows[1]["measured"] > rows[2]["measured"] > 0 and one["monotone"]
        assert one["spearman"] == pytest.approx(1)
        assert rows[0]["kept by counts"] is None and 0.3 < rows[1]["kept by counts"] < 1
        assert rows[2]["kept by counts"] == pytest.approx(1)
    scores = {"whole": torch.tensor([4.0, 4.0]), "part": torch.tensor([6.0, 1.0, 1.0])}
    chosen = {"whole": [0, 1], "part": [0]}
    assert compare.kept_by_counts(scores, chosen) == pytest.approx((8 + 8 / 3) / (8 + 6))
    assert compare.kept_by_counts(scores, chosen, 0.5) == pytest.approx(8 / 3 / 6)
    assert compare.largest(scores, chosen, 1) == [{"layer": "whole", "share": 0.5, "wide": 2, "rows": 2}]
    assert 0.2 < curves[0]["rows"][0]["predicted_error"] / curves[0]["rows"][0]["measured"] < 5
    for words in (["--shares", "0.5", "0.1"], ["--shares", "2"], ["--tuples", "0"]):
        with pytest.raises(UserError):
            compare.main(words, pytest.fail)


# ------------------------------------------------------------------------------------------------ what is split


def test_parts_at_random_have_the_sizes_and_the_bytes_of_the_seams(script, calibrated):
    """And grids for what they hold: those of one part are as wide as those of the other."""
    exact, store = calibrated
    model = quantized(exact, ptq4dm.RTNConfig(split_inputs=True), store)
    plans = {n: m.plan for n, m in model.named_modules() if hasattr(getattr(m, "plan", None), "seams")}
    size = stored_bytes(model)
    script("controls_split").random_parts(model, exact, store, 0)
    drawn = {name: model.get_submodule(name) for name in plans}
    assert drawn and stored_bytes(model) == size
    for name, one in drawn.items():
        assert one.layer.plan.seams == plans[name].seams and sorted(one.order.tolist()) == list(range(len(one.order)))
    calls = store.recorded()
    assert (replay(model, calls) - replay(exact, calls)).norm() < 0.2 * replay(exact, calls).norm()
    with pytest.raises(UserError, match="no parts to draw"):
        script("controls_split").random_parts(copy.deepcopy(exact), exact, store, 0)


def test_clusters_at_random_are_as_large_and_no_better_than_one(script, unet):
    exact = unet()
    plain = ptq4dm.SplitQuantConfig(clusters=1, form="literal")
    model, one = (quantized(exact, config, None) for config in (ptq4dm.SplitQuantConfig(), plain))
    error = lambda net: sum(  # noqa: E731
        float((layer.dequantized_weight() - exact.get_submodule(name).weight.detach()).square().sum())
        for name, layer in net.named_modules()
        if hasattr(layer, "dequantized_weight")
    )
    split, size = error(model), stored_bytes(model)
    script("controls_split").shuffle_clusters(model, exact, None, 0)
    assert stored_bytes(model) == size and split < 0.3 * error(one)
    assert error(model) > 0.7 * error(one)
    with pytest.raises(UserError, match="none to shuffle"):
        script("controls_split").shuffle_clusters(one, exact, None, 0)
