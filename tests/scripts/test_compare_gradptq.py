"""The ablation table of block training, with a stand-in for it: rows, what resumes, ratios, the shuffled control."""

import copy
import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import ptq4dm
from ptq4dm.errors import UserError
from ptq4dm.layers.rounded import RoundedLayer

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "comparisons"
SMALL = ["--sampling-steps", "3", "--num-paired", "3", "--calibration-samples", "4", "--batch-size", "4"]
SMALL += ["--device", "cpu", "--model", "tiny", "--output", "g.json"]


@dataclass(repr=False)
class Trained(ptq4dm.RTNConfig):
    """Options of block training; codes are those of Hessian rounding."""

    rounding: str = "gptq"
    steps: int = 500
    batch_size: int = 8
    loss: str = "mse"
    moves: str = "up-down"
    variable: str = "sigmoid"
    optimizer: str = "adam"
    learning_rate: float | None = None
    train: tuple[str, ...] = ("rounding",)
    augmentation: str = "qdrop"
    unit: str = "block"
    prediction: float = 0.0
    correction: bool = False
    time_weights: tuple[float, ...] = ()

    def ranges(self):
        return "mse", None


class FakeBench:
    """Figures from the row's name; every row takes a second for 500 steps."""

    made: list = []

    def __init__(self, model, args):
        self.model, self.args = model, args

    def measure(self, trial, bits, seed, rate=None):
        recipe = importlib.import_module("gradptq_recipes").recipe(trial, bits, self.args.options, seed, rate)
        self.made.append((trial.name, bits, seed))
        error = {"nearest": 8.0, "gptq": 4.0, "base": 2.0, "20000 steps": 1.0, "50 steps": 6.5}.get(trial.name, 3.0)
        if trial.stage == "lr":
            error = abs(trial.options["learning_rate"] - 0.01) + 0.5
        return {
            "model": self.model, "bits": bits, "stage": trial.stage, "row": trial.name, "seed": seed,
            "options": trial.options, "eps_error": error * (1 + seed), "calibration_error": error, "seconds": 1.0,
            "learning_rate": getattr(recipe, "learning_rate", None), "flips": None if trial.rounding else 0.25,
            "seconds_to_quantize": 2.0, "memory_to_quantize": 3_000_000,
        }  # fmt: skip


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Imports a file of scripts/comparisons; the working folder is a new one, and block training a stand-in."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ptq4dm, "GradPTQConfig", Trained, raising=False)
    monkeypatch.setattr(FakeBench, "made", [])
    return importlib.import_module


def rows_of(path="g.json"):
    return json.loads(Path(path).read_text())["rows"]


def cells_of(text, row):
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    header = lines[0]
    return next(dict(zip(header, line, strict=True)) for line in lines if line[0] == row)


def test_rows_resume_and_ratios_are_taken_seed_by_seed(script, capsys):
    compare = script("compare_gradptq")
    words = [*SMALL, "--stage", "steps", "--seeds", "0", "1"]
    compare.main([*words, "--seeds", "0"], FakeBench)
    first = len(FakeBench.made)
    assert [row for row, _, _ in FakeBench.made] == [
        "base", "nearest", "gptq", "50 steps", "100 steps", "200 steps", "1500 steps", "20000 steps",
    ]  # fmt: skip
    compare.main(words, FakeBench)
    assert len(FakeBench.made) == 2 * first and len(rows_of()) == 2 * first
    capsys.readouterr()
    compare.main(words, lambda *_: pytest.fail("all is there already"))
    out = capsys.readouterr().out
    base = cells_of(out, "base")
    assert (base["seeds"], base["of base"], base["of nearest"]) == ("2", "1.000 (1.000 to 1.000)",
                                                                    "0.250 (0.250 to 0.250)")  # fmt: skip
    assert base["of gptq"].startswith("0.500") and base["held-out / calibration"] == "1.500"
    assert base["of the longest's gain"] == "85.7%" and cells_of(out, "50 steps")["of the longest's gain"] == "21.4%"
    assert cells_of(out, "20000 steps")["of the longest's gain"] == "100.0%"
    assert base["flips"] == "25.0%" and base["memory (MB)"] == "3" and "PSNR" not in out


