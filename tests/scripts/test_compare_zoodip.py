"""The comparison of personalization: rows run on a small DiT, resume, and the table says what they hold."""

import copy
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import personal
import ptq4dm
from ptq4dm.errors import UserError
from ptq4dm.pipelines.images import save_png

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "training"
SMALL = ["--steps", "2", "--batch-size", "1", "--perturbations", "2", "--back-steps", "2", "--evaluation", "6"]
SMALL += ["--samples", "2", "--sampler-steps", "1", "--rows-at-once", "6", "--images", "2", "--seeds", "1"]
SMALL += ["--timed-seconds", "0"]
SMALL += ["--device", "cpu", "--data", "data", "--output", "rows.jsonl"]


@pytest.fixture
def script(monkeypatch, tmp_path, one_thread):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        (tmp_path / "data" / split / "ship").mkdir(parents=True)
        for k, picture in enumerate(personal.pictures(3, 32, 32)):
            save_png(picture, tmp_path / "data" / split / "ship" / f"{k}.jpg", {})
    small = personal.classes(sample_size=32, patch_size=8)
    monkeypatch.setattr(ptq4dm, "load_reference", lambda *_: copy.deepcopy(small))
    return importlib.import_module("compare_zoodip")


def main(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare_zoodip.py", *SMALL, *arguments])
    script.main()
    path = Path("rows.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_rows_are_measured_once_and_shared_out(script, monkeypatch, capsys):
    rows = ["--rows", "W8A8 both 0", "W8A8 walk 0", "W8A8 shuffled 0", "W8A8 start"]
    first = main(script, monkeypatch, *rows, "--share", "1/2")
    assert [line["row"] for line in first] == ["W8A8 both 0", "W8A8 shuffled 0"]
    every = main(script, monkeypatch, *rows)
    assert [line["row"] for line in every[2:]] == ["W8A8 walk 0", "W8A8 start"] and every[:2] == first
    found = {line["arm"]: line for line in every}
    assert found["start"]["drop"] == 0 and all(line["unchanged"] for line in every)
    assert found["walk"]["moved"] > 0 and len({line["loss"] for line in every}) == 4
    assert found["both"]["config"]["first_time"] is None and found["both"]["config"]["subspace"] == "paper"
    capsys.readouterr()
    main(script, monkeypatch, "--report")
    table = capsys.readouterr().out
    assert "| W8A8 | shuffled |" in table and "changed by tuning: none" in table


def test_back_propagation_lowers_the_loss_and_memory_is_measured(script, monkeypatch):
    rows = ["--rows", "float32 back-propagation 0", "float32 memory", "--back-steps", "4", "--back-lr", "0.3"]
    ceiling, memory = main(script, monkeypatch, *rows)
    assert ceiling["drop"] > 0 and ceiling["config"]["last_time"] == 1.0
    assert memory["one image: back-propagation"]["per_second"] > 0


def test_rows_start_where_their_names_say(script, monkeypatch):
    names = ["W8A8 start*", "W8A8 both, near 0", "W8A8 walk, null 0", "float32 back-propagation, null 0"]
    every = main(script, monkeypatch, "--rows", *names, "--evaluation", "4")
    found = {line["row"]: line for line in every}
    near, null = (found[f"W8A8 start, {init}"] for init in ("near", "null"))
    assert near["init"] == found["W8A8 both, near 0"]["init"] and near["init"] in set("012345679")  # no ship
    assert null["init"] == found["W8A8 walk, null 0"]["init"] == "null" and found["W8A8 start"]["init"] == "mean"
    assert len({found[name]["loss"] for name in found}) == len(found) == 6
    assert near["drop"] == null["drop"] == 0 and found["float32 back-propagation, null 0"]["moved"] > 0


def test_the_table_of_memory_sets_works_side_by_side(script):
    def row(model, **peaks):
        works = {f"one image: {what}": {"peak_bytes": peak, "per_second": 1.0} for what, peak in peaks.items()}
        return {"row": f"{model} memory", "model": model, "arm": "memory", **works}

    back = {"back-propagation": 8_000_000}
    table = script.report([row("float32", step=4_000_000, **back), row("W8A8", step=1_100_000, sampling=1_000_000)])
    assert "| W8A8 | one image: step | 1.1 | 1.10 | 7.27x | 1.0 |" in table
    assert "| float32 | one image: back-propagation | 8.0 |  | 1.00x | 1.0 |" in table


def test_each_control_is_what_it_says(script):
    pipe = personal.classes()
    from ptq4dm.training.personalization.pictures import learned_from
    from ptq4dm.training.personalization.problem import Problem, ready
    from ptq4dm.training.personalization.targets import class_target
    from ptq4dm.training.schedule import schedule_of

    config = ptq4dm.PersonalizeConfig(steps=1, average=0, learning_rate=0.1, batch_size=2)
    pictures = learned_from(pipe, list(personal.pictures(2)))
    problem = Problem(class_target(pipe, 1), pictures, schedule_of(pipe, torch.device("cpu")), config)
    start = problem.target.start
    with ready(pipe):
        own, walk, shuffled = (script.tuned(problem, by) - start for by in ("losses", "walk", "shuffled"))
    torch.testing.assert_close(walk.norm(), own.norm())
    assert abs(float(torch.cosine_similarity(walk, own, 0))) < 0.6
    assert not torch.equal(shuffled, own) and not torch.equal(shuffled, walk)


def test_it_needs_pictures(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare_zoodip.py", "--device", "cpu"])
    with pytest.raises(UserError, match="give --data"):
        script.main()


def test_a_model_of_stable_diffusions_shape_is_measured(script, monkeypatch):
    stable = importlib.import_module("zoodip_stable")
    arguments = [
        "--tiny",
        "--device",
        "cpu",
        "--timed-seconds",
        "0",
        "--models",
        "float32",
        "--output",
        "s.jsonl",
    ]
    for _ in range(2):  # what is there is not measured again
        monkeypatch.setattr(sys, "argv", ["zoodip_stable.py", *arguments])
        stable.main()
    (row,) = [json.loads(line) for line in Path("s.jsonl").read_text().splitlines()]
    assert all(row[f"one image: {work}"]["per_second"] > 0 for work in ("step", "sampling", "back-propagation"))


def test_back_propagation_through_text_has_a_gradient(script):
    stable = importlib.import_module("zoodip_stable")
    pipe, work = stable.works_of("float32", torch.device("cpu"), tiny=True)["back-propagation"]
    grads = []
    text = next(module for name, module in pipe.text_encoder.named_modules() if name.endswith("layers.0"))
    text.register_full_backward_hook(lambda _, __, gradient: grads.append(gradient[0]))
    work()
    assert float(grads[0].abs().max()) > 0
