"""scripts/comparisons/compare_attention8.py: its rows, and that the planted mean is seen by the control alone."""

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "scripts" / "comparisons"


def test_rows(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("compare_attention8")
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["compare_attention8.py", "--seeds", "1", "--steps", "1", "--output", str(out)])
    module.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    psnr = {row["case"]: row["psnr_db"] for row in rows if "layer" not in row}
    assert psnr["int8"] > psnr["e4m3"] > 30 and psnr["planted mean, attention as it was"] > 90
    assert psnr["planted mean, int8"] == pytest.approx(psnr["int8"], abs=6)
    assert psnr["planted mean, left in: control"] < psnr["planted mean, int8"] - 6
    assert psnr["only one timestep"] == pytest.approx(psnr["int8"], abs=1e-6)  # there is one
    assert sum(row["case"] == "only one layer" for row in rows) == 8
