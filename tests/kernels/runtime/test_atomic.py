"""Files and folders are whole at any time, whatever kills the process that writes them."""

import os
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from ptq4dm.kernels.runtime import atomic


def names(folder):
    return sorted(path.name for path in folder.iterdir())


HEAD = """
import os, time
from pathlib import Path
from ptq4dm.kernels.runtime.atomic import *
here = Path(".")
"""


@contextmanager
def running(program: str, folder: Path):
    """Run a program that says when it is ready, and kill it at the end of the block."""
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    command = [sys.executable, "-c", HEAD + program]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, env=variables) as child:
        try:
            assert child.stdout.readline() == b"ready\n"
            yield
        finally:
            child.kill()


def killed(program: str, folder: Path) -> None:
    with running(program, folder):
        pass


def test_replacing_writes_a_whole_file_with_the_mode_of_a_new_one(tmp_path):
    with atomic.replacing(tmp_path / "a") as temporary:
        assert names(tmp_path) != ["a"] and names(tmp_path)[0].startswith(".a.")
        temporary.write_text("new")
        temporary.chmod(0o600)
    (tmp_path / "b").touch()
    assert (tmp_path / "a").read_text() == "new" and (tmp_path / "a").stat().st_mode == (
        tmp_path / "b"
    ).stat().st_mode
    with pytest.raises(ZeroDivisionError), atomic.replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "new" and names(tmp_path) == ["a", "b"]


def test_replacing_follows_links_and_leaves_devices_alone(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a").symlink_to("disk/a")
    for text in ("one", "two"):
        with atomic.replacing(tmp_path / "a") as temporary:
            temporary.write_text(text)
    assert (tmp_path / "a").is_symlink() and (tmp_path / "disk/a").read_text() == "two"
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path / "disk"):
        with pytest.raises(OSError, match="no plain file"), atomic.replacing(place):
            pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_exchange(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchanged", lambda *_: False)
    place, new = tmp_path / "model", tmp_path / "new"
    for name in ("first", "second"):
        new.mkdir()
        (new / name).touch()
        with atomic.hidden_folder(place) as beside:
            old = atomic.exchange(new, place, beside)
            assert (old is None) if name == "first" else names(old) == ["first"]
        assert names(place) == [name]


def test_exchange_brings_the_old_one_back(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchanged", lambda *_: False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/old").touch()
    with atomic.hidden_folder(tmp_path / "model") as beside, pytest.raises(FileNotFoundError):
        atomic.exchange(tmp_path / "missing", tmp_path / "model", beside)
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["old"]


def test_sweep_takes_what_the_dead_left_and_not_what_lives(tmp_path):
    program = "with replacing(here / 'a') as t:\n t.write_text('half'); print('ready', flush=True); time.sleep(60)"
    killed(program, tmp_path)
    assert len(names(tmp_path)) == 1
    with atomic.hidden_folder(tmp_path / "b") as living:
        atomic.sweep(tmp_path)
        assert names(tmp_path) == [living.name]
    foreign = tmp_path / ".somebody.ptq4dm"
    foreign.mkdir()
    atomic.sweep(tmp_path)
    assert names(tmp_path) == [foreign.name]


@pytest.mark.parametrize("moment", ["before it has its lock", "after"])
def test_the_dead_without_a_lock_are_swept_too(tmp_path, moment):
    """Killed right after it made its folder, and while it took it away."""
    program = f"""
import sys
def stop(event, args):
    early = event == "open" and str(args[0]).endswith("/lock")
    late = event == "os.rmdir" and ".a." in str(args[0])
    if early if {moment.startswith("before")} else late:
        print("ready", flush=True); time.sleep(60)
sys.addaudithook(stop)
with replacing(here / "a") as temporary:
    (temporary.parent / "more").mkdir()
"""
    killed(program, tmp_path)
    assert any(name.endswith(".ptq4dm") for name in names(tmp_path))
    atomic.sweep(tmp_path)
    assert not any(name.endswith(".ptq4dm") for name in names(tmp_path))


def test_killed_between_two_renames_the_old_one_comes_back(tmp_path):
    """Where two names cannot be exchanged in one step."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/old").touch()
    program = """
import ptq4dm.kernels.runtime.atomic as atomic
atomic._exchanged = lambda *_: False
rename = os.rename
def stop(one, other):
    rename(one, other); print("ready", flush=True); time.sleep(60)
os.rename = stop
with hidden_folder(here / "model") as beside:
    (beside / "new").mkdir()
    exchange(beside / "new", here / "model", beside)
"""
    killed(program, tmp_path)
    assert not (tmp_path / "model").exists()
    atomic.sweep(tmp_path)
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["old"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_with_an_exchange_the_folder_is_never_missing(tmp_path):
    program = """
while True:
    with hidden_folder(here / "model") as beside:
        (beside / "new").mkdir(); (beside / "new" / "file").touch()
        exchange(beside / "new", here / "model", beside)
    if not os.path.exists("ready"):
        open("ready", "w").close(); print("ready", flush=True)
"""
    with running(program, tmp_path):
        until, looks = time.monotonic() + 0.5, 0
        while time.monotonic() < until:
            os.stat(tmp_path / "model" / "file")
            looks += 1
    assert looks > 100
