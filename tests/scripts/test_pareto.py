"""The picture of all methods: every file of results is read, every method is a point or is named as missing."""

import importlib
import json
from pathlib import Path

import pytest
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "comparisons"
DYNAMIC = {"W4A8 g64 dynamic": 3, "W8A8 dynamic": 2}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def row(name, method, error, share, formats, **more):
    facts = {"model": "unet-cifar10", "row": name, "kind": "method", "recipe": {"method": method}, "simulated": False}
    facts["bytes"] = 1000 * share
    return {**facts, "eps_error": error, "bytes_share": share, "formats": formats, "device": "GPU", **more}


@pytest.fixture
def results(tmp_path):
    """A folder of results: two rows, times of one of them, and a comparison of OHQ on a CPU."""
    rows = [
        row("a", "rtn", 1e-3, 0.5, {"W8A8 static": 5}),
        row("b", "ptq4dm", 1e-4, 0.3, DYNAMIC),
        row("c", "ptq4dm", 2e-4, 0.4, {"W4A4 static (simulated)": 5}, simulated=True),
        row("full precision", "rtn", None, 1.0, {}),
    ]
    timed = [row("a", "rtn", 5e-3, 0.5, {"W8A8 static": 5}, step_time={"ratio": 0.6}, device="CPU, 2 threads")]
    four = "rtn weight_bits=4 group_size=64 activations=dynamic"
    facts = {
        "device": "CPU, 2 threads", "uniform": {"keep": {"measured_latency": 1.0}, four: {"measured_latency": 0.7}},
        "budget": {"masked, weights": {"bytes": {"chosen": 0.39}, "error": {"chosen": 2e-5}}},
        "times": [{"plan": "chosen, masked, weights", "measured": 0.65}],
        "fronts": [{"budget": "latency", "of": 0.5, "bytes": 0.4, "error": 3e-5}],
    }  # fmt: skip
    for name, value in (
        ("methods-unet-cifar10", {"rows": rows}),
        ("methods-fid-unet-cifar10", {"rows": [row("old", "rtn", 1.0, 0.5, {})]}),
        ("methods-times-cpu-unet-cifar10", {"rows": timed}),
        ("ohq-unet-cifar10", facts),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return tmp_path


def test_every_file_of_results_is_read(script):
    points = script("pareto_points")
    named = {path for model in script("pareto").MODELS for paths in points.files_of(model).values() for path in paths}
    there = {*points.RESULTS.glob("methods-*.json"), *points.RESULTS.glob("ohq-*.json")}
    assert len(named) >= 10
    assert there - named == set(points.RESULTS.glob("methods-fid-*.json"))


def test_every_method_is_a_point_or_is_missing(script):
    pareto, points = script("pareto"), script("pareto_points")
    for model in pareto.MODELS:
        found = points.points_of(model)
        drawn, absent = {pareto.title(point.method) for point in found}, set(pareto.missing(found))
        assert drawn | absent == {pareto.title(name) for name, kind in pareto.METHODS.items() if not kind.loaded_only}
        assert not drawn & absent and {"RTN", "OHQ", "SVDQuant", "GradPTQ", "QoQ"} <= drawn
        assert len({point.name for point in found if point.method != "ohq"}) > 100


def test_times_are_of_a_name_or_of_formats(script, results):
    points = script("pareto_points")
    found = {point.name: point for point in points.points_of("unet-cifar10", results)}
    assert set(found) == {"a", "b", "c", "OHQ", "OHQ, latency 0.50"}
    assert (found["a"].time, found["a"].device, found["a"].error) == (0.6, "CPU, 2 threads", 1e-3)
    assert found["b"].time == 0.7  # of layers of the same formats
    assert found["c"].time is None and found["c"].simulated and found["c"].device == ""
    assert (found["OHQ"].time, found["OHQ"].bytes) == (0.65, 0.39) and found["OHQ, latency 0.50"].time is None


def test_bytes_beyond_the_least_whole_model_do_not_count(script):
    rows = [row("new", "rtn", 1e-3, 0.26, {}), row("old", "rtn", 1e-3, 0.0, {}, bytes=270, bytes_share=270 / 1010)]
    assert script("pareto_points").shares(rows) == [0.26, pytest.approx(0.26)]


def test_the_line_joins_what_nothing_beats(script):
    points = script("pareto_points")
    some = [(points.Point(name, "rtn", "method", error, 0), cost) for name, error, cost in (
        ("cheap", 3.0, 1.0), ("beaten", 4.0, 2.0), ("equal", 3.0, 1.5), ("best", 1.0, 3.0), ("dear", 1.0, 3.5),
    )]  # fmt: skip
    assert [point.name for point, _ in points.front(some)] == ["cheap", "best"]


def test_the_picture_is_small_and_of_these_results(script, results, tmp_path, monkeypatch):
    pareto, points = script("pareto"), script("pareto_points")
    monkeypatch.setattr(pareto, "points_of", lambda model: points.points_of(model, results))
    path = tmp_path / "out" / "pareto.png"
    found = pareto.draw(path, {"unet-cifar10": "UNet"})
    assert len(found["unet-cifar10"]) == 5 and path.stat().st_size < 120_000
    with Image.open(path) as image:
        assert image.width > 1000 and len(set(image.convert("L").resize((64, 64)).tobytes())) > 10
    assert "GradPTQ" in pareto.missing(found["unet-cifar10"]) and "RTN" not in pareto.missing(found["unet-cifar10"])
