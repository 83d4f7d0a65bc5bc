"""`ptq4dm allocate`: a plan within the budgets, which `quantize --plan` follows; what it prints and refuses."""

import json
from functools import partial

import pytest
from diffusers import DDIMScheduler, DDPMPipeline

import ptq4dm
from fake_clock import FakeClock
from helpers import same
from models import unet
from ptq4dm.cli.main import main
from ptq4dm.layers.sizes import bytes_in_16_bits
from ptq4dm.methods import ohq

pytestmark = pytest.mark.usefixtures("one_thread")
CANDIDATES = [f"rtn activations=dynamic first_last=same{more}" for more in ("", " weight_bits=4")]
FAST = [
    "--candidates", *CANDIDATES, "--num-tuples", "2", "--draws", "2", "--rounds", "1", "--timed-batch", "2",
    "--num-samples", "2", "--calibration-steps", "2", "--costs", "costs",
]  # fmt: skip
NET = {"block_out_channels": (16, 32)}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    root = tmp_path_factory.mktemp("desk")
    DDPMPipeline(unet(**NET), DDIMScheduler()).save_pretrained(root / "model")
    return root


@pytest.fixture(autouse=True)
def here(desk, monkeypatch):
    monkeypatch.chdir(desk)
    monkeypatch.setattr(ohq, "measured", partial(ohq.measured, clock=FakeClock().install(monkeypatch)))


def test_a_plan_is_made_drawn_and_followed(desk, capsys):
    assert main(["allocate", "--model", "model", "--bytes", "0.42", "--plot", "front.png", *FAST]) == 0
    printed = capsys.readouterr().out
    assert "step in full precision" in printed and "chosen" in printed
    assert (
        "times of one round: uncertain" in printed and "`ptq4dm quantize --plan out/plan.json` follows it" in printed
    )
    assert "8 bits are the fastest" in printed and (desk / "front.png").stat().st_size > 10_000
    plan = json.loads((desk / "out/plan.json").read_text())
    assert plan["method"] == "ohq" and {one["format"] for one in plan["layers"].values()} == {"int8", "int4"}
    assert list((desk / "costs").glob("*.json"))
    assert main(["quantize", "--model", "model", "--plan", "out/plan.json", "--output", "quantized"]) == 0
    pipe = ptq4dm.load_pipeline("quantized")
    assert bytes_in_16_bits(pipe.unet) <= 0.42 * bytes_in_16_bits(unet(**NET))
    followed = unet(**NET)
    ptq4dm.quantize(followed, ptq4dm.OHQConfig(plan=ptq4dm.Plan.load("out/plan.json")))
    assert same(followed, pipe.unet)


def test_facts_are_told_to_programs(capsys):
    assert main(["allocate", "--model", "model", "--bytes", "0.45", "--latency", "0.8", "--json", *FAST]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] <= 0.45 and found["latency"] <= 0.8 and found["predicted_error"] > 0
    assert sum(found["formats"].values()) == len(found["layers"]) and set(found["formats"]) == {"keep", *CANDIDATES}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--bytes", "0.05"], "no choice of formats is within bytes 0.05 of the full-precision model; the least is"),
        (["--bytes", "0"], "bytes is a share of the full-precision model, above 0"),
        (["--latency", "nan"], "latency must be"),
        (["--candidates", "rtnn"], "quantization method 'rtnn' is unknown"),
        (["--share", "1"], "share is a part of a layer's weights"),
        (["--costs", "model/model_index.json"], "costs is a folder of measured times, and"),
    ],
)
def test_wrong_input_is_one_line(capsys, arguments, words, desk):
    assert main(["allocate", "--model", "model", *FAST, *arguments, "--output", "none/plan.json"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert words in told[-1] and not (desk / "none/plan.json").exists()


def test_a_file_that_is_no_plan_stays(desk, capsys):
    (desk / "notes.txt").write_text("mine")
    assert main(["allocate", "--model", "model", *FAST, "--output", "notes.txt"]) == 2
    assert "another kind of file" in capsys.readouterr().err and (desk / "notes.txt").read_text() == "mine"


def test_bytes_out_of_reach_are_told_before_calibration(monkeypatch, capsys):
    monkeypatch.setattr("ptq4dm.cli.quantize.collect", lambda *given, **more: pytest.fail("calibration"))
    line = ["quantize", "--model", "model", "--method", "ohq", "--bytes", "0.05", *FAST]
    assert main(line) == 2 and "the least is bytes" in capsys.readouterr().err