def test_factors_are_every_value_that_is_not_the_base(script):
    trials = script("trials")
    base = script("gradptq_recipes").defaults()
    names = [trial.name for trial in trials.all_trials(base)]
    assert len(names) == len(set(names))
    for factor, values in trials.FACTORS.items():
        single = [trial for trial in trials.factors(base) if list(trial.options) == [factor] and not trial.rounding]
        single = [trial for trial in single if trial.control is None]
        assert [trial.options[factor] for trial in single] == [value for value in values if value != base[factor]]
    other = [trial.name for trial in trials.factors({**base, "loss": "cosine"})]
    assert "loss mse" in other and "loss cosine" not in other and "loss cosine" in names
    assert "calibration solver" not in names and "calibration uniform" in names
    assert "calibration solver" in [trial.name for trial in trials.all_trials(base, "ndtc")]


def test_every_row_is_a_recipe_on_one_grid(script):
    trials, recipes = script("trials"), script("gradptq_recipes")
    for trial in trials.all_trials(recipes.defaults()):
        config = recipes.recipe(trial, "W3A8", {"steps": 7}, 2, None)
        assert config.ranges()[0] == "mse" and (config.weight_bits, config.activation_bits) == (3, 8)
        assert config.seed == 2 and config.activations == trial.options.get("activations", "dynamic")
        assert isinstance(config, Trained) != bool(trial.rounding)
        if not trial.rounding:
            assert config.steps == trial.options.get("steps", 7)


def test_other_ranges_are_refused(script, monkeypatch):
    recipes, trial = script("gradptq_recipes"), script("trials").Trial("", "base")
    monkeypatch.setattr(Trained, "ranges", lambda self: ("max", None))
    with pytest.raises(UserError, match="are those of 'max', not of 'mse'"):
        recipes.recipe(trial, "W4A8", {}, 0, None)


def test_optimizers_take_their_best_rate(script, capsys):
    compare = script("compare_gradptq")
    compare.main([*SMALL, "--stage", "lr", "--learning-rates", "0.02"], FakeBench)
    assert "tiny W4A8: adam is best at another rate: --base learning_rate=0.01" in capsys.readouterr().out
    assert "adam, rate 0.02" in [row for row, _, _ in FakeBench.made]
    words = [*SMALL[:-1], "f.json", "--stage", "factors", "--base", "learning_rate=0.5", "loss=cosine"]
    compare.main([*words, "--rates", "g.json"], FakeBench)
    rates = {row["row"]: row["learning_rate"] for row in rows_of("f.json")}
    assert rates["optimizer sgd"] == rates["optimizer adamax"] == 0.01
    assert rates["base"] == rates["loss mse"] == 0.5 and rates["nearest"] is None
    Path("f.json").unlink()
    compare.main(words, FakeBench)  # no rates: an optimizer's own, not the base's
    assert {row["row"]: row["learning_rate"] for row in rows_of("f.json")}["optimizer sgd"] is None


def test_rows_that_would_end_too_late_are_left(script, monkeypatch, capsys):
    compare = script("compare_gradptq")
    now = [0.0]
    monkeypatch.setattr(script("long_runs").time, "perf_counter", lambda: now[0])
    measure = FakeBench.measure

    def timed(self, trial, *rest):
        row = measure(self, trial, *rest)
        row["seconds"] = 0.0 if trial.rounding else trial.options.get("steps", 500) / 10
        now[0] += row["seconds"]
        return row

    monkeypatch.setattr(FakeBench, "measure", timed)
    compare.main([*SMALL, "--stage", "steps", "--minutes", "5"], FakeBench)
    assert [row["row"] for row in rows_of()][-1] == "1500 steps"  # 235 s are gone, and 20,000 steps take 2,000
    assert "1 rows are still to do" in capsys.readouterr().out


