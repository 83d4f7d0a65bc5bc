"""Block sizes that kernels run with: measured ones from `tuned/`, never searched for at a call.

A file of `tuned/` is {"device": ..., "<kernel>": [[M, N, K, {setting: value}], ...], ...}. A GPU whose name has a
file uses it, any other the file of its compute capability or of the nearest below, which the first takes for far more
or far fewer rows than were measured on it. Of a kernel's entries the one nearest in log M, log N, log K serves:
shapes between the measured ones come out sensibly. M of "<mode>.norm", rows under a layer norm, is of one sample.
"w8a8" is {shape class: {setting: value}}, see configs.py.

`record` writes the file of this GPU (search.py and `ptq4dm bench tune` do). It lies in `tuned/` beside this file, or
in the user's folder, $PTQ4DM_TUNED or else ~/.cache/ptq4dm/tuned, whose entries come before those beside this file.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .atomic import replacing

FOLDER = Path(__file__).parents[1] / "tuned"
OLDEST = (8, 0)  # Ampere: for GPUs before it Triton compiles no product of 8-bit codes
INTERPRETED = OLDEST
REMEMBERED = []
TARGET: Target | None = None  # set by `target`


@dataclass(frozen=True)
class Target:
    """A GPU that is not here, for which kernels are chosen, cut to size and compiled.

    launch: called instead of each launch with the kernel and {argument or option: value}.
    """

    capability: tuple[int, int]
    multiprocessors: int
    launch: Callable[[object, dict], None]


@contextmanager
def target(gpu: Target) -> Iterator[None]:
    """Take this GPU for the one that runs, whatever the device of the tensors; they may be on "meta"."""
    global TARGET
    forget()
    TARGET = gpu
    try:
        yield
    finally:
        TARGET = None
        forget()


def remembered(function):
    """Decorator: keep what `function` makes of the files of settings and of the device, until `forget`."""
    cached = functools.lru_cache(maxsize=4096)(function)
    REMEMBERED.append(cached)
    return cached


def slug(device_name: str) -> str:
    """NVIDIA H200 -> nvidia_h200."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; of Ampere, which needs no special hardware, where Triton's interpreter runs."""
    if TARGET is not None:
        return TARGET.capability
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else INTERPRETED


