"""The comparison of reuse with fewer evaluations at toy size: its ways, its controls, and that it resumes."""

import importlib
import json
from pathlib import Path

import pytest
from diffusers import DDIMScheduler

from models import pixel_dit
from ptq4dm.pipelines.pixel_dit import PixelDiTPipeline

ROOT = Path(__file__).resolve().parents[2]


def test_ways_are_measured_and_resumed(tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "comparisons"))
    script = importlib.import_module("compare_reuse")
    PixelDiTPipeline(pixel_dit(num_layers=4), DDIMScheduler()).save_pretrained(tmp_path / "m")
    sizes = ["--evaluations", "5", "--images", "2", "--samples", "1", "--random", "2", "--fewer", "3"]
    command = ["--model", str(tmp_path / "m"), *sizes, "--histories", "2", "--output", str(tmp_path / "rows.json")]
    script.main([*command, "--computed", "3"])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    ways = ["fewer evaluations", *(f"{way}, depth 0" for way in ("planned, history 2", "evenly", "2 at random"))]
    assert [(row["way"], row["computed"]) for row in rows] == [(way, 3) for way in ways]
    assert rows[0]["time"] == 0.6 and all(row["psnr"] < 120 for row in rows)
    assert len(rows[1]["steps"]) == 3 and len(rows[3]["each"]) == 2
    assert "| evenly, depth 0 | 3 |" in capsys.readouterr().out
    with monkeypatch.context() as without:
        without.delattr(script, "Bench")
        script.main([*command, "--computed", "3"])  # the table alone needs no model
    script.main([*command, "--computed", "3", "5"])  # the others are not made again
    again = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert again[:4] == rows and len(again) == 7 and again[4]["psnr"] == 120


def test_the_control_is_the_median_of_its_draws(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "comparisons"))
    script = importlib.import_module("compare_reuse")

    class Bench:
        drawn = 0

        def measured(self, depth):
            return self

        def with_steps(self, steps, history):
            return steps

        def row(self, way, evaluations, plan):
            self.drawn += 1
            value = (5.0, 1.0, 3.0)[self.drawn - 1]
            named = {"psnr": value, "time": 0.5, "seconds": 1.0, "feature_fid": 10 * value}
            return {"way": way, "computed": len(plan), "steps": list(plan), **named}

    args = script.parse(["--feature-fid", "--computed", "4", "--evaluations", "9"])
    bench = Bench()
    row = script.ways(lambda: bench, args)["3 at random, depth 0", 4]()
    assert row["psnr"] == 3.0 and row["feature_fid"] == 30.0
    assert row["each"] == [5.0, 1.0, 3.0] and row["each_fid"] == [50.0, 10.0, 30.0]


def test_what_a_call_that_reuses_takes(monkeypatch):
    """One evaluation 0.04, 0.2 beside, a call that reuses a quarter: read from the rows without the model."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "comparisons"))
    script = importlib.import_module("compare_reuse")
    plain = [{"way": "fewer evaluations", "evaluations": n, "computed": n, "time": 0.2 + 0.04 * n} for n in (10, 16)]
    planned = {"way": "planned, history 3, depth 2", "evaluations": 20, "computed": 8, "depth": 2}
    rows = [*plain, {**planned, "time": 0.2 + 0.04 * (8 + 12 / 4)}, {**planned, "computed": 20, "time": 9.0}]
    assert script.reused_shares(rows) == {2: pytest.approx(0.25)}
    assert script.reused_shares(rows[1:]) == {}
    plain = [{**row, "psnr": 3.0 * row["computed"]} for row in plain]
    printed = script.table([*plain, {**planned, "psnr": 40.0, "time": 0.2 + 0.04 * 11}])  # where 11 would have 33
    assert "| planned, history 3, depth 2 | 8 | 0.64 | 40.0 | +7.0 |" in printed


def test_claims_of_the_page(monkeypatch):
    """On a CPU plans with 12 and 14 of 20 computed are ahead at equal time, with 10 behind."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "comparisons"))
    script = importlib.import_module("compare_reuse")

    def rows_of(name):
        rows = json.loads((ROOT / "scripts" / "results" / f"reuse-{name}.json").read_text())["rows"]
        return rows, {row["computed"]: row for row in rows if row["way"].startswith("planned, history 3")}

    for model in ("unet", "dit", "flow-dit"):
        rows, planned = rows_of(f"{model}-cifar10-cpu-depth-0")
        assert [n for n in planned if script.ahead(planned[n], rows) > 0] == [12, 14] and 10 in planned
        assert all(planned[row["computed"]]["psnr"] >= row["psnr"] for row in rows if "depth" in row)
    rows, planned = rows_of("unet-cifar10-h200-graphs")  # depth 1
    assert round(1 / planned[8]["time"], 2) == 1.4 and script.ahead(planned[8], rows) < 0
    assert f"{script.reused_shares(rows)[1]:.2f}" == "0.53"


def test_the_page_has_the_table_of_a_gpu_and_its_claims(monkeypatch, capsys):
    """UNet: 10 of 20 are 1.45x, below all 20 and below fewer evaluations in their time; the DiT's are never."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "comparisons"))
    script, page = importlib.import_module("reuse_table"), (ROOT / "samplers" / "README.md").read_text()
    script.main()
    assert capsys.readouterr().out in page
    unet = {(row["way"], row["computed"]): row for row in script.rows_of("unet-cifar10")}
    plan, full = unet["planned, history 3, depth 0", 10], unet["full", 20]
    assert round(1 / plan["time"], 2) == 1.45 and plan["feature_fid"] < full["feature_fid"]
    gains = {}
    for model in script.MODELS:
        rows = script.rows_of(model)
        for row in rows:
            if row["way"].startswith("planned"):
                other = script.in_the_same_time(row, rows, "feature_fid")
                gains[model, row["computed"]] = other and other - row["feature_fid"]
    ahead = {key for key, gain in gains.items() if gain and gain > 0}
    assert ahead == {
        *(("unet-cifar10", n) for n in (10, 12, 14)),
        *(("dit-cifar10-w8a8", n) for n in (12, 14)),
        ("flow-dit-cifar10", 12),
    }
    assert gains["unet-cifar10", 10] > 0.1 and max(gains[key] for key in ahead if key[0] != "unet-cifar10") < 0.041
    shares = [
        importlib.import_module("compare_reuse").reused_shares(script.rows_of(model))[0] for model in script.MODELS
    ]
    assert [f"{share:.2f}" for share in shares] == ["0.31", "0.19", "0.35", "0.72", "0.16"]
