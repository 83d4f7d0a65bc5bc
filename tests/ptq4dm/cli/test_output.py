"""--json: one object, of plain JSON, and nothing else on stdout. --quiet: nothing at all. For every verb."""

import argparse
import json
import logging
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from diffusers.utils import logging as diffusers_logging

from models import plain_unet
from ptq4dm import progress
from ptq4dm.cli import distill, evaluate, info, output
from ptq4dm.cli.benches import tune
from ptq4dm.cli.main import main
from ptq4dm.cli.verbs import VERBS
from ptq4dm.errors import UserError

FEW = "--num-samples 2 --calibration-steps 2"
STEPS = "--num-inference-steps 1"
PAIRS = "--metric none --num-paired 1 --num-heldout 1"
# Verb -> what to type, and the names of the facts. What a later one needs, an earlier one makes.
TYPED = {
    "collect": (f"--model unet {FEW} --output store", {"model", "store", "networks", "config"}),
    "quantize": (
        "--model unet --calibration store --objective max --output q",
        {"model", "method", "layers", "networks", "left", "bytes_before", "bytes_after", "output", "picture"},
    ),
    "generate": (f"--model unet --num-images 2 {STEPS} --output i", {"model", "output", "images", "picture"}),
    "evaluate": (
        f"--model q {PAIRS} {STEPS} --output e",
        {"model", "full_precision", "scheduler", "paired", "epsilon_error", "bytes", "networks", "report", "picture"},
    ),
    "compare": (
        f"q --num-images 1 --num-heldout 0 --timed-steps 0 {STEPS} --output c",
        {"full_precision", "sampler", "seeds", "models", "not_measured", "warnings", "page", "picture", "report"},
    ),
    "info": (
        "--model q",
        {"model", "pipeline", "denoiser", "scheduler", "quantization", "bytes", "layers", "left", "adapters"},
    ),
    "allocate": (
        "--model unet --bytes 0.9 --num-tuples 2 --draws 1 --rounds 1 --timed-batch 1 --num-samples 2 "
        "--calibration-steps 2 --costs c --output p.json",
        {"model", "latency", "bytes", "predicted_error", "notes", "step_milliseconds", "device", "formats", "layers"},
    ),
    "bench samplers": (
        "--model unet --samplers ddim --evaluations 1 --num-images 2 --output b",
        {"model", "dtype", "num_images", "rows", "figures"},
    ),
    "bench hardware": (
        "--model unet --num-inference-steps 2 --output h",
        {"model", "costs", "source", "steps", "batch_size", "note", "modelled", "figures"},
    ),
    "completion": ("bash", {"shell", "script"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    root = tmp_path_factory.mktemp("desk")
    DDPMPipeline(plain_unet(sample_size=32), DDIMScheduler()).save_pretrained(root / "unet")
    return root


def object_of(text):
    """The one JSON object that a text is, and no NaN in it."""

    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    found = json.loads(text, parse_constant=refuse)
    assert isinstance(found, dict) and found
    return found


@pytest.mark.parametrize("verb", TYPED)
@pytest.mark.usefixtures("one_thread")
def test_json_and_quiet_of_every_verb(verb, desk, monkeypatch, capfd):
    monkeypatch.chdir(desk)
    typed, facts = TYPED[verb]
    command = [*verb.split(), *typed.split()]
    assert main([*command, "--json"]) == 0
    out, _ = capfd.readouterr()
    found = object_of(out)
    assert facts <= set(found) and "error" not in found
    assert main([*command, "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")
    assert (
        main(["--quiet", *command, "--json"]) == 0
    )  # flags may stand before the verb; both together: the object alone
    out, err = capfd.readouterr()
    assert set(object_of(out)) == set(found) and err == ""


def test_every_verb_is_tried():
    others = {"convert", "distill", "train", "personalize", "bench tune"}  # below and in files of their own
    assert {verb.split()[0] for verb in [*TYPED, *others]} == set(VERBS)


@pytest.mark.usefixtures("one_thread")
def test_wrong_input_is_told_on_stderr_alone(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    for flags in (["--json"], ["--quiet"], ["--json", "--quiet"]):
        assert main(["info", "--model", "nowhere", *flags]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("ptq4dm info: 'nowhere' is neither") and err.count("\n") == 1


def test_distill(monkeypatch, tmp_path, capsys):
    lines = [{"stage": "start"}, {"stage": "evaluation", "images": 64, "feature_fid": float("nan")}]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill, "load_pipeline", lambda *a: None)
    monkeypatch.setattr(distill, "check_teacher", lambda *a: None)
    monkeypatch.setattr(distill, "alone_in", lambda *a: nullcontext())
    monkeypatch.setattr(distill.disback, "distill", lambda *a: None)
    monkeypatch.setattr(distill, "save_student", lambda *a: None)
    monkeypatch.setattr(distill, "read_log", lambda path: lines)
    assert main(["distill", "--images", "64", "--json"]) == 0
    found = object_of(capsys.readouterr().out)
    log = [{"stage": "evaluation", "images": 64, "feature_fid": None}]
    assert found == {"model": "unet-cifar10", "output": "out/student", "images": 64, "of": 64,
                     "run": "out/student.run", "log": log}  # fmt: skip
    assert main(["distill", "--images", "64", "--quiet"]) == 0 and capsys.readouterr() == ("", "")


def test_the_facts_of_a_launch():
    launch = argparse.Namespace(name="w4a4 1,2,3", times=[(2.5, {"warps": 4})], before=None, left_out=[("no", {})])
    times = [{"microseconds": 2.5, "setting": {"warps": 4}}]
    assert tune.facts(launch) == {"launch": "w4a4 1,2,3", "before": None, "times": times, "left_out": 1}


# --- the helper itself --------------------------------------------------------------------------------------


def printed(capsys, action, **flags):
    with output.printing(argparse.Namespace(**flags)):
        action()
    return capsys.readouterr()


def test_whatever_others_print_is_not_on_stdout(capsys):
    def chatter():
        print("downloading")
        output.say("text")
        output.result(n=1)
        output.result(n=2, path=Path("a"))

    assert printed(capsys, chatter) == ("downloading\ntext\n", "")
    assert printed(capsys, chatter, json=True) == ('{\n "n": 2,\n "path": "a"\n}\n', "downloading\n")
    assert printed(capsys, chatter, quiet=True) == ("", "")
    assert sys.stdout.write("") == 0  # and it is back


def test_facts_are_not_lost_with_what_fails_after_them(capsys):
    def fail():
        output.result(psnr=20.5)
        raise UserError("the disk is full.")

    with pytest.raises(UserError):
        printed(capsys, fail, json=True)
    assert object_of(capsys.readouterr().out) == {"psnr": 20.5, "error": "the disk is full."}
    with pytest.raises(UserError):
        printed(capsys, fail)
    assert capsys.readouterr().out == ""


def test_processes_beside_the_main_one_print_nothing(capsys, monkeypatch):
    def speak():
        output.say("text")
        output.result(n=1)

    monkeypatch.setattr(output, "main_process", lambda: False)
    assert printed(capsys, speak) == printed(capsys, speak, json=True) == ("", "")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "accelerate", None)
    for rank, main_one in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert output.main_process() is main_one


def test_plain_values():
    nan, inf = float("nan"), float("inf")
    value = {
        "floats": (1.5, nan, inf, -inf), 3: True, "path": Path("a/b"), "dtype": torch.float16, "none": None,
        "numpy": numpy.float64(2.0), "array": numpy.array([1.0, nan]), "tensor": torch.tensor([1, 2]), "set": {7},
    }  # fmt: skip
    assert output.plain(value) == {
        "floats": [1.5, None, None, None], "3": True, "path": "a/b", "dtype": "torch.float16", "none": None,
        "numpy": 2.0, "array": [1.0, None], "tensor": [1, 2], "set": [7],
    }  # fmt: skip
    assert json.dumps(output.plain("caf\udce9")) == '"caf\\udce9"'


def test_bars_and_warnings(capsys):
    def noise():
        warnings.warn("old", stacklevel=1)
        logging.getLogger("somebody").warning("careful")
        logging.getLogger("somebody").error("broken")
        progress.note("waiting")
        states.append((progress.shown(), diffusers_logging.is_progress_bar_enabled()))

    states = []
    before = diffusers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert "waiting" in printed(capsys, noise).err and len(seen) == 1
        err = printed(capsys, noise, quiet=True).err
        assert "waiting" not in err and "careful" not in err and len(seen) == 1
    assert states == [(False, False)] * 2  # stderr is no terminal here
    assert diffusers_logging.is_progress_bar_enabled() == before and logging.root.manager.disable == 0


def test_in_a_terminal_bars_are_shown_but_for_quiet(monkeypatch, capsys):
    states = []
    monkeypatch.setattr(progress, "in_notebook", lambda: True)  # as in a terminal
    for flags in ({}, {"json": True}, {"quiet": True}):
        diffusers_logging.enable_progress_bar()
        printed(capsys, lambda: states.append(diffusers_logging.is_progress_bar_enabled()), **flags)
    assert states == [True, True, False]


def test_the_evaluation_of_images(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    report = {"frechet": {"value": float("inf"), "label": "FID", "num_images": 2, "extractor": "x", "resize": "y",
                          "reference": "z"}, "warnings": []}  # fmt: skip
    monkeypatch.setattr(evaluate, "evaluate_images", lambda *a: report)
    assert main(["evaluate", "--images", "folder", "--json"]) == 0
    found = object_of(capsys.readouterr().out)
    assert found["images"] == "folder" and found["frechet"]["value"] is None


def test_info_has_its_flag_still(monkeypatch, capsys):
    """It had --json before the others did."""
    monkeypatch.setattr(info, "run", lambda args: output.result(json=args.json))
    assert main(["info", "--json"]) == 0 and object_of(capsys.readouterr().out) == {"json": True}