def served(device: torch.device) -> bool:
    """Whether our kernels for GPUs run there."""
    return device.type == "cuda" and capability(device) >= OLDEST


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 3 where Triton's interpreter runs, so that programs walk over several tiles there."""
    if TARGET is not None:
        return TARGET.multiprocessors
    return _multiprocessors(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def best_config(kernel: str, device: torch.device, m: int, n: int | None, k: int) -> dict:
    """The settings of `kernel` for a product of these sizes, of any N where that is None.

    Raises KeyError for a kernel nobody measured.
    """
    return _best(kernel, device.type, device.index, m, n, k)


@remembered
def _best(kernel, device_type, index, m, n, k) -> dict:
    device = torch.device(device_type, index)
    entries = _merged(device)[kernel]
    wanted = [(place, math.log(max(v, 1))) for place, v in enumerate((m, n, k)) if v is not None]
    return min(entries, key=lambda entry: sum((v - math.log(entry[place])) ** 2 for place, v in wanted))[3]


def _merged(device: torch.device) -> dict:
    """The capability's file, under what the device's own file has."""
    major_minor = capability(device)
    below = [name for name in _general() if name <= major_minor]
    table = dict(_read(f"sm_{max(below)[0]}{max(below)[1]}"))
    return table | {kernel: _beside(table.get(kernel), entries) for kernel, entries in own(device).items()}


def _beside(general, entries):
    """A kernel's entries of a device, and general ones for half as many rows as any of those, or less, and for twice
    as many, or more: a device that was tuned for thousands of rows says nothing about one."""
    if not (isinstance(general, list) and isinstance(entries, list) and entries):
        return entries
    rows = [entry[0] for entry in entries]
    return [one for one in general if 2 * one[0] <= min(rows) or one[0] >= 2 * max(rows)] + entries


@remembered
def own(device: torch.device) -> dict:
    """Settings measured on GPUs of this name; {} without a file. The user's entries before the package's."""
    if device.type != "cuda":
        return {}
    name = slug(torch.cuda.get_device_name(device))
    shipped, users = (settings_in(folder / f"{name}.json") for folder in (FOLDER, user_folder()))
    return {kernel: _together(shipped.get(kernel), users.get(kernel)) for kernel in {**shipped, **users}}


def _together(shipped, users):
    """A kernel's entries of two files; where both measured the same, the user's."""
    if shipped is None or users is None or isinstance(users, str):
        return shipped if users is None else users
    if isinstance(users, dict):
        return shipped | users
    measured = [entry[:3] for entry in users]
    return [entry for entry in shipped if entry[:3] not in measured] + users


def forget() -> None:
    """Read the files, and ask the device, again at the next call."""
    for function in REMEMBERED:
        function.cache_clear()


@remembered
def _general() -> list[tuple[int, int]]:
    names = [re.fullmatch(r"sm_(\d+)(\d)", path.stem) for path in FOLDER.glob("sm_*.json")]
    return [(int(name[1]), int(name[2])) for name in names if name]


@remembered
def _read(name: str) -> dict:
    return settings_in(FOLDER / f"{name}.json")


class DamagedSettings(ValueError):
    """A file of settings that cannot be taken as it is; the message is a sentence for the user."""


def settings_in(path: Path) -> dict:
    """A file's settings; {} where there is none. Raises DamagedSettings for a file that is no settings."""
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        right = isinstance(table, dict) and isinstance(table.get("device"), str)
        wrong = (
            [name for name, entries in table.items() if name != "device" and not _is_kernel(entries)] if right else []
        )
    except (OSError, ValueError, RecursionError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DamagedSettings(f"{path} is no file of settings ({said}); delete it and measure anew.") from None
    if not right:
        raise DamagedSettings(f"{path} is no file of settings; delete it and measure anew.")
    if wrong:
        raise DamagedSettings(f"{path} holds no settings for '{wrong[0][:60]}'; delete it and measure anew.")
    return table


def _is_kernel(entries: object) -> bool:
    """Whether these are the entries of a kernel: [[M, N, K, settings], ...] or {shape class: settings}."""
    if isinstance(entries, dict):
        return all(map(_is_settings, entries.values()))
    return isinstance(entries, list) and all(
        isinstance(one, list)
        and len(one) == 4
        and all(type(size) is int and 0 < size < 2**40 for size in one[:3])
        and _is_settings(one[3])
        for one in entries
    )


def _is_settings(found: object) -> bool:
    """Names with switches, names or sizes; no tile, count or number of bytes of a kernel is beyond 2^24."""
    return isinstance(found, dict) and all(
        value is None or isinstance(value, (bool, str)) or (isinstance(value, int) and 0 <= value <= 2**24)
        for value in found.values()
    )


def user_folder() -> Path:
    """Folder of a user's own files of settings: $PTQ4DM_TUNED, else ptq4dm/tuned in the folder for caches."""
    if named := os.environ.get("PTQ4DM_TUNED"):
        return Path(os.path.expanduser(named))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "ptq4dm" / "tuned"


def tuned_file() -> Path:
    """File that `record` writes for this GPU: in `tuned/` beside this file, as in a checkout.

    The user's folder if $PTQ4DM_TUNED names one, if it has a file of this GPU, which would hide what is written
    here, or if this folder is read-only.
    """
    name = f"{slug(torch.cuda.get_device_name())}.json"
    users = user_folder() / name
    beside = not os.environ.get("PTQ4DM_TUNED") and not users.is_file() and os.access(FOLDER, os.W_OK)
    return FOLDER / name if beside else users


def record(kernel: str, key: list[int] | str, settings: dict, path: Path | None = None) -> None:
    """Put the settings for sizes [M, N, K], or for a shape class, into the file of this GPU, or into `path`.

    The file is whole at any time: it is replaced by a new one.
    """
    path = path or tuned_file()
    table = settings_in(path) or {"device": torch.cuda.get_device_name()}
    if isinstance(key, str):
        table.setdefault(kernel, {})[key] = settings
    else:
        table[kernel] = [old for old in table.get(kernel, []) if old[:3] != key] + [[*key, settings]]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(formatted(table), encoding="utf-8")
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
