"""The script that compares a one-step student with its teacher: what it reads of a finished comparison."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "results" / "distillation-unet-cifar10.json"
STUDENTS = ["--student", "out/student", "--student", "out/plain"]


@pytest.fixture
def compare(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "comparisons"))
    module = importlib.import_module("compare_distillation")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "measure", lambda row, args: pytest.fail(f"{row} is there already"))
    shutil.copyfile(RESULTS, "d.json")
    return module


def test_a_finished_comparison_prints_its_table_and_curves(compare, capsys):
    before = Path("d.json").read_bytes()
    compare.main([*STUDENTS, "--output", "d.json", "--device", "cpu"])
    out = capsys.readouterr().out
    rows = json.loads(before)["rows"]
    assert len([line for line in out.splitlines() if line.startswith("| ")]) == len(rows) + 1 == 17
    first = next(r for r in rows if r["model"] == "out/student" and r["bits"] == "full")
    assert f"| student | one step | 1 | full | {first['feature_fid']:.2f} |" in out
    with Image.open("d.png") as picture:
        assert picture.format == "PNG"
    assert Path("d.json").read_bytes() == before


def test_a_log_that_is_there_counts_before_the_output(compare):
    assert len(compare.curves(["out/student"], Path("d.json"))["out/student"]) == 26
    folder = Path("out/student.run")
    folder.mkdir(parents=True)
    lines = [
        {"stage": "evaluation", "images": 0, "degraded_images": 0, "feature_fid": 9.0},
        {"stage": "distillation"},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = compare.curves(["out/student"], Path("d.json"))
    assert curves["out/student"] == lines[:1] and len(curves["out/plain"]) == 14
    compare.draw(curves, [], Path("d.png"))  # one of the two has not been trained yet
