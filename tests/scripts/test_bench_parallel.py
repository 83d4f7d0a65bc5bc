"""A slice of FLUX in 4 bits under diffusers' context parallelism, in two processes on a CPU."""

import json
from pathlib import Path

import pytest
import torch

from two_processes import two_ranks

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "bench_parallel.py"
SMALL = ("--blocks", "1", "1", "--heads", "2", "--tokens", "16", "--text-tokens", "8", "--repeats", "1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the script itself is run")
def test_two_processes_give_the_image_of_one(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")  # or MKL, on an Intel CPU, sums one row otherwise than many
    rows = tmp_path / "rows.jsonl"
    ways = ("--device", "cpu", "--no-compile", "--forms", "svdq-fused", "--ways", "one", "ulysses")
    two_ranks(SCRIPT, *SMALL, *ways, "--output", rows)
    found = {row["way"]: row for row in map(json.loads, rows.read_text().splitlines())}
    assert found["ulysses"]["gpus"] == 2 and found["ulysses"]["error"] <= 1e-6
