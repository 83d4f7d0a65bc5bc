"""Two runs at once into one folder: the second is refused and the first is right, or both are."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from random import Random
from typing import Any

from stress.process import Process
from stress.trial import _differ, _found, _right
from stress.verbs import Verb, contents

PAIRED = ("collect", "quantize", "generate", "evaluate", "distill")
REFUSED = 2


class PairTrial:
    """A verb's pairs, with the same and with other settings; what each leaves alone is right."""

    def __init__(self, name: str, verb: Verb, folder: Path, inputs: Path) -> None:
        self.name, self.folder = name, folder / name.replace(" ", "-")
        self.words = [verb.words(inputs), verb.words(inputs, verb.other)]
        self.alone: list[dict[str, str]] = []
        for words in self.words:
            shutil.rmtree(self.folder, ignore_errors=True)
            end = Process(words, self.folder).end()
            _right(end, name)
            self.alone.append(contents(self.folder))
        self.seconds = end.seconds
        if self.alone[0] == self.alone[1]:
            raise AssertionError(f"{name} gives the same with other settings, so a mix could not be seen")

    def run(self, dice: Random, number: int, keep: Path | None = None) -> dict[str, Any]:
        """{"outcome", "kills": none, "detail": settings and statuses}."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        same, wait = dice.random() < 0.4, dice.choice((0.0, 0.0, dice.random() * self.seconds))
        second = 0 if same else 1
        runs = [Process(self.words[0], self.folder, report=self.folder.with_name("first.said"))]
        time.sleep(wait)
        runs.append(Process(self.words[second], self.folder, report=self.folder.with_name("second.said")))
        ends = [one.end() for one in runs]
        statuses = [end.status for end in ends]
        detail = f"{'the same' if same else 'other'} settings, {wait:.2f} s apart, status {statuses}"
        if None in statuses:
            return _found("hung", [], detail)
        both = same and self.name != "distill"  # which does not go on without --resume, and says so
        bad = [end for end in ends if end.status not in ((0,) if both else (0, REFUSED))]
        if bad or 0 not in statuses:
            return _found("refused", [], detail, (bad or ends)[0])
        now = contents(self.folder)
        whole = [self.alone[which] for which, status in zip((0, second), statuses, strict=True) if status == 0]
        if keep is not None:
            shutil.copytree(self.folder, keep / "trial")
        if hidden := [name for name in now if name.rpartition("/")[2].startswith(".")]:
            return _found("leftovers", [], f"{detail}: {hidden[:3]}")
        if now not in whole:
            return _found("different", [], f"{detail}: {_differ(now, whole[0])[:5]}")
        return _found("equal", [], detail)