def test_shards_are_all_rows_and_join(script, capsys):
    compare = script("compare_gradptq")
    words = [*SMALL[:-1], "a.json", "--stage", "pdquant", "--bits", "W4A8", "W2A4"]
    compare.main([*words, "--shard", "0/2"], FakeBench)
    words[words.index("a.json")] = "b.json"
    capsys.readouterr()
    compare.main([*words, "--shard", "1/2", "--join", "a.json"], FakeBench)
    out = capsys.readouterr().out
    found = [*rows_of("a.json"), *rows_of("b.json")]
    trials = [t for t in script("trials").all_trials({}) if t.stage in ("", "pdquant")]
    assert sorted((row["bits"], row["row"]) for row in found) == sorted(
        (bits, trial.name) for bits in ("W4A8", "W2A4") for trial in trials
    )
    assert "tiny W2A4, stage pdquant" in out and cells_of(out, "prediction alone")["of base"] == "1.500"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--bits", "W9A8"], "--bits are like W4A8"),
        (["--base", "speed=3"], "an option of GradPTQConfig; got 'speed=3'"),
        (["--seeds", "9"], "--seeds are from 0 to 8"),
        (["--num-paired", "0"], "--num-paired must be 1 or more"),
        (["--rates", "none.json"], "there is no none.json"),
        (["--shard", "2/2"], "--shard is i/n"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_measures_nothing_is_refused(script, words, says):
    with pytest.raises(UserError, match=says):
        script("compare_gradptq").main([*SMALL, *words], lambda *_: pytest.fail("no work before"))


def test_base_options_are_read_as_they_are_meant(script):
    words = ["steps=50", "train=rounding+scales", "loss=cosine", "correction=true", "learning_rate=1e-3"]
    assert script("gradptq_recipes").base_of(words) == {
        "steps": 50, "train": ("rounding", "scales"), "loss": "cosine", "correction": True, "learning_rate": 1e-3,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ on a model


def tiny(unet):
    from diffusers import DDIMScheduler, DDPMPipeline

    pipe = DDPMPipeline(unet(), DDIMScheduler(timestep_spacing="trailing"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_model_is_measured(script, unet, one_thread):
    compare = script("compare_gradptq")
    trials = script("trials")
    kept = [t for t in trials.all_trials(script("gradptq_recipes").defaults())
            if t.name in ("base", "nearest", "gptq", "calibration one timestep")]  # fmt: skip
    compare.all_trials = lambda *_: kept
    try:
        words = [*SMALL, "--stage", "calibration", "--bits", "W3A8", "--eval", "all"]
        compare.main(words, lambda model, args: script("gradptq_bench").Bench(model, args, tiny(unet)))
    finally:
        compare.all_trials = trials.all_trials
    rows = {row["row"]: row for row in rows_of()}
    assert set(rows) == {trial.name for trial in kept}
    for row in rows.values():
        assert row["eps_error"] > 0 and row["calibration_error"] > 0 and row["psnr"] > 0 and row["device"]
        assert row["commit"] and row["flips"] is None and row["seconds_to_quantize"] > 0
    assert rows["base"]["eps_error"] == rows["gptq"]["eps_error"] != rows["nearest"]["eps_error"]
    assert rows["calibration one timestep"]["calibration_error"] != rows["base"]["calibration_error"]


def test_no_image_is_made_for_eps_alone(script, unet, one_thread, monkeypatch):
    compare, paired = script("compare_gradptq"), script("paired")
    monkeypatch.setattr(paired, "sample", lambda *_, **__: pytest.fail("an image"))
    monkeypatch.setattr(
        compare, "all_trials", lambda *_: [script("trials").Trial("steps", "nearest", rounding="nearest")]
    )
    compare.main(
        [*SMALL, "--stage", "steps"], lambda model, args: script("gradptq_bench").Bench(model, args, tiny(unet))
    )
    assert rows_of()[0]["eps_error"] > 0 and "psnr" not in rows_of()[0]


def test_flips_are_weighed_by_their_layers(script):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 12))
    rows = [{"layer": "0", "flips": 0.5}, {"layer": "1", "flips": 0.1}, {"layer": "1"}]
    assert script("gradptq_bench").flips(rows, model) == pytest.approx((0.5 * 16 + 0.1 * 48) / 64)
    assert script("gradptq_bench").flips(rows[2:], model) is None


@pytest.mark.parametrize("grid", ["uniform", "power"])
def test_flipped_codes_are_as_many_in_other_places(script, unet, one_thread, grid):
    flip = script("controls_trained").flip_trained
    pipe = tiny(unet)
    exact, store = pipe.unet, ptq4dm.collect(pipe, ptq4dm.CalibrationConfig("solver", 4, 3, batch_size=4))
    model, nearest = copy.deepcopy(exact), copy.deepcopy(exact)
    options = {"weight_bits": 4, "activations": "dynamic", "weight_grid": grid}
    ptq4dm.quantize(model, Trained(**options), store)
    ptq4dm.quantize(nearest, Trained(**options, rounding="nearest"))
    flipped = copy.deepcopy(model)
    flip(flipped, exact, store, 0)

    def off(one):
        return {
            name: (layer.dequantized_weight() != nearest.get_submodule(name).dequantized_weight()).sum().item()
            for name, layer in one.named_modules() if isinstance(layer, RoundedLayer)
        }  # fmt: skip

    assert off(flipped) == off(model) and sum(off(model).values()) > 100
    layer = "down_blocks.0.resnets.0.conv1"
    assert not torch.equal(*(one.get_submodule(layer).dequantized_weight() for one in (flipped, model)))
    with pytest.raises(UserError, match="off the nearest"):
        flip(nearest, exact, store, 0)
