"""The pictures of few steps: drawn from the files of results alone, and each of their samplers is there."""

import importlib
import json
from pathlib import Path

import pytest
from PIL import Image

from ptq4dm.errors import UserError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "comparisons"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("draw_samplers")


def test_the_results_that_are_kept_have_all_that_is_drawn(script):
    for kind, (model, samplers, _) in script.PICTURES.items():
        rows = json.loads((script.RESULTS / f"samplers-{model}.json").read_text())["rows"]
        budgets = {name: {r["budget"] for r in rows if r["sampler"] == name} for name in samplers}
        assert all({5, 8, 10, 20} <= found for found in budgets.values()), kind
        found = script.rows_of(model)
        assert {4, 5, 6, 8} <= set(found["fitted"]) and {4, 5, 6, 8, 10, 20} <= set(found["deis"]), kind


def test_a_picture_of_rows_and_a_sampler_that_has_none(script, tmp_path):
    model, samplers, _ = script.PICTURES["flow"]
    rows = [
        {"sampler": name, "budget": n, "evaluations": n, "feature_fid": 3 + 1 / n + 0.01 * i}
        for i, name in enumerate(samplers)
        for n in (5, 10, 50)
    ]
    (tmp_path / f"samplers-{model}.json").write_text(json.dumps({"rows": rows}))
    of_seeds = [{**row, "model": model, "quantized": False, "seed": 7, "sampler": "deis"} for row in rows[:3]]
    (tmp_path / "samplers-seeds.jsonl").write_text("\n".join(map(json.dumps, of_seeds)))
    path = script.draw("flow", tmp_path / "out", tmp_path)
    with Image.open(path) as picture:
        assert picture.width > 900 and len(picture.convert("RGB").getcolors(2**24)) > 8
    assert path.name == "few-steps-flow.png" and path.stat().st_size < 100_000
    (tmp_path / f"samplers-{model}.json").write_text(json.dumps({"rows": rows[:-3]}))
    with pytest.raises(UserError, match=f"has no rows of {samplers[-1]}"):
        script.draw("flow", tmp_path / "out", tmp_path)


def test_a_mean_of_fewer_seeds_is_not_drawn(script, tmp_path, monkeypatch):
    model, samplers, _ = script.PICTURES["flow"]
    single = [{"sampler": name, "budget": 5, "evaluations": 5, "feature_fid": 9.0} for name in samplers]
    (tmp_path / f"samplers-{model}.json").write_text(json.dumps({"rows": single}))
    rows = [
        {"model": model, "quantized": False, "sampler": name, "budget": 5, "seed": seed, "feature_fid": 4.0 + seed}
        for name, seeds in (("deis", 2), ("ipndm", 1))
        for seed in range(seeds)
    ]
    (tmp_path / "samplers-seeds.jsonl").write_text("\n".join(map(json.dumps, rows)))
    drawn = []
    monkeypatch.setattr(script, "plot_rows", lambda title, rows, path: drawn.extend(rows) or True)
    monkeypatch.setattr(script, "few_colours", lambda path: None)
    script.draw("flow", tmp_path, tmp_path)
    assert [(row["sampler"], row["feature_fid"]) for row in drawn[:-2]] == [("deis", 4.5)]
