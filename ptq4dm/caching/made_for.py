"""What a plan of steps was made for, and in what a pipeline differs from that: a plan fits others, but untried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..files.claim import digest
from ..layers.base import is_quantized

OTHER_TIMES = "other times of the sampler (its shift may follow from the size of the picture)"
NEAR = 1e-3  # of the largest time
EITHER = {"quantized": None}  # a network, quantized or not


def made_for(scheduler: Any, models: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The kinds and settings of a sampler and of networks, by name, in plain values."""
    networks = {
        name: {**kind(model), "quantized": any(map(is_quantized, model.modules()))} for name, model in models.items()
    }
    return {"scheduler": kind(scheduler), "networks": networks}


def differences(origin: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In a few words each; none where an origin does not say what it was made for."""
    networks, scheduler, found = origin.get("networks"), origin.get("scheduler"), []
    if not isinstance(networks, dict) or not isinstance(scheduler, dict):
        return []
    if not all(isinstance(one, dict) for one in networks.values()):
        return []
    before, after = list(networks.values()), list(now["networks"].values())
    if [one | EITHER for one in before] != [one | EITHER for one in after]:
        found.append(f"another network ({', '.join(str(one.get('class')) for one in before)})")
    elif before != after:
        was = any(one.get("quantized") for one in before)
        found.append(f"a network {'that is quantized' if was else 'in full precision'}")
    if scheduler != now["scheduler"]:
        found.append(f"another sampler ({scheduler.get('class')})")
    return found


def other_times(before: Sequence[float], now: Sequence[float]) -> bool:
    """Whether a sampler's times are others than those of a plan, but for how they were worked out; () are any."""
    return bool(before) and not same_times(before, now)


def same_times(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two lists of times are the same but for how they were worked out."""
    size = max(map(abs, one), default=0.0)
    return len(one) == len(other) and all(abs(a - b) <= NEAR * size for a, b in zip(one, other, strict=True))


def kind(one: Any) -> dict[str, Any]:
    """A class, and a digest of its settings but for where they were read and by which version."""
    config = {key: value for key, value in getattr(one, "config", {}).items() if not key.startswith("_")}
    config.pop("quantization_config", None)
    return {"class": type(one).__name__, "settings": digest(config, str)}
