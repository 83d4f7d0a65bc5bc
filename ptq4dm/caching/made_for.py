"""What a plan of steps was made for, and in what a pipeline differs from that: a plan fits others, but untried."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..layers.base import is_quantized


def made_for(scheduler: Any, models: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The kinds and settings of a sampler and of networks, by name, in plain values."""
    networks = {
        name: {**_kind(model), "quantized": any(map(is_quantized, model.modules()))} for name, model in models.items()
    }
    return {"scheduler": _kind(scheduler), "networks": networks}


def differences(origin: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In a few words each; none where an origin does not say what it was made for."""
    found = []
    before, after = (one.get("networks") for one in (origin, now))
    if isinstance(before, dict) and isinstance(after, dict):
        if [_of(one, "class", "settings") for one in before.values()] != [
            _of(one, "class", "settings") for one in after.values()
        ]:
            found.append(f"another network ({', '.join(str(_of(one, 'class')[0]) for one in before.values())})")
        elif [_of(one, "quantized") for one in before.values()] != [_of(one, "quantized") for one in after.values()]:
            was = any(_of(one, "quantized")[0] for one in before.values())
            found.append(f"a network {'that is quantized' if was else 'in full precision'}")
    if "scheduler" in origin and origin["scheduler"] != now["scheduler"]:
        found.append(f"another sampler ({_of(origin['scheduler'], 'class')[0]})")
    return found


def _kind(one: Any) -> dict[str, Any]:
    """A class, and a digest of its settings but for where they were read and by which version."""
    config = {key: value for key, value in getattr(one, "config", {}).items() if not key.startswith("_")}
    config.pop("quantization_config", None)
    text = json.dumps(config, sort_keys=True, default=str)
    return {"class": type(one).__name__, "settings": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _of(one: Any, *names: str) -> list[Any]:
    return [one.get(name) if isinstance(one, dict) else None for name in names]
