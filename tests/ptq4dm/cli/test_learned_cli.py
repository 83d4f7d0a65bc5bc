"""Block training on the command line: methods, options, what is said and what is written."""

import json
from pathlib import Path

import pytest
from diffusers import DDIMScheduler, DDPMPipeline

from models import plain_unet
from ptq4dm import CalibrationConfig, UserError, progress
from ptq4dm.cli import quantize as quantize_verb
from ptq4dm.cli.main import main

pytestmark = pytest.mark.usefixtures("one_thread", "few_looks")

FEW = ["--num-tuples", "2", "--steps", "3", "--step-tuples", "2"]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a tiny pipeline, "unet", and a calibration store of it, "store"."""
    root = tmp_path_factory.mktemp("models")
    DDPMPipeline(plain_unet(mid_block_type=None), DDIMScheduler()).save_pretrained(root / "unet")
    few = ["--num-samples", "2", "--calibration-steps", "2", "--seed", "1"]
    assert main(["collect", "--model", f"{root}/unet", "--output", f"{root}/store", *few]) == 0
    return root


@pytest.fixture
def run(models, capsys, tmp_path, monkeypatch):
    """run("--method", ...) -> (status, stdout, stderr) of `quantize` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*options, command="quantize"):
        capsys.readouterr()
        own = ["--model", str(models / "unet"), "--calibration", str(models / "store"), "--output", "q"]
        try:
            status = main([command, *own, *map(str, options)])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize("method", ["gradptq", "pdquant"])
def test_a_method_trains_and_says_what_it_did(run, method, monkeypatch):
    monkeypatch.setattr(progress, "shown", lambda: True)
    rounding = ["--rounding", "learned", "--weight-bits", 4] if method == "pdquant" else []
    status, out, err = run("--method", method, *rounding, *FEW)
    assert status == 0 and "% of a layer's codes are not the nearest" in out and "a block's error is" in out
    assert "error " in err and "(nearest " in err  # of the progress bar
    record = json.loads(Path("q/quantization.json").read_text())
    assert record["method"]["method"] == method and record["method"]["steps"] == 3
    for row in record["layers"]:
        assert 0 <= row["flips"] < 1 and row["block_error"] > 0 and row["block_error_nearest"] > 0
    plan = json.loads(Path("q/plan.json").read_text())
    assert plan["learning"]["steps"] == 3 and plan["starts"].keys() == plan["layers"].keys()


def test_the_json_has_the_figures_of_training(run):
    status, out, _ = run("--method", "gradptq", *FEW, "--json")
    figures = json.loads(out)["trained"]
    assert status == 0 and json.loads(Path("q/quantization.json").read_text())["trained"] == figures
    assert 0 < figures["flips"] < 1 and 0 < figures["of_nearest"] < 1 and 0 < figures["of_start"] <= 1


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        (["--method", "gradptq"], 256),
        (["--method", "gradptq", "--num-tuples", 300], 300),
        (["--method", "gradptq", "--num-tuples", 300, "--num-samples", 2], 2),
        (["--method", "pdquant"], CalibrationConfig.num_samples),
        (["--plan", "plan.json"], 400),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_as_many_samples_are_collected_as_tuples_are_looked_at(models, run, monkeypatch, options, samples):
    run("--method", "gradptq", *FEW)
    plan = json.loads(Path("q/plan.json").read_text())
    plan["packing"]["num_tuples"] = 400
    Path("plan.json").write_text(json.dumps(plan))
    asked = []

    def collect(pipe, config, **_):
        asked.append(config.num_samples)
        raise UserError("enough")

    monkeypatch.setattr(quantize_verb, "collect", collect)
    command = ["quantize", "--model", str(models / "unet"), "--output", "other", *map(str, options)]
    assert main(command) == 2 and asked == [samples]


def test_scales_alone_train_nothing(run):
    status, out, _ = run("--method", "pdquant", "--num-tuples", 1)
    assert status == 0 and "trained:" not in out
    assert "learning" not in json.loads(Path("q/plan.json").read_text())


def test_all_options_reach_the_plan(run):
    given = {
        "steps": 2, "step_tuples": 3, "loss": "relative", "time_weights": [1.0, 2.0], "train": ["rounding", "biases"],
        "variable": "sigmoid", "moves": "wide", "optimizer": "adamw", "learning_rate": 0.02, "start": "nearest",
        "augmentation": "noise", "unit": "layer", "prediction": 0.5, "correction": True,
    }  # fmt: skip
    options = []
    for name, value in given.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        options += [f"--{name.replace('_', '-')}", *values]
    status, _, err = run("--method", "gradptq", "--num-tuples", 1, *options)
    assert status == 0, err
    assert json.loads(Path("q/plan.json").read_text())["learning"] == given


def test_a_correction_collects_more_than_is_trained_on(models, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    asked = []

    def collect(pipe, config, **_):
        asked.append(config.num_samples)
        raise UserError("enough")

    monkeypatch.setattr(quantize_verb, "collect", collect)
    command = [
        "quantize",
        "--model",
        str(models / "unet"),
        "--output",
        "other",
        "--method",
        "gradptq",
        "--correction",
    ]
    assert main([*command, "--num-tuples", "600"]) == 2 and asked == [1200]
    assert main([*command, "--num-tuples", "600", "--num-samples", "600"]) == 2 and asked == [1200]
    assert "correction would change nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--loss", "x"], "loss"),
        (["--steps", "0"], "steps"),
        (["--learning-rate", "-1"], "--learning-rate must be above zero"),
        (["--variable", "spline"], "variable 'spline' is unknown"),
        (["--optimizer", "lion"], "optimizer 'lion' is unknown"),
        (["--train", "everything"], "train is some of"),
        (["--time-weights", "-1"], "time_weights"),
        (["--format", "fp8", "--weight-bits", "8"], "does not serve format 'fp8'"),
        (["--rounding", "nearest", "--steps", "3"], "trains no block, so that steps would change nothing"),
        (["--activations", "dynamic", "--train", "ranges"], "static inputs, and --activations dynamic has none"),
        (["--importance", "random"], "give average_bits too"),
        (["--method", "ptq4dm", "--objective", "mse", "--objective-parameter", "3"], "'mse' has no parameter"),
    ],
)
def test_wrong_options_are_one_line_and_nothing_is_written(run, options, says):
    status, out, err = run("--method", "gradptq", *options)
    assert status == 2 and says in err.replace("-", "_" if says == "time_weights" else "-") and out == ""
    assert len(err.strip().splitlines()) == 1 and not list(Path().iterdir())


def test_an_option_of_training_is_none_of_another_method(run):
    status, _, err = run("--method", "rtn", "--steps", 3)
    assert status == 2 and "steps" in err


def test_a_checkpoint_of_blocks_is_gone_on_with(run):
    command = ["--method", "gradptq", *FEW, "--checkpoint", "blocks"]
    assert run(*command)[0] == 0
    first = Path("q", WEIGHTS).read_bytes()
    made = {path: path.stat().st_mtime_ns for path in Path("blocks").glob("*.safetensors")}
    assert len(made) > 3 and run(*command)[0] == 0 and Path("q", WEIGHTS).read_bytes() == first
    assert made == {path: path.stat().st_mtime_ns for path in Path("blocks").glob("*.safetensors")}
    status, _, err = run(*command, "--learning-rate", 0.5)
    assert status == 2 and "holds the blocks of another quantization" in err
