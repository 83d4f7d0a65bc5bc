"""What can be tuned: a new token of a pipeline's text encoders, or a row of a model's table of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...errors import UserError
from ...pipelines.denoiser import class_count, components_of, denoiser, denoiser_name
from .conditions import Predict, of_class, of_prompts
from .tables import Table, Tables

PROMPTS = ("a photo of {}", "a picture of {}", "a close-up of {}", "{} in the picture", "one {}, photographed")
MEAN, NULL = "mean", "null"


@dataclass
class Target:
    """tables, and the start of what is tuned in them, u [d]; predict: the model's answer; facts: JSON values that say
    what it is, for the file's header and for resuming."""

    tables: Tables
    start: Tensor
    predict: Predict
    facts: dict


def class_target(pipe, row: int, init: str | None = None) -> Target:
    """The row of a class in all tables of a class-conditional model.

    init: "null" starts at the row of no class, which models that are sampled with guidance have, "mean" at the mean
        of the other classes' rows, a number at the row of that class; None is "null" where there is one.
        The mean lies where no class does: most of what is then learned is the way out of it.

    Raises UserError where the model has no classes, not this one, or no row of no class.
    """
    tables = class_tables(pipe, row)
    classes = class_count(pipe) or 0
    has_null = all(table.weight.shape[0] > classes for table in tables.tables)
    init = (NULL if has_null else MEAN) if init is None else init
    if init == MEAN:
        others = [k for k in range(classes) if k != row] or [row]
    elif init == NULL:
        if not has_null:
            raise UserError(f"this model has no row of no class ('{NULL}'); start at '{MEAN}' or at a class.")
        others = [classes]
    elif init.isdecimal() and int(init) < classes:
        others = [int(init)]
    else:
        raise UserError(
            f"a class row starts at '{MEAN}', at '{NULL}' or at a class from 0 to {classes - 1}; got '{init}'."
        )
    start = tables.unit([table.weight[others].float().mean(0) for table in tables.tables])
    facts = {"kind": "class row", "class": row, "classes": classes, "init": init}
    return Target(tables, start, of_class(pipe, row), facts)


def class_tables(pipe, row: int) -> Tables:
    """The tables that a model looks classes up in. Raises UserError where it has none, or not this class."""
    classes, model = class_count(pipe), denoiser(pipe)
    if classes is None:
        other = "; give a token, for a model of text" if encoders_of(pipe) else ", nor text: nothing to personalize"
        raise UserError(f"{type(model).__name__} has no classes{other}.")
    if not 0 <= row < classes:
        raise UserError(f"there is no class {row} in this model; it has classes 0 to {classes - 1}.")
    found = [  # one row more is the null class of guidance
        Table(denoiser_name(pipe), model, name, row)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings in (classes, classes + 1)
    ]
    if not found:
        raise UserError(f"{type(model).__name__} looks its classes up in no table of embeddings.")
    return Tables(found, pipe._execution_device)


def token_target(pipe, token: str, init: str | None, prompts: Sequence[str] = PROMPTS) -> Target:
    """A new token, in the place of the word `init` in prompts; it is given to the model in the place of that word.

    So neither tokenizer nor table grows while it is tuned.

    Raises UserError where the model has no text encoder of transformers, the token is known already or is no word,
    init is no single token of its own, or is not found once in a prompt.
    """
    check_token(pipe, token)
    if not init:
        raise UserError("a token starts at a word that is like it; give --init, such as --init dog.")
    if not prompts or isinstance(prompts, str):
        raise UserError("prompts must be a list of at least one text with {} in the place of the token.")
    if wrong := next((text for text in prompts if not isinstance(text, str) or text.count("{}") != 1), None):
        raise UserError(f"a prompt must have {{}} once, in the place of the token; got {wrong!r}.")
    filled, tables = [text.replace("{}", init) for text in prompts], []
    for part, tokenizer, encoder in encoders_of(pipe):
        index = _single(tokenizer, init)
        for text in filled:
            ids = tokenizer(text, truncation=True, max_length=tokenizer.model_max_length).input_ids
            if ids.count(index) != 1:
                raise UserError(f"'{init}' must be found once, and as one token, in the prompt '{text}'.")
        table = encoder.get_input_embeddings()
        name = next(name for name, module in encoder.named_modules() if module is table)
        tables.append(Table(part, encoder, name, index))
    joined = Tables(tables, pipe._execution_device)
    start = joined.unit([table.weight[table.index] for table in tables])
    facts = {"kind": "token", "token": token, "init": init, "prompts": list(prompts)}
    return Target(joined, start, of_prompts(pipe, filled), facts)


def check_token(pipe, token: str) -> None:
    """Raises UserError unless a pipeline has text encoders, and this is a word that none of them knows."""
    if not (pairs := encoders_of(pipe)):
        raise UserError(f"{type(pipe).__name__} has no text encoder of transformers; give a class row, not a token.")
    if not isinstance(token, str) or not token or token != "".join(token.split()):
        raise UserError(f"a token is one word without spaces, such as <dog>; got {token!r}.")
    clean = getattr(pipe, "_text_preprocessing", None)
    if clean is not None and (left := clean(token, clean_caption=True)[0]) != token:
        raise UserError(f"{type(pipe).__name__} cleans prompts, of '{token}' '{left}' is left; give a plain word.")
    if any(_known(tokenizer, token) for _, tokenizer, _ in pairs):
        raise UserError(
            f"the token '{token}' is known to this model already; give another, such as <my-{_bare(token)}>."
        )


def _known(tokenizer: Any, word: str) -> bool:
    """Whether a word is one piece of a tokenizer, however it marks where words begin or end."""
    pieces = tokenizer.tokenize(word)
    return word in tokenizer.get_vocab() or (len(pieces) == 1 and pieces[0] != tokenizer.unk_token)


def encoders_of(pipe) -> list[tuple[str, Any, nn.Module]]:
    """(component name, tokenizer, text encoder) of a pipeline, those that transformers made."""
    parts, found = components_of(pipe), []
    for name, encoder in parts.items():
        if name.startswith("text_encoder") and isinstance(encoder, nn.Module):
            tokenizer = parts.get(name.replace("text_encoder", "tokenizer"))
            if tokenizer is not None and hasattr(encoder, "get_input_embeddings"):
                found.append((name, tokenizer, encoder))
    return found


def _bare(token: str) -> str:
    return token.strip("<>") or "token"


def _single(tokenizer, word: str) -> int:
    """The number of a word that is one token."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    unknown = getattr(tokenizer, "unk_token_id", None)
    ends = (getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "bos_token_id", None))
    if len(ids) != 1 or ids[0] in ends or (ids[0] == unknown and word != tokenizer.unk_token):
        pieces = f"{len(ids)} tokens" if len(ids) != 1 else "unknown"
        raise UserError(f"the word '{word}' to start at is {pieces} to this model; give one that is a single token.")
    return ids[0]
