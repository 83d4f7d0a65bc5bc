"""One input: a kind of file, a change of it, and what came of loading it."""

from __future__ import annotations

import os
import shutil
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from stress.change import Case, Change, Place
from stress.changes_bytes import BYTES, PLACES
from stress.changes_hostile import HOSTILE
from stress.changes_json import JSON
from stress.changes_tensors import TENSORS
from stress.kinds import Kind
from stress.leaves import Leaves, differences, leaves

from ptq4dm.errors import UserError

SLOW = 10.0  # seconds
LONGEST = 600  # characters of a refusal
GOOD = ("refused", "same", "other", "unseen")
BAD = ("silent", "unclear", "traceback", "slow", "crash", "escaped")

GROUPS = {
    "bytes": (BYTES, 4),
    "place": (PLACES, 2),
    "json": (JSON, 5),
    "tensors": (TENSORS, 5),
    "hostile": (HOSTILE, 1),
}
SUFFIXES = {
    "json": (".json", ".jsonl", ".safetensors", ".png"),
    "tensors": (".safetensors", ".npz"),
}


class TooSlow(BaseException):
    """The loader takes longer than SLOW; no loader may catch it."""


@dataclass
class Subject:
    """A kind with its files in a folder, its state, and what its loader gives of undamaged files."""

    kind: Kind
    place: Place
    state: Any
    right: Leaves

    @classmethod
    def of(cls, kind: Kind, folder: Path) -> Subject:
        folder.mkdir(parents=True)
        state = kind.make(folder)
        return cls(kind, Place(folder), state, leaves(kind.load(folder, state)))


@dataclass
class Result:
    """number: of the input. place: file and line where an error came from. detail: message, or what is wrong."""

    number: int
    kind: str
    change: str
    file: str
    outcome: str
    detail: str = ""
    place: str = ""

    def to_dict(self) -> dict:
        return asdict(self)


def drawn(seed: int, number: int, subjects: dict[str, Subject], outside: Path) -> tuple[Subject, Change, str]:
    """(subject, change, the file it begins with) of an input: the same for the same seed, number and subjects."""
    dice = Random(f"{seed}/{number}")
    names = list(subjects)
    subject = subjects[dice.choices(names, [subjects[n].kind.weight for n in names])[0]]
    other = subjects[dice.choice(names)]
    path = dice.choice([name for name in subject.place.files if not name.endswith("README.md")])
    case = Case(dice, subject.place.files, path, list(other.place.files.values()), outside)
    change = _change(case)
    new = change.files.get(path)
    if dice.random() < 0.12 and isinstance(new, bytes) and not change.hostile:
        try:
            more = _change(Case(dice, {**case.files, path: new}, path, case.donors, outside))
        except Exception:  # the first change left nothing that the second can read
            return subject, change, path
        files = {**change.files, **more.files}
        change = Change(f"{change.name} + {more.name}", files, change.formed and more.formed, more.hostile)
    return subject, change, path


def _change(case: Case) -> Change:
    fits = [g for g in GROUPS if g not in SUFFIXES or case.path.endswith(SUFFIXES[g])]
    while True:
        table = GROUPS[case.dice.choices(fits, [GROUPS[g][1] for g in fits])[0]][0]
        change = (
            table[case.dice.choice(list(table))](case)
            if table is not TENSORS and table is not JSON
            else _of(table, case)
        )
        if change is not None:
            return change


def _of(table: dict, case: Case) -> Change | None:
    """Of JSON and tensors the kind of change goes by the kind of file."""
    if table is TENSORS:
        return table[case.path.rpartition(".")[2]](case)
    if case.path.endswith(".png"):
        return table["inner"](case)
    return table[case.dice.choice(("header", "inner", "inner")) if case.path.endswith(".safetensors") else "json"](
        case
    )


def judged(number: int, subject: Subject, change: Change, path: str, outside: Path) -> Result:
    """Put the change in, load, look, and put everything back."""
    result = Result(number, subject.kind.name, change.name, path, "")
    try:
        subject.place.put(change)
        with limited(SLOW):
            found = leaves(subject.kind.load(subject.place.folder, subject.state))
        result.outcome, result.detail = _loaded(subject, change, found)
    except TooSlow:
        result.outcome = "slow"
    except UserError as error:
        result.outcome, result.detail = _refused(str(error), subject, change)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        result.outcome, result.detail = "traceback", f"{type(error).__name__}: {lines[0][:300]}"
        result.place = _ours(error)
    finally:
        subject.place.restore()
    if (outside / "canary").exists():
        shutil.rmtree(outside / "canary")
        result.outcome, result.detail = "escaped", "it ran code of the file"
    return result


def _loaded(subject: Subject, change: Change, found: Leaves) -> tuple[str, str]:
    kind, differ = subject.kind, differences(found, subject.right)
    if not differ:
        return "same", ""
    if change.hostile:
        return "silent", f"something hostile was loaded: {differ[0]}"
    try:
        wrong = kind.wrong(found, subject.right)
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        wrong = f"{type(error).__name__} when looked at: {error}"
    guarded = [name for name in differ if name in found and kind.guarded(name)]
    if wrong or guarded:
        return "silent", wrong or f"{guarded[0]} is another"
    return ("other" if change.formed else "unseen"), f"{differ[0]} is another"


def _refused(message: str, subject: Subject, change: Change) -> tuple[str, str]:
    """A refusal is one line, not too long, can be printed, and names the file or its folder."""
    names = [os.path.basename(name) for name in change.files] + [str(subject.place.folder)]
    try:
        message.encode()
    except UnicodeEncodeError:
        return "unclear", f"it cannot be printed: {message[:300]!r}"
    if "\n" in message or len(message) > LONGEST:
        return "unclear", f"{len(message)} characters, {message.count(chr(10)) + 1} lines: {message[:200]!r}"
    if subject.kind.named and not any(name in message for name in names):
        return "unclear", f"names no file: {message}"
    return "refused", message


def _ours(error: BaseException) -> str:
    """The last line of the package itself that an error went through."""
    frames = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
    ours = [one for one in frames if "site-packages" not in one and "/lib/python" not in one and "<frozen" not in one]
    return "/".join((ours or frames)[-1].split("/")[-3:])


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TooSlow in this block after so long."""

    def stop(number: int, frame: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    began = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if time.monotonic() - began > seconds:  # nobody let the signal through
        raise TooSlow
