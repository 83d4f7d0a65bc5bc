"""Damaged files and killed commands: short runs of both scripts, and that they would see what they look for."""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from random import Random

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from ptq4dm.errors import UserError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def stress():
    """A function: name of a file in scripts/stress -> the module."""
    before, surroundings = list(sys.path), dict(os.environ)
    loud = diffusers.utils.logging.get_verbosity()
    sys.path.insert(0, str(SCRIPTS))
    yield lambda name: importlib.import_module(f"stress.{name}")
    diffusers.utils.logging.set_verbosity(loud)
    diffusers.utils.logging.enable_progress_bar()
    sys.path[:] = before
    os.environ.clear()
    os.environ.update(surroundings)


def test_damaged_files_are_refused_or_the_same(stress, tmp_path, capsys):
    output = tmp_path / "fuzz.jsonl"
    bad = stress("fuzz").main(["--inputs", "120", "--seed", "7", "--output", str(output)])
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert bad == 0, "\n".join(str(one) for line in lines for one in line["bad"])
    counts = stress("fuzz").summed([line["counts"] for line in lines])
    assert sum(sum(row.values()) for row in counts.values()) == 120
    assert len(counts) > 15 and sum(row.get("refused", 0) for row in counts.values()) > 40
    assert "| together | 120 |" in capsys.readouterr().out
    assert stress("fuzz").main(["--inputs", "120", "--seed", "7", "--output", str(output)]) == 0  # all there already
    with pytest.raises(UserError, match="was made with another seed"):
        stress("fuzz").main(["--inputs", "120", "--seed", "8", "--output", str(output)])


@pytest.fixture
def outcome(stress, tmp_path):
    """A function: what a loader does -> the outcome of a file whose byte was changed."""
    kinds, judge, change = stress("kinds"), stress("judge"), stress("change")
    (tmp_path / "outside").mkdir()

    def of(load, hostile=False, **more):
        kind = kinds.Kind("x", lambda folder: (folder / "a.txt").write_bytes(b"2"), load, **more)
        subject = judge.Subject.of(kind, tmp_path / f"k{len(list(tmp_path.iterdir()))}")
        made = change.Change("bytes", {"a.txt": b"3"}, hostile=hostile)
        found = judge.judged(0, subject, made, "a.txt", tmp_path / "outside")
        assert (subject.place.folder / "a.txt").read_bytes() == b"2"  # put back
        return found.outcome

    return of


def value(folder):
    return float((folder / "a.txt").read_text())


class AsItIs(UserError):
    """A message that is not made printable."""

    def __str__(self):
        return self.message


def refusing(message, kind=UserError):
    def load(folder, _):
        if value(folder) == 3:
            error = kind(message)
            error.message = message
            raise error
        return 2

    return load


def test_every_outcome_is_seen(outcome, monkeypatch, stress, tmp_path):
    def dies(folder, _):
        return 1 / (3 - value(folder))

    assert outcome(refusing("a.txt is damaged.")) == "refused"
    assert outcome(refusing("something is damaged.")) == "unclear"
    assert outcome(refusing(f"a.txt {'is damaged ' * 60}.")) == "unclear"
    assert outcome(refusing("a.txt\nis damaged.", AsItIs)) == "unclear"
    assert outcome(refusing("a.txt is \ud800.", AsItIs)) == "unclear"
    assert outcome(refusing("a.txt\nis \ud800.")) == "refused"  # every UserError can be printed
    assert outcome(lambda folder, _: 2) == "same"
    assert outcome(lambda folder, _: value(folder)) == "unseen"
    assert outcome(lambda folder, _: value(folder), guarded=lambda path: True) == "silent"
    assert outcome(lambda folder, _: value(folder), hostile=True) == "silent"
    assert outcome(lambda folder, _: torch.tensor(2.0 if value(folder) == 2 else torch.nan)) == "silent"
    assert outcome(dies) == "traceback"
    canary = tmp_path / "outside" / "canary"
    assert outcome(lambda folder, _: value(folder) == 3 and canary.mkdir()) == "escaped"
    monkeypatch.setattr(stress("judge"), "SLOW", 0.05)
    assert outcome(lambda folder, _: value(folder) == 3 and time.sleep(1)) == "slow"


def test_an_input_that_kills_its_process_is_told_and_the_next_go_on(stress, tmp_path, monkeypatch):
    worker, judge = stress("worker"), stress("judge")

    def one(number, *_):
        if number == 2:
            os.abort()
        return judge.Result(number, "x", "", "", "same")

    monkeypatch.setattr(worker, "_one", one)
    kind = stress("kinds").Kind("x", lambda folder: (folder / "a.json").write_text("[1]"), lambda folder, _: 1)
    (tmp_path / "outside").mkdir()
    subjects = {"x": judge.Subject.of(kind, tmp_path / "k")}
    found = {one.number: one.outcome for one in worker.results(range(5), 0, subjects, tmp_path / "outside")}
    assert found == {0: "same", 1: "same", 2: "crash", 3: "same", 4: "same"}


def test_the_same_seed_and_number_give_the_same_input(stress, tmp_path):
    judge = stress("judge")

    def make(folder):
        save_file({"x": torch.arange(4.0)}, folder / "a.safetensors", {"about": '{"a": [1, 2]}'})
        (folder / "b.json").write_text('{"a": {"b": 1.5}}')

    kind = stress("kinds").Kind("x", make, lambda folder, _: 1)
    subjects = {"x": judge.Subject.of(kind, tmp_path / "k")}
    (tmp_path / "outside").mkdir()
    drawn = [[judge.drawn(1, number, subjects, tmp_path)[1] for number in range(200)] for _ in range(2)]
    assert [one.files for one in drawn[0]] == [one.files for one in drawn[1]]
    families = {one.name.partition(" ")[0] for one in drawn[0]}
    assert families == {"bytes", "place", "json", "header", "inner", "tensor", "hostile"}


# ---------------------------------------------------------------------- kills


@pytest.fixture(scope="module")
def trials(stress, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    stress("verbs").make_inputs(folder / "inputs")

    def of(name):
        return stress("trial").Trial(
            name, stress("verbs").VERBS[name], tmp_path_factory.mktemp(name), folder / "inputs"
        )

    return of


@pytest.mark.parametrize("name", ["collect", "quantize", "generate"])
def test_killed_commands_go_on_to_the_same_bits(trials, stress, name):
    trial = trials(name)
    for number in range(4):
        found = trial.run(Random(number), stress("process").signal.SIGKILL)
        assert found["outcome"] == "equal" and found["kills"], found


def test_a_command_is_killed_before_the_call_that_is_asked_for(trials, stress):
    process, trial = stress("process"), trials("generate")
    assert trial.whole.calls > 10
    for call, images in ((1, False), (trial.whole.calls, True)):
        trial._fresh()
        end = process.Process(trial._words(0), trial.folder, process.Kill(process.signal.SIGKILL, call=call)).end()
        assert end.status == -9
        assert (trial.folder / "images" / "000000.png").exists() == images


def test_what_is_left_behind_or_lost_is_seen(trials):
    trial = trials("generate")
    picture = trial.folder / "images" / "000003.png"
    end = stress_end(0)
    assert trial._judged([], end)["outcome"] == "equal"
    picture.write_bytes(picture.read_bytes() + b"x")
    assert trial._judged([], end)["outcome"] == "different"
    (trial.folder / ".images.half").touch()
    assert trial._judged([], end)["outcome"] == "leftovers"
    assert trial._judged([], stress_end(2))["outcome"] == "refused"


def stress_end(status):
    return importlib.import_module("stress.process").End(status, 0.0, 0, "")
