"""Command lines made at random from the parser's own words: no traceback, one line, status 2, nothing on stdout.

FUZZ_LINES=5000 FUZZ_SEED=7 python -m pytest tests/ptq4dm/cli/test_parser_fuzz.py       a longer run
"""

import contextlib
import io
import json
import os
import random
import traceback

import pytest

from ptq4dm.cli import allocate, collect, completion, distill, evaluate, generate, info, quantize
from ptq4dm.cli.benches import bench, hardware, tune
from ptq4dm.cli.main import main
from ptq4dm.cli.training import personalize, train
from ptq4dm.errors import UserError

LINES, SEED = int(os.environ.get("FUZZ_LINES", 150)), int(os.environ.get("FUZZ_SEED", 0))
WORDS = json.loads(completion.WORDS.read_text())
REACHED = "the work would begin"
VALUES = [
    "", " ", "-", "--", "=", "0", "-0", "-1", "1", "2", "7", "1.5", "-2.5", "nan", "inf", "-inf", "1e309", "1e-320",
    "9" * 30, "9" * 5000, "1_0", "٣", "0x10", "None", "null", "[]", "{}", "true", "x", "X" * 300, "a b", "a\nb",
    "\x1b[31m", "\x7f", "caf\udce9", "é", "%", "%s", "%(prog)s", "../..", "/dev/null", "/", "~", ".",
    "~nobody/x", "org/model", "meta", "cuda", "cuda:99", "cpu:-1", "mps", "float64", "1,2", "16,64,96", "64,64,64",
    "*", "ddim", "rho_rk-3heun/edm", "unet-cifar10", "int8", "lp", "max", "ndtc", "ptq4dm",
]  # fmt: skip


def a_value(rng, value):
    if value and value["choices"] and rng.random() < 0.5:
        return rng.choice(value["choices"])
    return rng.choice(VALUES)


def a_line(rng):
    path = rng.choice([name for name in WORDS if name not in ("", "bench")])
    words = path.split()
    flags = WORDS[path]["flags"]
    for _ in range(rng.randrange(5)):
        flag = rng.choice([*flags, *flags, *WORDS[rng.choice(list(WORDS))]["flags"]])
        if flag in ("--help", "--version") and rng.random() < 0.7:
            continue
        value = flags.get(flag)
        flag = flag[: rng.randrange(3, len(flag) + 1)] if rng.random() < 0.1 else flag
        if rng.random() < 0.15:
            words.append(f"{flag}={a_value(rng, value)}")
            continue
        words.append(flag)
        if (value is not None) == (rng.random() < 0.9):
            words += [a_value(rng, value) for _ in range(rng.randrange(1, 3))]
    if rng.random() < 0.1:
        words.insert(rng.randrange(len(words) + 1), rng.choice(VALUES))
    if rng.random() < 0.05:
        words.pop(0)
    return words


@pytest.fixture
def no_work(monkeypatch, tmp_path):
    """Whatever a verb does once its arguments were found right ends it."""

    def reached(*args, **kwargs):
        raise UserError(REACHED)

    monkeypatch.chdir(tmp_path)
    for verb in (allocate, bench, collect, evaluate, generate, info, personalize, quantize):
        monkeypatch.setattr(verb, "load", reached)
    for verb in (distill, train):
        monkeypatch.setattr(verb, "load_pipeline", reached)
    for name in ("evaluate_images", "write_reference"):
        monkeypatch.setattr(evaluate, name, reached)
    monkeypatch.setattr(tune, "tune", reached)
    monkeypatch.setattr(hardware, "compare", reached)


def outcome(words):
    """(status, stdout, stderr), or the traceback of what should not have happened."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as end:
            status = end.code
        except BaseException:
            return "traceback", "", traceback.format_exc()
    return status, out.getvalue(), err.getvalue()


def test_any_line_is_answered_in_one(no_work):
    rng, wrong, seen = random.Random(SEED), [], {"refused": 0, "reached": 0, "shown": 0}
    for _ in range(LINES):
        words = a_line(rng)
        status, out, err = outcome(words)
        shown = status == 0 and err == "" and out != ""  # --help, --version, a script
        quiet = status == 0 and err == out == "" and "--quiet" in words
        refused = status == 2 and out == "" and err.startswith("ptq4dm") and err.count("\n") == 1
        seen["shown" if shown or quiet else "reached" if REACHED in err else "refused"] += 1
        if not (shown or quiet or refused) or len(err) > 2000 or not err.rstrip("\n").isprintable():
            wrong.append(f"{words}: {status} {out[:200]!r} {err[-900:]}")
    assert not wrong, f"{len(wrong)} of {LINES}\n" + "\n".join(wrong[:20])
    assert min(seen.values()) > LINES // 200 and seen["refused"] > LINES // 3, seen
