"""The ablation table of block training: rows, what resumes, ratios, workers, the shuffled control."""

import argparse
import copy
import importlib
import json
import multiprocessing
import os
import pickle
import re
import time
import types
from pathlib import Path

import pytest
import torch

import ptq4dm
from models import plain_unet
from ptq4dm.errors import UserError
from ptq4dm.layers.rounded import RoundedLayer
from ptq4dm.rounding.optimizers import OPTIMIZERS

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "comparisons"
SMALL = ["--sampling-steps", "3", "--num-paired", "3", "--calibration-samples", "4", "--batch-size", "4"]
SMALL += ["--device", "cpu", "--model", "tiny", "--output", "g.json"]
AS_PUBLISHED = "prediction 1.0, variable sigmoid, start nearest, augmentation qdrop, learning_rate 0.1"


class FakeBench:
    """Figures from the row's name, every row in a second. Where the file "fail" names a row, it fails."""

    made: list = []

    def __init__(self, model, args):
        self.model, self.args = model, args

    def measure(self, trial, bits, seed, rate=None):
        recipe = importlib.import_module("gradptq_recipes").recipe(trial, bits, self.args.options, seed, rate)
        self.made.append((trial.name, bits, seed))
        if Path("fail").exists() and trial.name == Path("fail").read_text():
            raise RuntimeError("no memory for it")
        error = {"nearest": 8.0, "gptq": 4.0, "base": 2.0, "20000 steps": 1.0, "50 steps": 6.5}.get(trial.name, 3.0)
        if trial.stage == "lr":
            error = abs(trial.options["learning_rate"] - 0.01) + 0.5
        return {
            "model": self.model, "bits": bits, "stage": trial.stage, "row": trial.name, "seed": seed,
            "options": trial.options, "eps_error": error * (1 + seed), "calibration_error": error, "seconds": 1.0,
            "learning_rate": getattr(recipe, "rate", None), "flips": None if trial.rounding else 0.25,
            "seconds_to_quantize": 2.0, "memory_to_quantize": 3_000_000,
        }  # fmt: skip


@pytest.fixture
def unet():
    return plain_unet


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Imports a file of scripts/comparisons; the working folder is a new one."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.chdir(tmp_path)
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
        "20000 steps", "base", "nearest", "gptq", "gptq, after quantized blocks",
        "50 steps", "100 steps", "200 steps", "500 steps", "1500 steps",
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
        own = ("rounding",) if factor == "train" else base[factor]  # inputs are dynamic: there are no ranges
        assert [trial.options[factor] for trial in single] == [value for value in values if value != own]
    other = [trial.name for trial in trials.factors({**base, "loss": "cosine", "start": "nearest"})]
    assert "loss mse" in other and "loss cosine" not in other and "loss cosine" in names
    assert "calibration solver" not in names and "calibration uniform" in names
    assert "calibration solver" in [trial.name for trial in trials.all_trials(base, "ndtc")]
    assert {"start nearest", "start nearest, variable sigmoid"} <= {*names} and "start gptq" in other
    assert "train rounding, activations static" not in names  # said in one order
    assert {"activations static, train rounding", "activations static, train ranges"} <= {*names}
    assert [name for name in names if name.startswith("prediction")] == [
        "prediction 0.3", "prediction 1.0", "prediction 3.0", AS_PUBLISHED, AS_PUBLISHED.replace("qdrop", "none"),
        "prediction 1.0, start nearest", "prediction 1.0, start nearest, augmentation qdrop", "prediction alone",
    ]  # fmt: skip
    fewer = "num_tuples 64, prediction 1.0"
    assert {fewer, f"{fewer}, correction True"} <= {*names}
    assert "prediction 0.0" in [trial.name for trial in trials.prediction({**base, "prediction": 1.0})]


def test_a_base_with_static_inputs_counts_its_ranges(script):
    trials, base = script("trials"), {**script("gradptq_recipes").defaults(), "activations": "static"}
    names = [trial.name for trial in trials.factors(base)]
    assert "train rounding" in names and not [name for name in names if "static" in name]


def test_rates_are_of_each_optimizer_and_variable(script):
    trials, recipes = script("trials"), script("gradptq_recipes")
    base = recipes.defaults()
    rows = trials.learning_rates(base, (0.5,))
    found = {}
    for row in rows:
        found.setdefault(tuple(row.options[name] for name in recipes.TUNED), []).append(row.options["learning_rate"])
    start, variable = base["start"], base["variable"]
    assert (start, variable) == ("gptq", "straight-through")
    assert found == {
        **{(name, variable, start): sorted((*rates, 0.5)) for name, rates in trials.RATES.items()},
        **{
            ("adam", name, start): sorted((*rates, 0.5))
            for name, rates in trials.VARIABLE_RATES.items() if name != variable
        },
        **{
            ("adam", name, "nearest"): sorted((*trials.VARIABLE_RATES[name], 0.5))
            for name in (variable, "sigmoid")
        },
    }  # fmt: skip


