"""Which block sizes a kernel runs with: measured ones from `tuned/`, never searched for at a call.

A file of `tuned/` is {"device": ..., "<kernel>": [[M, N, K, {setting: value}], ...], ...}. A GPU whose name has a
file uses it, any other the file of its compute capability or of the nearest below. Of a kernel's entries the one
nearest in log M, log N, log K serves: shapes between the measured ones come out sensibly.
`scripts/bench_kernels.py --tune` writes such a file.
"""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path

import torch

FOLDER = Path(__file__).with_name("tuned")
INTERPRETED = (8, 0)


def slug(device_name: str) -> str:
    """NVIDIA H200 -> nvidia_h200."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")


def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; of Ampere, whose kernels need no special hardware, where Triton's interpreter runs."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else INTERPRETED


def best_config(kernel: str, device: torch.device, m: int, n: int, k: int) -> dict:
    """The settings of `kernel` for a product of these sizes. Raises KeyError for a kernel nobody measured."""
    return _best(kernel, device.type, device.index, m, n, k)


@functools.lru_cache(maxsize=4096)
def _best(kernel, device_type, index, m, n, k) -> dict:
    device = torch.device(device_type, index)
    entries = _merged(device)[kernel]
    wanted = [math.log(max(v, 1)) for v in (m, n, k)]
    return min(entries, key=lambda entry: math.dist(wanted, [math.log(v) for v in entry[:3]]))[3]


def _merged(device: torch.device) -> dict:
    """The capability's file, under what the device's own file has."""
    major_minor = capability(device)
    below = [name for name in _general() if name <= major_minor]
    table = dict(_read(f"sm_{max(below)[0]}{max(below)[1]}"))
    if device.type == "cuda":
        own = slug(torch.cuda.get_device_name(device))
        if (FOLDER / f"{own}.json").is_file():
            table |= _read(own)
    return table


def forget() -> None:
    """Read the files again at the next call."""
    for cached in (_best, _general, _read):
        cached.cache_clear()


@functools.cache
def _general() -> list[tuple[int, int]]:
    names = [re.fullmatch(r"sm_(\d+)(\d)", path.stem) for path in FOLDER.glob("sm_*.json")]
    return [(int(name[1]), int(name[2])) for name in names if name]


@functools.cache
def _read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
