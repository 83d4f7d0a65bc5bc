"""What a benchmark's file of lines keeps: measured lines, and those of other conditions beside it."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "scripts" / "benchmarks"


def test_lines_of_other_conditions_are_told_and_kept_beside(tmp_path, capsys, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(BENCHMARKS)
    from bench_common import Lines

    path = tmp_path / "rows.jsonl"
    first = Lines(path, {"card": "A", "tokens": 64})
    first.add({"form": "bf16", "ms": 1})
    assert Lines(path, {"card": "A", "tokens": 64}).has(form="bf16")
    capsys.readouterr()
    other = Lines(path, {"card": "A", "tokens": 256})
    assert not other.has(form="bf16") and "1 lines of another tokens go to rows" in capsys.readouterr().out
    assert len(path.read_text().splitlines()) == 1  # nothing is moved before something is added
    other.add({"form": "int8", "ms": 2})
    kept = [json.loads(line) for line in (tmp_path / "rows.jsonl.before").read_text().splitlines()]
    assert [row["form"] for row in kept] == ["bf16"]
    assert [json.loads(line)["form"] for line in path.read_text().splitlines()] == ["int8"]
