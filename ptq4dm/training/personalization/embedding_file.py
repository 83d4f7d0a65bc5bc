"""The result: one small safetensors file, written, and put into a pipeline.

A token is written as diffusers' load_textual_inversion reads it: one tensor [d] by the token's name. Of two or more
text encoders each has its own tensor, "clip_l" and "clip_g" for those of SDXL, else by the component's name. A class
row has one tensor for each table of the model. The header's "ptq4dm" says what it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...checks import checked
from ...errors import UserError
from ...files.outside import TensorFile, checked_object, finite, read_tensors
from ...files.tensors import write_tensors
from ...pipelines.denoiser import check_pipeline, class_count, turn_at
from .targets import Target, check_token, class_tables, encoders_of

NAMES = {"token": "learned_embeds.safetensors", "class row": "class_row.safetensors"}  # the first is diffusers' own
CLIP = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}  # what others call SDXL's two
ADVICE = "give a file that ptq4dm personalize wrote, or a textual inversion of diffusers"


def save_embedding(path: Path, target: Target, u: Tensor) -> None:
    """Write rows u [d] of a target; the file is whole at any time."""
    rows = [row.clone() for row in target.tables.rows(u)]
    if target.facts["kind"] == "class row":
        names = [table.name for table in target.tables.tables]
    elif len(rows) == 1:
        names = [target.facts["token"]]
    else:
        names = [_key(table.part, len(rows)) for table in target.tables.tables]
    write_tensors(path, dict(zip(names, rows, strict=True)), {"ptq4dm": json.dumps(target.facts, sort_keys=True)})


def _key(part: str, number: int) -> str:
    return CLIP.get(part, part) if number == 2 else part


@checked
def load_embedding(pipe, path: str | os.PathLike) -> str:
    """Put a personalized embedding into a pipeline; returns the token, or the class as text ("3").

    path: a file that `personalize` wrote, or its folder; or a textual inversion of one tensor that others wrote. The
    pipeline's tokenizer learns the token and its text encoder gets a row more; or the rows of a class are replaced.

    Raises:
        UserError: it does not fit this pipeline: no text, no such class, another width, a token that is known.
        DamagedFile: it is none, or not what was written.
    """
    check_pipeline(pipe)
    path = _file(path)
    facts, tensors = read_tensors(path, _read, ADVICE)
    with turn_at(pipe), torch.no_grad():
        if facts["kind"] == "class row":
            return _put_class(pipe, path, facts, tensors)
        return _put_token(pipe, path, facts["token"], tensors)


def check_used(pipe, path: str | os.PathLike, name: str, conditioning: dict, seeds: Sequence[int]) -> None:
    """Raises UserError where no image that is asked for is made with an embedding.

    name: what `load_embedding` returned. conditioning: as of `ptq4dm.generate`.
    """
    if name.isdecimal():
        labels = list(conditioning.get("class_labels") or range(class_count(pipe) or 1))
        if int(name) not in {labels[seed % len(labels)] for seed in seeds}:
            raise UserError(
                f"none of these images is of class {name}, so that {path} would change nothing; give --class-labels "
                f"{name}."
            )
    elif not any(name in text for text in conditioning.get("prompt") or ()):
        raise UserError(f"no prompt has '{name}' in it, so that {path} would change nothing; write it into --prompt.")


def embedding_digest(path: str | os.PathLike) -> str:
    """16 hex digits of SHA-256 over an embedding's file: what made a picture, for its settings."""
    return hashlib.sha256(_file(path).read_bytes()).hexdigest()[:16]


def _file(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"there is no embedding at {path}.")
        return path
    there = [path / name for name in NAMES.values() if (path / name).is_file()]
    if not there:
        raise UserError(f"{path} holds no embedding ({' or '.join(NAMES.values())}).")
    return there[0]


def _read(file: TensorFile) -> tuple[dict, dict[str, Tensor]]:
    tensors = {name: finite(tensor, name) for name, tensor in file.tensors().items()}
    if "ptq4dm" in file.header:
        facts = checked_object(file.json("ptq4dm"), {"kind": str})
        checked_object(facts, {"token": str} if facts["kind"] == "token" else {"class": int})
    elif len(tensors) == 1:
        facts = {"kind": "token", "token": next(iter(tensors))}
    else:
        raise ValueError(f"it holds {len(tensors)} tensors and does not say what they are")
    if facts["kind"] not in NAMES:
        raise ValueError(f"it holds a {facts['kind']}")
    rows = {name: tensor[0] if tensor.ndim == 2 and len(tensor) == 1 else tensor for name, tensor in tensors.items()}
    if wrong := next((name for name, row in rows.items() if row.ndim != 1 or not row.is_floating_point()), None):
        raise ValueError(f"'{wrong}' is {list(rows[wrong].shape)} {rows[wrong].dtype}, and no row of an embedding")
    return facts, rows


def _put_class(pipe, path: Path, facts: dict, tensors: dict[str, Tensor]) -> str:
    tables = class_tables(pipe, facts["class"]).tables
    _check_widths(path, {table.name: table.weight.shape[1] for table in tables}, tensors)
    for table in tables:
        table.weight[table.index] = tensors[table.name].to(table.weight)
    return str(facts["class"])


def _put_token(pipe, path: Path, token: str, tensors: dict[str, Tensor]) -> str:
    check_token(pipe, token)
    pairs = encoders_of(pipe)
    keys = [token] if len(pairs) == 1 else [_key(part, len(pairs)) for part, _, _ in pairs]
    widths = [encoder.get_input_embeddings().weight.shape[1] for _, _, encoder in pairs]
    _check_widths(path, dict(zip(keys, widths, strict=True)), tensors)
    for key, (_, tokenizer, encoder) in zip(keys, pairs, strict=True):
        tokenizer.add_tokens([token])
        index = tokenizer.convert_tokens_to_ids(token)
        table = encoder.get_input_embeddings()
        if index >= table.num_embeddings:
            encoder.resize_token_embeddings(index + 1, mean_resizing=False)
            table = encoder.get_input_embeddings()
        table.weight[index] = tensors[key].to(table.weight)
    return token


def _check_widths(path: Path, wanted: dict[str, int], tensors: dict[str, Tensor]) -> None:
    found = {name: len(row) for name, row in tensors.items()}
    if found != wanted:
        have = ", ".join(f"'{name}' [{width}]" for name, width in list(found.items())[:2])
        need = ", ".join(f"'{name}' [{width}]" for name, width in list(wanted.items())[:2])
        raise UserError(f"{path} is of another model: it holds {have}, and this one takes {need}.")
