"""Attempts to have code run, or files outside a folder read: pickles, modules of one's own, paths that lead out."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable

import numpy as np
from stress.change import REMOVED, Case, Change, Link

WEIGHTS = "diffusion_pytorch_model.safetensors"


class _Touch:
    """A pickle of it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def _pickle(case: Case) -> bytes:
    return pickle.dumps({"x": _Touch(str(case.outside / "canary"))})


def pickled(case: Case) -> Change | None:
    """A pickle in the file's place, or beside it under the name that loaders of others fall back to."""
    beside = case.path.removesuffix(".safetensors") + case.dice.choice((".bin", ".pt", ".pth", ".ckpt"))
    if case.path.endswith(".safetensors") and case.dice.random() < 0.5:
        return Change("hostile pickle beside", {case.path: REMOVED, beside: _pickle(case)}, hostile=True)
    return Change("hostile pickle", {case.path: _pickle(case)}, hostile=True)


def pickled_array(case: Case) -> Change | None:
    if not case.path.endswith(".npz"):
        return None
    file = io.BytesIO()
    touch = np.array([_Touch(str(case.outside / "canary"))], dtype=object)
    np.savez(file, mu=touch, sigma=touch)
    return Change("hostile array of objects", {case.path: file.getvalue()}, hostile=True)


def own_module(case: Case) -> Change | None:
    """A pipeline that names a module of its own folder, as diffusers' custom pipelines do."""
    if "model_index.json" not in case.files:
        return None
    index = json.loads(case.files["model_index.json"])
    code = f"import os\nos.mkdir({str(case.outside / 'canary')!r})\n".encode()
    part = case.dice.choice([name for name, entry in index.items() if isinstance(entry, list)] + ["_class_name"])
    index[part] = [case.dice.choice(("pipeline", "evil", f"{part}.evil", "..evil", "os")), "Evil"]
    places = {f"{folder}evil.py": code for folder in ("", f"{part}/")} | {"pipeline.py": code}
    return Change("hostile module", {"model_index.json": json.dumps(index).encode(), **places}, hostile=True)


def own_class(case: Case) -> Change | None:
    """A config that asks for remote code."""
    if not case.path.endswith("config.json"):
        return None
    config = json.loads(case.data)
    config["auto_map"] = {"AutoModel": "evil.Evil"}
    config["_class_name"] = case.dice.choice(("Evil", "os.system", "__import__", 7, None, "UNet2DModel"))
    code = f"import os\nos.mkdir({str(case.outside / 'canary')!r})\n".encode()
    beside = case.path.rpartition("/")[0]
    files = {case.path: json.dumps(config).encode(), f"{beside}/evil.py": code}
    return Change("hostile class", files, formed=True)  # what it asks for may be passed over


def outside_shard(case: Case) -> Change | None:
    """An index of shards that leads out of the folder."""
    folder, _, name = case.path.rpartition("/")
    if not name.endswith((".safetensors", ".index.json")):
        return None
    index = f"{folder}/{WEIGHTS}.index.json".lstrip("/")
    secret = str(case.outside / "secret.safetensors")
    depth = "../" * (case.path.count("/") + 2)
    to = case.dice.choice((secret, f"{depth}{case.outside.name}/secret.safetensors", "/etc/passwd", "..", "", "a\0b"))
    if index in case.files:
        held = json.loads(case.files[index])
        held["weight_map"] = {key: to for key in held["weight_map"]}
        return Change("hostile shard", {index: json.dumps(held).encode()}, hostile=True)
    held = {"metadata": {"total_size": 8}, "weight_map": {"x": to}}
    gone = {case.path: REMOVED}
    return Change("hostile shard", {**gone, index: json.dumps(held).encode()}, hostile=True)


def outside_link(case: Case) -> Change | None:
    """Somebody else's tensors by a link: another file, well-formed."""
    if not case.path.endswith(".safetensors"):
        return None
    return Change("hostile link", {case.path: Link(str(case.outside / "secret.safetensors"))}, hostile=True)


HOSTILE: dict[str, Callable[[Case], Change | None]] = {
    "pickle": pickled, "array": pickled_array, "module": own_module, "class": own_class, "shard": outside_shard,
    "link": outside_link,
}  # fmt: skip
