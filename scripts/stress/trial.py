"""One trial: a command is killed once or more, runs to its end, and is compared with a run that nobody disturbed."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from random import Random
from typing import Any

from stress.process import End, Kill, Process
from stress.verbs import Verb, contents, leftovers

GOOD = ("equal",)
BAD = ("different", "leftovers", "refused", "missing", "hung")
MOST = 3  # kills of one trial


class Trial:
    """A verb's trials. The first run, without a kill, says how long it takes, and what is right."""

    def __init__(self, name: str, verb: Verb, folder: Path, inputs: Path) -> None:
        self.verb, self.inputs = verb, inputs
        self.folder = folder / name.replace(" ", "-")
        self.before = folder / f"{self.folder.name}.before"
        self.before.mkdir()
        if verb.old:
            _right(Process(verb.old.replace("INPUT", str(inputs)).split(), self.before).end(), f"{name}, before")
        self.old = contents(self.before)
        self._fresh()
        self.whole = Process(self._words(0), self.folder).end()
        _right(self.whole, name)
        self.right = contents(self.folder)
        self._fresh()
        second = Process(self._words(0), self.folder).end()
        _right(second, name)
        if different := _differ(contents(self.folder), self.right):
            raise AssertionError(f"two undisturbed runs of {name} differ in {different}")

    def run(self, dice: Random, number: signal.Signals, keep: Path | None = None) -> dict[str, Any]:
        """{"outcome", "kills", "detail"}."""
        self._fresh()
        kills: list[str] = []
        turn = 0
        try:
            while turn < MOST and (turn == 0 or dice.random() < 0.4):
                kill = self._kill(dice, number)
                end = Process(self._words(turn), self.folder, kill).end()
                if end.status is None:
                    return _found("hung", kills, "", end)
                turn += 1
                kills.append(f"{kill.signal.name} at {f'call {kill.call}' if kill.call else f'{kill.after:.3f} s'}")
                if gone := self._missing():
                    return _found("missing", kills, gone, end)
                if end.status == 0:  # it was done before it was killed
                    break
                if end.status not in (-number, 130):
                    return _found("refused", kills, f"status {end.status}", end)
            end = Process(self._words(turn), self.folder).end()
            return self._judged(kills, end)
        finally:
            if keep is not None:
                shutil.copytree(self.folder, keep / "trial")
                print(f"the folder: {keep / 'trial'}")

    def _judged(self, kills: list[str], end: End) -> dict[str, Any]:
        if end.status is None:
            return _found("hung", kills, "", end)
        if end.status:
            return _found("refused", kills, f"status {end.status}", end)
        if left := [name for name in leftovers(self.folder) if name not in self.right]:
            return _found("leftovers", kills, ", ".join(left[:5]))
        if different := _differ(contents(self.folder), self.right):
            return _found("different", kills, ", ".join(different[:5]))
        return _found("equal", kills)

    def _missing(self) -> str:
        """What of an earlier result is neither as it was nor as it is to be."""
        for name in self.verb.results:
            before, after = _below(self.old, name), _below(self.right, name)
            now = _below(contents(self.folder), name)
            if now not in ((before, after) if before else ({}, after)):
                return f"{name}: {', '.join(_differ(now, after)[:5])}"
        return ""

    def _kill(self, dice: Random, number: signal.Signals) -> Kill:
        if dice.random() < 0.5:
            return Kill(number, after=dice.random() * self.whole.seconds)
        return Kill(number, call=dice.randint(1, max(1, self.whole.calls)))

    def _words(self, turn: int) -> list[str]:
        goes_on = turn and (self.folder / self.verb.begun).exists()
        return self.verb.words(self.inputs, self.verb.again if goes_on else "")

    def _fresh(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.before, self.folder)


def _right(end: End, what: str) -> None:
    if end.status != 0:
        raise AssertionError(f"an undisturbed run of {what} ended with {end.status}: {end.text}")


def _below(files: dict[str, str], name: str) -> dict[str, str]:
    return {path: digest for path, digest in files.items() if path == name or path.startswith(f"{name}/")}


def _differ(found: dict[str, str], right: dict[str, str]) -> list[str]:
    return sorted(name for name in found.keys() | right.keys() if found.get(name) != right.get(name))


def _found(outcome: str, kills: list[str], detail: str = "", end: End | None = None) -> dict[str, Any]:
    return {"outcome": outcome, "kills": kills, "detail": detail, "said": end.text[-600:] if end else ""}