def test_every_row_is_a_recipe_on_one_grid(script):
    trials, recipes = script("trials"), script("gradptq_recipes")
    for trial in trials.all_trials(recipes.defaults()):
        config = recipes.recipe(trial, "W3A8", {"steps": 7, "num_tuples": 99}, 2)
        objective = config.ranges()[0]
        assert (objective, config.weight_bits, config.activation_bits, config.num_tuples) == (
            "mse", 3, 8, trial.options.get("num_tuples", 99),
        )  # fmt: skip
        assert config.seed == 2 and config.activations == trial.options.get("activations", "dynamic")
        assert isinstance(config, ptq4dm.GradPTQConfig) != bool(trial.rounding)
        if not trial.rounding:
            assert config.steps == trial.options.get("steps", 7)
    nearest = recipes.recipe(trials.Trial("", "nearest", rounding="nearest"), "W4A8", {}, 0)
    assert nearest.num_tuples == ptq4dm.GradPTQConfig().num_tuples != ptq4dm.PTQ4DMConfig().num_tuples


def test_other_ranges_are_refused(script, monkeypatch):
    recipes, trial = script("gradptq_recipes"), script("trials").Trial("", "base")
    monkeypatch.setattr(ptq4dm.GradPTQConfig, "ranges", lambda self: ("max", None))
    with pytest.raises(UserError, match="are those of 'max', not of 'mse'"):
        recipes.recipe(trial, "W4A8", {}, 0, None)


def test_optimizers_and_variables_take_their_best_rate(script, capsys):
    compare = script("compare_gradptq")
    compare.main([*SMALL, "--stage", "lr", "--learning-rates", "0.02"], FakeBench)
    out = capsys.readouterr().out
    assert "tiny W4A8: base, seed 0, has the rate 0.001; stage lr is best at 0.01" in out
    assert "adam, rate 0.02" in [row for row, _, _ in FakeBench.made]
    words = [*SMALL[:-1], "f.json", "--stage", "factors", "--base", "learning_rate=0.5", "loss=cosine"]
    compare.main([*words, "--rates", "g.json"], FakeBench)
    rates = {row["row"]: row["learning_rate"] for row in rows_of("f.json")}
    assert rates["optimizer sgd"] == rates["optimizer adamax"] == rates["variable sigmoid"] == 0.01
    assert rates["variable division"] == 0.01
    assert rates["base"] == rates["loss mse"] == 0.5 and rates["nearest"] is None
    assert rates["start nearest"] == rates["start nearest, variable sigmoid"] == 0.01
    Path("f.json").unlink()
    compare.main(words, FakeBench)  # no rates: an optimizer's own, not the base's; a variable has none of its own
    rates = {row["row"]: row["learning_rate"] for row in rows_of("f.json")}
    assert rates["optimizer sgd"] in (None, OPTIMIZERS["sgd"].learning_rate)
    assert rates["variable sigmoid"] == 0.5


def test_rates_of_the_same_command_are_waited_for(script):
    """Rows that take their rate from stage lr come last, and see it."""
    compare = script("compare_gradptq")
    compare.main([*SMALL, "--stage", "lr", "factors"], FakeBench)
    made = [row for row, _, _ in FakeBench.made]
    first = min(made.index(name) for name in made if name.startswith(("optimizer", "variable")))
    assert all("rate" not in name for name in made[first:])
    rates = {row["row"]: row["learning_rate"] for row in rows_of()}
    assert rates["optimizer sgd"] == rates["optimizer adamax"] == 0.01


def test_patterns_choose_rows(script, capsys):
    compare = script("compare_gradptq")
    compare.main([*SMALL, "--stage", "lr", "factors", "--only", "base", "loss *"], FakeBench)
    assert [row for row, _, _ in FakeBench.made] == ["base", "loss fisher", "loss cosine", "loss relative"]
    with pytest.raises(UserError, match="no row is called 'lass"):
        compare.main([*SMALL, "--only", "lass *"], lambda *_: pytest.fail("no work before"))


