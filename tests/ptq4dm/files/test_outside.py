"""Data from outside: whatever is wrong with a file is one sentence that names it."""

import io
import json
import os
import pickle
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from ptq4dm.errors import DamagedFile, UserError
from ptq4dm.files.outside import finite, outside, read_json, read_object, read_tensors, unpickled_tensors

BAD_TEXTS = {
    "nothing": b"",
    "cut short": b'{"a": [1, 2',
    "nested without end": b"[" * 100_000,
    "a number of many digits": b'{"a": ' + b"9" * 5000 + b"}",
    "no UTF-8": b'{"a": "\xff"}',
    "a name twice": b'{"a": 1, "a": 2}',
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("text", BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_bad_json_is_one_sentence(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(DamagedFile, match=r"x\.json cannot be read \(.+\); do this\.$") as caught:
        read_json(path, "do this")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"words, and no tensors", "it is no file of torch.save"),
        (b"", "it is no file of torch.save"),
        (save({"a": torch.ones(3)}), "it is no file of torch.save"),
        (pickle.dumps({"a": Path("x")}), "it is no file of torch.save"),
        (pickle.dumps({"a": Path("x")}, 2), "it is damaged, or holds more than tensors and plain containers"),
        (saved(torch.nn.Linear(2, 2)), "it is damaged, or holds more than tensors and plain containers"),
        (saved({"a": torch.ones(200)})[:-300], "it is damaged: no whole file of torch.save"),
    ],
    ids=["words", "nothing", "safetensors", "a new pickle", "an old pickle", "a module", "cut short"],
)
def test_what_is_no_file_of_tensors_is_told_in_our_words(data, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        unpickled_tensors(data)


def test_files_of_tensors_of_both_kinds_are_read():
    old = io.BytesIO()
    torch.save({"a": torch.ones(3)}, old, _use_new_zipfile_serialization=False)
    for data in (saved({"a": torch.ones(3)}), old.getvalue()):
        assert torch.equal(unpickled_tensors(data)["a"], torch.ones(3))


def test_missing_files_folders_and_sizes(tmp_path, monkeypatch):
    with pytest.raises(DamagedFile, match="is missing"):
        read_json(tmp_path / "none.json")
    with pytest.raises(DamagedFile, match="cannot be read"):
        read_json(tmp_path)
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(1 << 40)  # a file of holes
    with pytest.raises(DamagedFile, match="more than any text"):
        read_json(tmp_path / "huge.json")


@pytest.mark.parametrize("value", [None, 7, [], {}, {"a": True}, {"a": "1"}, {"a": None}])
def test_objects_have_the_keys_and_types_asked_for(tmp_path, value):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(value))
    with pytest.raises(DamagedFile, match="x.json"):
        read_object(path, {"a": int})
    path.write_text('{"a": 3, "more": 1}')
    assert read_object(path, {"a": int})["a"] == 3


def test_tensor_files(tmp_path):
    path = tmp_path / "x.safetensors"
    values = torch.arange(12.0).reshape(4, 3)
    save_file({"a": values}, path, {"about": '{"n": 1}'})
    assert read_tensors(path, lambda file: file.json("about")) == {"n": 1}
    assert torch.equal(read_tensors(path, lambda file: file.rows("a", torch.tensor([2, 0]))), values[[2, 0]])
    for use in (lambda f: f.tensor("b"), lambda f: f.json("b"), lambda f: f.rows("a", torch.tensor([9]))):
        with pytest.raises(DamagedFile, match="x.safetensors"):
            read_tensors(path, use)
    whole = path.read_bytes()
    for damaged in (b"", whole[:7], whole[:-1], whole + b"\0", os.urandom(100), b"\xff" * 8 + whole[8:]):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFile, match="x.safetensors"):
            read_tensors(path, lambda file: file.tensors())


def test_user_errors_go_through_and_interrupts_too():
    for error in (UserError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, outside("x"):
            raise error
        assert caught.value is error


def test_no_interrupt_is_taken_for_damage(tmp_path):
    """At any line of PyTorch's Python, which Rust and C++ call."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, path)

    def interrupted_at(number):
        lines = 0

        def trace(frame, event, argument):
            nonlocal lines
            if event == "line":
                lines += 1
                if lines == number:
                    signal.raise_signal(signal.SIGINT)
            return trace if "torch" in Path(frame.f_code.co_filename).parts else None

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            read_tensors(path, lambda file: file.tensors())
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        assert lines < number  # it was raised, or the end came before it
        return False

    number = 1
    while interrupted_at(number):
        number += 1
    assert number > 5  # at two of which PyTorch says that a storage has no shape


def test_finite():
    finite(torch.ones(2), "a")
    finite(torch.ones(2, dtype=torch.int8), "a")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="'a' holds NaN or infinity"):
            finite(torch.tensor([1, bad], dtype=torch.bfloat16), "a")


def test_a_pipe_or_a_device_in_a_files_place_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        for read in (read_json, lambda path: read_tensors(path, lambda file: file.names)):
            with pytest.raises(DamagedFile, match=f"{name} cannot be read .it is no plain file"):
                read(tmp_path / name)
