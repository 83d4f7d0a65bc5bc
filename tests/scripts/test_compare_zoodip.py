"""The comparison of personalization: rows run on the embedded DiT, resume, and the table says what they hold."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import personal
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
    return importlib.import_module("compare_zoodip")


def main(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare_zoodip.py", *SMALL, *arguments])
    script.main()
    path = Path("rows.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_rows_are_measured_once_and_shared_out(script, monkeypatch, capsys):
    rows = ["--rows", "W8A8 both*", "W8A8 walk*", "W8A8 shuffled*", "W8A8 start"]
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
    rows = ["--rows", "float32 back*", "float32 memory", "--back-steps", "4", "--back-lr", "0.3"]
    ceiling, memory = main(script, monkeypatch, *rows)
    assert ceiling["drop"] > 0 and ceiling["config"]["last_time"] == 1.0
    assert memory["one image: back-propagation"]["per_second"] > 0


def test_each_control_is_what_it_says(script):
    pipe = personal.classes()
    from ptq4dm.training.personalization.pictures import learned_from
    from ptq4dm.training.personalization.problem import Problem, ready
    from ptq4dm.training.personalization.schedule import schedule_of
    from ptq4dm.training.personalization.targets import class_target

    config = script.ptq4dm.PersonalizeConfig(steps=1, average=0, learning_rate=0.1, batch_size=2)
    pictures = learned_from(pipe, list(personal.pictures(2)))
    problem = Problem(class_target(pipe, 1), pictures, schedule_of(pipe, torch.device("cpu")), config)
    start = problem.target.start
    with ready(pipe):
        own, walk, shuffled = (script.tuned(problem, arm) - start for arm in ("both", "walk", "shuffled"))
    torch.testing.assert_close(walk.norm(), own.norm())
    assert abs(float(torch.cosine_similarity(walk, own, 0))) < 0.6
    assert not torch.equal(shuffled, own) and not torch.equal(shuffled, walk)


def test_it_needs_pictures(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare_zoodip.py", "--device", "cpu"])
    with pytest.raises(UserError, match="give --data"):
        script.main()