def test_more_seeds_are_for_rows_near_the_base(script):
    """Errors are 2 of the base, 8 and 4 of nearest and Hessian rounding, 3 of others, 1 of the longest."""
    compare = script("compare_gradptq")
    words = [*SMALL, "--stage", "pdquant", "steps"]
    compare.main(words, FakeBench)
    made = [row for row, _, _ in FakeBench.made]
    assert made.index("prediction 0.3") < made.index("50 steps")  # stages in the order that was given
    FakeBench.made.clear()
    compare.main([*words, "--near", "0.1", "--seeds", "1"], FakeBench)
    assert [row for row, _, _ in FakeBench.made] == [
        "20000 steps", "base", "nearest", "gptq", "gptq, after quantized blocks",
    ]  # fmt: skip
    FakeBench.made.clear()
    compare.main([*words, "--near", "0.5", "--seeds", "1", "2", "--only", "prediction*", "50 steps"], FakeBench)
    assert {row for row, _, seed in FakeBench.made} == {name for name in made if name.startswith("prediction")}
    assert {seed for _, _, seed in FakeBench.made} == {1, 2}


def test_a_row_that_fails_is_told_and_others_go_on(script, capsys):
    compare = script("compare_gradptq")
    Path("fail").write_text("gptq")
    compare.main([*SMALL, "--stage", "steps"], FakeBench)
    out = capsys.readouterr().out
    assert "failed: tiny: W4A8, gptq, seed 0: no memory for it" in out
    assert "left out: tiny: W4A8, gptq, seed 0: no memory for it" in out
    assert "tiny: W4A8, nearest, seed 0: error 8.000e+00, 1 s" in out
    assert len(rows_of()) == len(FakeBench.made) - 1 > 5


# ------------------------------------------------------------------------------------------------ workers


