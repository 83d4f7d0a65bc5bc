"""Errors that a user can cause are one line; bugs are tracebacks."""

import errno
import os

import pytest
import torch

from ptq4dm.cli import info
from ptq4dm.cli.failures import in_flags, told
from ptq4dm.cli.main import main
from ptq4dm.errors import UserError, printable


def caught(action):
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("no error")


FLAGS = {"bits": "--bits", "weight_bits": "--weight-bits", "images": "--num-images", "served": "--served"}


@pytest.mark.parametrize(
    "sentence, shown",
    [
        ("ShiftQuantConfig: images must be at least 1; got 0.", "--num-images must be at least 1; got 0."),
        ("weight_bits must be 4 or None; got 5.", "--weight-bits must be 4; got 5."),
        ("bits and weight_bits are given together.", "--bits and --weight-bits are given together."),
        ("bits=16 leaves no place for served=True.", "--bits 16 leaves no place for --served."),
        ("weight_bits holds no pictures.", "weight_bits holds no pictures."),  # a folder
        ("images/bits=4 is not empty; see weight_bits.", "images/bits=4 is not empty; see weight_bits."),
        ("group_size must be 64; got 3.", "group_size must be 64; got 3."),  # no option of this command
        ("the images must be of one size.", "the images must be of one size."),
        ("bits='all' and weight_bits='mixed-8' differ.", "--bits all and --weight-bits mixed-8 differ."),
        ("leave weight_bits and served out, not bits.", "leave --weight-bits and --served out, not bits."),
        ("leave 'bits' out of train.", "leave 'bits' out of train."),
        ("give bits=4 and weight_bits=None with it.", "give --bits 4 and no --weight-bits with it."),
        ("give served=False with it.", "give no --served with it."),
    ],
)
def test_options_are_told_as_flags(sentence, shown):
    assert in_flags(sentence, FLAGS) == shown


def test_none_is_told_by_its_word():
    assert (
        in_flags("give group_size=None with it.", {"group_size": "--group-size"}) == "give --group-size row with it."
    )


TOLD = [
    (UserError("no such thing."), 2, "no such thing."),
    (MemoryError(), 1, "not enough memory; give a smaller --batch-size"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "not enough memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), 1, "not enough GPU memory"),
    (RuntimeError("CUDA error: out of memory"), 1, "not enough GPU memory"),
    (OSError(errno.ENOSPC, "No space left on device", "out/x"), 1, "No space left on device: out/x; make room"),
    (OSError(errno.EIO, "Input/output error"), 1, "Input/output error."),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 2, "File name too long: x."),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 2, "No such file or directory: x."),
    (PermissionError(errno.EACCES, "Permission denied", "a", None, "b"), 2, "Permission denied: a -> b."),
    (
        ModuleNotFoundError("No module named 'transformers'", name="transformers"),
        1,
        "'transformers' is not installed",
    ),
    (caught(lambda: "caf\udce9".encode()), 2, r"the name b'caf\xe9' is not UTF-8"),
    (caught(lambda: os.stat("a\0b")), 2, "zero byte"),
    (caught(lambda: torch.empty(1 << 60, dtype=torch.uint8)), 1, "not enough memory"),
    (caught(lambda: torch.empty(1 << 62, dtype=torch.float64)), 1, "not enough memory"),
]


@pytest.mark.parametrize("error, status, text", TOLD, ids=lambda value: type(value).__name__)
def test_what_a_user_can_cause(error, status, text):
    found = told(error)
    assert found is not None and found[0] == status and text in found[1]


BUGS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    KeyError("layers"),
    TypeError("unsupported"),
    UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range(128)"),
    ModuleNotFoundError("No module named 'ptq4dm.nowhere'", name="ptq4dm.nowhere"),
    OSError("no number"),
]


@pytest.mark.parametrize("error", BUGS, ids=lambda value: type(value).__name__)
def test_bugs_are_seen(error, monkeypatch):
    def broken(*args):
        raise error

    assert told(error) is None
    monkeypatch.setattr(info, "load", broken)
    with pytest.raises(type(error)):
        main(["info"])


def test_the_line_and_the_status(monkeypatch, capsys):
    def full(*args):
        raise MemoryError

    monkeypatch.setattr(info, "load", full)
    assert main(["info"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err == "ptq4dm info: not enough memory; give a smaller --batch-size, or free memory.\n"


@pytest.mark.parametrize(
    "text, line",
    [("plain é", "plain é"), ("a\nb", "a b"), ("\x1b[31mred", r"\x1b[31mred"), ("caf\udce9", r"caf\udce9"), ("", "")],
)
def test_printable(text, line):
    assert printable(text) == line
