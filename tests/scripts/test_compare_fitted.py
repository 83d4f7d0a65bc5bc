"""The comparison of fitted schedules at toy size: its ways, its controls, and that it resumes."""

import importlib
import json
import math
from pathlib import Path

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from models import pixel_dit
from ptq4dm.pipelines.pixel_dit import PixelDiTPipeline

ROOT = Path(__file__).resolve().parents[2]


def test_ways_are_measured_and_resumed(tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "comparisons"))
    script = importlib.import_module("compare_fitted")
    PixelDiTPipeline(pixel_dit(), FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "m")
    sizes = ["--num", "4", "--teacher-steps", "8", "--right", "12", "--random", "2", "--evaluations", "2", "3"]
    command = ["--model", str(tmp_path / "m"), *sizes, "--samplers", "deis", "--output", str(tmp_path / "rows.json")]
    script.main(command)
    found = json.loads((tmp_path / "rows.json").read_text())
    ways = ["deis", "fitted, history 3, jitter 0.01", "even grid, fitted weights", "2 random grids, fitted weights"]
    assert [(row["way"], row["evaluations"]) for row in found["rows"]] == [(way, n) for n in (2, 3) for way in ways]
    errors = {(row["way"], row["evaluations"]): row["error"] for row in found["rows"]}
    assert all(math.isfinite(error) and error > 0 for error in errors.values())
    assert errors[ways[1], 3] < errors["deis", 3]
    assert "| 2 | 3 |" in capsys.readouterr().out

    found["rows"][0]["error"] = 7.0  # what is there is not measured again
    (tmp_path / "rows.json").write_text(json.dumps(found))
    script.main([*command, "--jitters", "0.01", "0.1"])
    again = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert again[0]["error"] == 7.0 and len(again) == 10
    assert again[-1]["way"] == "fitted, history 3, jitter 0.1"
    with pytest.raises(Exception, match="other settings"):
        script.main([*command, "--num", "5"])