class WorkerBench(FakeBench):
    """Each process tells its own number, and its threads and GPU; it waits until another has begun, too."""

    def __init__(self, model, args):
        super().__init__(model, args)
        Path(f"begun-{os.getpid()}").touch()
        end = time.monotonic() + 60
        while len(list(Path().glob("begun-*"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)

    def measure(self, trial, bits, seed, rate=None):
        row = super().measure(trial, bits, seed, rate)
        if trial.name == "1500 steps":
            os._exit(7)  # as if killed
        return row | {"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}


@pytest.fixture
def forks(monkeypatch):
    """Workers begin as copies of this process, which takes no time; what they are given could be sent to others."""
    context = multiprocessing.get_context("fork")

    def process(target, args):
        pickle.dumps((target, args[3:]))  # past a pipe and counters, which go to children alone
        return context.Process(target=target, args=args)

    made = types.SimpleNamespace(Process=process, Pipe=context.Pipe, Value=context.Value)
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: {"spawn": made}[kind])


def test_workers_share_rows_and_one_may_die(script, capfd, monkeypatch, forks):
    compare, workers = script("compare_gradptq"), script("workers")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    words = [*SMALL, "--stage", "steps", "--workers", "2"]
    before = script("ptq4dm.files.rows").Rows(Path("g.worker-7.json"), settings(compare, words))
    before.add(FakeBench("tiny", args_of(compare, words)).measure(trial_of(script, "gptq"), "W4A8", 0))
    Path("fail").write_text("nearest")
    compare.main(words, WorkerBench)
    out = capfd.readouterr().out
    assert re.search(r"left out: worker \d: it ended with status 7", out)
    assert "left out: tiny: W4A8, nearest, seed 0: no memory for it" in out
    assert "tiny: W4A8, base, seed 0: error 2.000e+00, 1 s" in out and "1 rows are still to do" in out
    rows = {row["row"]: row for row in rows_of()}
    assert len(rows) == len(rows_of()) == 8 and {"nearest", "1500 steps"}.isdisjoint(rows)
    assert "pid" not in rows["gptq"]  # a killed command left it
    pids = {row["pid"] for row in rows.values() if "pid" in row}
    assert {row["workers"] for row in rows.values() if "pid" in row} == {2}
    assert len(pids) == 2 and os.getpid() not in pids and not list(Path().glob("g.worker-*"))
    assert {row["threads"] for row in rows.values() if "pid" in row} == {str(max(1, torch.get_num_threads() // 2))}
    assert "OMP_NUM_THREADS" not in os.environ
    assert workers.shard_path(Path("out/g.json"), 3) == Path("out/g.worker-3.json")


def args_of(compare, words):
    args = compare.arguments().parse_args(words)
    args.options, args.whole, args.rated = {}, importlib.import_module("gradptq_recipes").defaults(), []
    return args


def settings(compare, words):
    return {name: getattr(args_of(compare, words), name) for name in compare.SETTINGS}


def trial_of(script, name):
    trials = script("trials").all_trials(script("gradptq_recipes").defaults())
    return next(trial for trial in trials if trial.name == name)


def test_workers_of_a_killed_command_end(script, monkeypatch):
    workers, rows = script("workers"), script("ptq4dm.files.rows").Rows
    gone = type("Gone", (), {"is_alive": staticmethod(lambda: False)})
    monkeypatch.setattr(workers.multiprocessing, "parent_process", lambda: gone)
    args = args_of(script("compare_gradptq"), SMALL)
    task = workers.Task("tiny", "base", None)
    never = lambda *_: pytest.fail("a row")  # noqa: E731
    assert workers.measure_rows([task], rows(Path("g.json"), {}), never, args, never) == (0, {})


def test_workers_take_gpus_in_turn(script, monkeypatch):
    workers = script("workers")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    seen = []
    for place in range(3):
        with workers._environment(place, 3, "cuda"):
            seen.append((os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]))
    assert seen == [("4", "3"), ("6", "3"), ("4", "3")] and os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert workers.gpus() == ["0", "1"]
    with workers._environment(1, 2, "cuda"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_processes_share_turns_and_the_longest_row(script, monkeypatch):
    workers, runs = script("workers"), script("long_runs")
    now = [0.0]
    monkeypatch.setattr(runs.time, "time", lambda: now[0])
    turns = workers.Turns([workers.Task("m", str(i), i) for i in range(5)])
    one, two = iter(turns), iter(turns)
    assert [next(one).key, next(two).key, next(one).key, *(task.key for task in two)] == [0, 1, 2, 3, 4]
    assert list(one) == []
    deadline = runs.Deadline(1)
    assert not deadline.passed(1e9)
    deadline.took(10, 2)
    deadline.took(4)
    now[0] = 50.0
    assert not deadline.passed(2) and deadline.passed(2.1)
    assert not runs.Deadline(None).passed()


def test_rows_that_would_end_too_late_are_left(script, monkeypatch, capsys):
    compare = script("compare_gradptq")
    now = [0.0]
    monkeypatch.setattr(script("long_runs").time, "time", lambda: now[0])
    measure = FakeBench.measure

    def timed(self, trial, *rest):
        row = measure(self, trial, *rest)
        row["seconds"] = 0.0 if trial.rounding else max(trial.options.get("steps", 300), 100) / 10
        now[0] += row["seconds"]
        return row

    monkeypatch.setattr(FakeBench, "measure", timed)
    words = [*SMALL, "--stage", "steps", "--only", "base", "nearest", "gptq", "50 steps", "* steps"]
    compare.main([*words, "--minutes", "0.6"], FakeBench)
    # The longest begins first, for nothing is known; it takes 2000 s.
    assert [row["row"] for row in rows_of()] == ["20000 steps"] and "8 rows are" in capsys.readouterr().out
    compare.main([*words, "--minutes", "2.5"], FakeBench)
    # base, 50 and 100 steps: 50 s. 200 steps end at 70 s, 500 at 120 s, and 1500 would take 150 s.
    assert rows_of()[-1]["row"] == "500 steps" and "1 rows are still to do" in capsys.readouterr().out


def test_slow_rows_begin_first_and_hold_no_others_up(script, monkeypatch, capsys):
    compare = script("compare_gradptq")
    now = [0.0]
    monkeypatch.setattr(script("long_runs").time, "time", lambda: now[0])
    measure = FakeBench.measure

    def timed(self, trial, *rest):
        row = measure(self, trial, *rest)
        slow = trial.options.get("prediction") or trial.options.get("unit") == "layer"
        row["seconds"] = 100.0 if slow else 1.0
        now[0] += row["seconds"]
        return row

    monkeypatch.setattr(FakeBench, "measure", timed)
    words = [*SMALL, "--stage", "pdquant", "factors", "--only", "base", "loss *", "unit *", "prediction [013a]*"]
    compare.main([*words, "--minutes", "5"], FakeBench)
    # At 200 s a third of 100 s may begin, and then nothing, of a kind that nobody has seen either.
    assert [row for row, _, _ in FakeBench.made] == ["prediction 0.3", "prediction 1.0", "prediction 3.0"]
    now[0] = 0.0
    FakeBench.made.clear()
    compare.main([*words, "--minutes", "3.99"], FakeBench)
    # At 200 s no third one of them, nor any of the layers', but rows of one second, once the first of them is known:
    # that one is judged by the longest, and there is no time for it.
    assert [row for row, _, _ in FakeBench.made] == [AS_PUBLISHED, AS_PUBLISHED.replace("qdrop", "none")]
    now[0] = 0.0
    FakeBench.made.clear()
    compare.main([*words, "--minutes", "3.9", "--only", "base", "loss *", "unit *"], FakeBench)
    assert [row for row, _, _ in FakeBench.made] == [
        "unit layer",
        "base",
        "loss fisher",
        "loss cosine",
        "loss relative",
    ]


def test_shards_are_all_rows_and_join(script, capsys):
    compare = script("compare_gradptq")
    words = [*SMALL[:-1], "a.json", "--stage", "pdquant", "--bits", "W4A8", "W2A4"]
    compare.main([*words, "--shard", "0/2"], FakeBench)
    words[words.index("a.json")] = "b.json"
    capsys.readouterr()
    compare.main([*words, "--shard", "1/2", "--join", "a.json"], FakeBench)
    out = capsys.readouterr().out
    found = [*rows_of("a.json"), *rows_of("b.json")]
    trials = [
        t for t in script("trials").all_trials(script("gradptq_recipes").defaults()) if t.stage in ("", "pdquant")
    ]
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
        (["--near", "-1"], "--near is a share"),
        (["--workers", "0"], "--workers must be 1 or more"),
        (["--workers", "2", "--device", "cuda:1"], "give --device cuda"),
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
    words = [*SMALL, "--stage", "calibration", "--bits", "W3A8", "--eval", "all", "--base", "steps=2"]
    words += ["step_tuples=4", "--calibration-samples", "8"]
    words += ["--only", "base", "nearest", "gptq*quantized blocks", "calibration one timestep"]
    compare.main(words, lambda model, args: script("gradptq_bench").Bench(model, args, tiny(unet)))
    rows = {row["row"]: row for row in rows_of()}
    assert set(rows) == {"base", "nearest", "gptq, after quantized blocks", "calibration one timestep"}
    for row in rows.values():
        assert row["eps_error"] > 0 and row["calibration_error"] > 0 and row["psnr"] > 0 and row["device"]
        assert row["commit"] and row["seconds_to_quantize"] > 0
    assert rows["base"]["flips"] > 0 and rows["nearest"]["flips"] is None
    assert rows["base"]["learning_rate"] == 1e-3 and rows["nearest"]["learning_rate"] is None
    assert rows["base"]["eps_error"] < rows["nearest"]["eps_error"]
    assert rows["calibration one timestep"]["calibration_error"] != rows["base"]["calibration_error"]
    stores = sorted(path.name for path in Path("g-calibration").iterdir())
    assert stores == ["tiny-one-timestep-8-of-3-steps-seed-0", "tiny-solver-8-of-3-steps-seed-0"]


def test_no_image_is_made_for_eps_alone(script, unet, one_thread, monkeypatch):
    compare, paired = script("compare_gradptq"), script("paired")
    monkeypatch.setattr(paired, "sample", lambda *_, **__: pytest.fail("an image"))
    words = [*SMALL, "--stage", "steps", "--only", "nearest", "--stores", "kept"]
    compare.main(words, lambda model, args: script("gradptq_bench").Bench(model, args, tiny(unet)))
    assert [path.name for path in Path("kept").iterdir()] == ["tiny-solver-4-of-3-steps-seed-0"]
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
    options = {"activations": "dynamic", "weight_grid": grid}
    ptq4dm.quantize(model, ptq4dm.GradPTQConfig(**options, steps=2), store)
    ptq4dm.quantize(nearest, ptq4dm.GradPTQConfig(**options, rounding="nearest"), store)
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


def test_blocks_of_a_long_row_are_kept(script):
    """So that the command goes on with it where it was killed: each row in a folder of its own."""
    trials, bench = script("trials"), script("gradptq_bench")
    made = object.__new__(bench.Bench)
    made.model = "tiny"
    made.args = argparse.Namespace(stores=None, output=Path("out/g.json"), whole={"steps": 300})
    long = trials.Trial("steps", "20000 steps", {"steps": 20000})
    assert made._kept(trials.Trial("", "base"), "W4A8", 0) is None
    assert made._kept(trials.Trial("", "gptq", {"steps": 20000}, rounding="gptq"), "W4A8", 0) is None
    folders = [made._kept(long, bits, seed) for bits in ("W4A8", "W3A8") for seed in (0, 1)]
    assert len({*folders}) == 4 and {folder.parent for folder in folders} == {Path("out/g-calibration")}
