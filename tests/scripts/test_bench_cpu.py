"""The benchmark of a denoiser on a CPU, on a tiny model: a row for each error and round, and no row is made twice."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import models
import ptq4dm

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"


@pytest.fixture
def bench(monkeypatch, one_thread):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    bench, subjects = importlib.import_module("bench_cpu"), importlib.import_module("cpu_subjects")
    row = lambda time, size=1: (torch.randn(size, 3, 8, 8), torch.full((size,), time))  # noqa: E731

    def quantized(config):
        model = models.plain_unet()
        with ptq4dm.record(model) as calls:
            model(*row(100))
        ptq4dm.quantize(model, config, calls)
        return model

    methods = {"W8A8": ptq4dm.PTQ4DMConfig()}
    args = ([row(100)], [row(1, 2), row(500, 2)], 20.0, quantized, lambda size: row(500, size), methods)
    monkeypatch.setattr(bench, "subject_of", lambda *_: subjects.Subject(models.plain_unet(), *args))
    monkeypatch.setattr(importlib.import_module("cpu_candidates"), "HAS_OPENVINO", False)
    return bench


def run(bench, monkeypatch, output, rounds):
    options = ["--threads", "1", "--rounds", str(rounds), "--batch-sizes", "2", "1", "--groups", "W8A8"]
    monkeypatch.setattr(sys, "argv", ["bench_cpu.py", *options, "--output", str(output)])
    bench.main()
    return json.loads(output.read_text())["rows"]


def test_a_run_goes_on_where_it_was(bench, monkeypatch, tmp_path, capsys):
    names = {"PyTorch float32", "PyTorch bfloat16", "ptq4dm W8A8"}
    names |= {f"ptq4dm W8A8, optimized, {precision}" for precision in ("float32", "bfloat16")}
    first = run(bench, monkeypatch, tmp_path / "rows.json", 1)
    errors = {row["candidate"]: row for row in first if row["kind"] == "error"}
    assert set(errors) == names and errors["PyTorch float32"]["mean"] == 0
    assert 0 < errors["ptq4dm W8A8"]["median"] < 0.1 and errors["ptq4dm W8A8"]["low"] > 0
    assert [row["batch"] for row in first if row["kind"] == "round"] == [2, 1]
    again = run(bench, monkeypatch, tmp_path / "rows.json", 2)
    assert again[: len(first)] == first and [row["batch"] for row in again[len(first) :]] == [2, 1]
    assert all(set(row["ms"]) == names for row in again if row["kind"] == "round")
    said = capsys.readouterr().out
    assert "| batch 2 (2 rounds) | ms | x | median error | mean | low times |" in said
    assert "| PyTorch float32 | " in said and " | 1.00 |  |  |  |" in said
