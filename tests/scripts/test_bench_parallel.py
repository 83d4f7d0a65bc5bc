"""A slice of FLUX in 4 bits under diffusers' context parallelism, in two processes on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "bench_parallel.py"
SMALL = ("--blocks", "1", "1", "--heads", "2", "--tokens", "16", "--text-tokens", "8", "--repeats", "1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the script itself is run")
def test_two_processes_give_the_image_of_one(tmp_path):
    pytest.importorskip("triton")
    rows = tmp_path / "rows.jsonl"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    ways = ("--device", "cpu", "--no-compile", "--forms", "svdq-fused", "--ways", "one", "ulysses")
    done = subprocess.run(
        [*torchrun, str(SCRIPT), *SMALL, *ways, "--output", str(rows)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}, 
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = {row["way"]: row for row in map(json.loads, rows.read_text().splitlines())}
    assert found["ulysses"]["gpus"] == 2 and found["ulysses"]["error"] <= 1e-6
