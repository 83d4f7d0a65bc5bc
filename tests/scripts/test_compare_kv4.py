"""What 4-bit keys and values cost: planted outliers leave the function, rows resume, smoothing is what helps."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import ptq4dm
from ptq4dm.errors import UserError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "comparisons"
SMALL = ["--models", "pixart", "--num-models", "1", "--tuples", "4", "--output", "kv4.json"]
WEIGHTS = ["--method", "rtn", "--rounding", "nearest"]


@pytest.fixture
def script(monkeypatch, tmp_path, one_thread):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("compare_kv4")
    monkeypatch.setattr(module, "HEAD", 16)
    monkeypatch.setattr(module, "TOKENS", 9)
    return module


def main(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare_kv4.py", *SMALL, *WEIGHTS, *arguments])
    script.main()


@pytest.mark.parametrize("name", ["pixart", "wan"])
def test_planted_outliers_leave_the_function(name, script):
    args = dict(method="rtn", rounding="nearest", tuples=4, batch_size=4)
    plain, planted = (script.Bench(argparse.Namespace(**args, outlier=o), name, 0) for o in (1.0, 16.0))
    torch.testing.assert_close(planted.predict(planted.exact, plain.held_out), plain.truth, rtol=1e-4, atol=1e-4)
    attn = planted.exact.get_submodule(planted.cross[0])
    keys, before = (attn.norm_k or attn.to_k).weight, plain.exact.get_submodule(planted.cross[0])
    ratio = keys / (before.norm_k or before.to_k).weight
    assert (ratio.flatten(1)[:, 0] if ratio.ndim > 1 else ratio).round().tolist().count(16) == 4 * script.PLANTED


def test_rows_a_table_and_what_resumes(script, monkeypatch, capsys):
    main(script, monkeypatch)
    first = capsys.readouterr().out
    rows = {row["smoothing"]: row for row in json.loads(Path("kv4.json").read_text())["rows"]}
    assert tuple(rows) == script.SMOOTHING and first.count("| pixart |") == 8
    adds = {name: row["4 bits"] / row["W4A8"] - 1 for name, row in rows.items()}
    assert adds["alpha 1"] < adds["none"] and adds["alpha 0.5"] < adds["alpha 0.5, shuffled"]
    alone = {how: rows["alpha 1"][f"alone: {how}"] for how in script.FOUR}
    assert len(set(alone.values())) == 5 and alone["4 bits"] < alone[script.NEAREST]
    assert all(row["float"] < 1e-8 for row in rows.values())  # smoothing is the same function
    assert rows["none"]["4 bits: bytes"] / rows["none"]["16 bits: bytes"] == (4 + 32 / 16) / 16
    monkeypatch.setattr(ptq4dm, "quantize", None)  # nothing is made again
    main(script, monkeypatch)
    assert capsys.readouterr().out == first
    with pytest.raises(UserError, match="other settings"):
        main(script, monkeypatch, "--outlier", "8")
