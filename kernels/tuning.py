"""Which block sizes a kernel runs with: measured ones from `tuned/`, never searched for at a call.

A file of `tuned/` is {"device": ..., "<kernel>": [[M, N, K, {setting: value}], ...], ...}. A GPU whose name has a
file uses it, any other the file of its compute capability or of the nearest below. Of a kernel's entries the one
nearest in log M, log N, log K serves: shapes between the measured ones come out sensibly. "w8a8" is
{shape class: {setting: value}}, see w8a8_configs.py. `record` writes the file of this GPU.
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
    return table | own(device)


@functools.cache
def own(device: torch.device) -> dict:
    """What was measured on GPUs of this name; {} without a file."""
    if device.type != "cuda":
        return {}
    name = slug(torch.cuda.get_device_name(device))
    return _read(name) if (FOLDER / f"{name}.json").is_file() else {}


def forget() -> None:
    """Read the files again at the next call."""
    for cached in (own, _best, _general, _read):
        cached.cache_clear()


@functools.cache
def _general() -> list[tuple[int, int]]:
    names = [re.fullmatch(r"sm_(\d+)(\d)", path.stem) for path in FOLDER.glob("sm_*.json")]
    return [(int(name[1]), int(name[2])) for name in names if name]


@functools.cache
def _read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def tuned_file() -> Path:
    return FOLDER / f"{slug(torch.cuda.get_device_name())}.json"


def record(kernel: str, key: list[int] | str, settings: dict) -> None:
    """Put the settings for sizes [M, N, K], or for a shape class, into the file of this GPU."""
    path = tuned_file()
    table = json.loads(path.read_text()) if path.is_file() else {"device": torch.cuda.get_device_name()}
    if isinstance(key, str):
        table.setdefault(kernel, {})[key] = settings
    else:
        table[kernel] = [old for old in table.get(kernel, []) if old[:3] != key] + [[*key, settings]]
    path.write_text(formatted(table))
    forget()


def formatted(table: dict) -> str:
    """One line for each entry, so that a change of one shows as one."""

    def part(key: str, value) -> str:
        if isinstance(value, list):
            return f" {json.dumps(key)}: [\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"
        if isinstance(value, dict):
            entries = (f"  {json.dumps(name)}: {json.dumps(value[name])}" for name in sorted(value))
            return f" {json.dumps(key)}: {{\n" + ",\n".join(entries) + "\n }"
        return f" {json.dumps(key)}: {json.dumps(value)}"

    return "{\n" + ",\n".join(part(*item) for item in table.items()) + "\n}\n"
