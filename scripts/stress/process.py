"""A command in a forked process, killed at a moment or at a call, and how it ended."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ptq4dm import starting
from ptq4dm.cli.main import main

LONGEST = 120.0  # seconds; a command that takes longer hangs
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# tqdm's own lock is shared by all that are forked: one that is killed while it has it keeps it for ever.
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "ctypes.dlsym"}


@dataclass
class Kill:
    """signal: its number. after: seconds; or call: before so many calls that touch files."""

    signal: int
    after: float | None = None
    call: int | None = None


@dataclass
class End:
    """status: as exit() has it, minus the signal's number where one ended it, None where it hung. calls: that touch
    files. text: the last lines of what it said."""

    status: int | None
    seconds: float
    calls: int
    text: str


class Process:
    """A command that runs; `end` waits for it. The parent's imports are there already: it starts in milliseconds."""

    def __init__(self, words: list[str], folder: Path, kill: Kill | None = None, report: Path | None = None) -> None:
        self.kill, self.began = kill, time.monotonic()
        self.report = report or folder.with_name(f"{folder.name}.said")
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # so that none comes before the child is ready for it
        self.child = os.fork()
        if not self.child:
            _run(words, folder, kill, self.report)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def end(self) -> End:
        status, killed = None, self.kill is None or self.kill.after is None
        while status is None and time.monotonic() - self.began < LONGEST:
            ended, code = os.waitpid(self.child, os.WNOHANG)
            if ended:
                status = os.waitstatus_to_exitcode(code)
            elif not killed and time.monotonic() - self.began >= self.kill.after:
                os.kill(self.child, self.kill.signal)
                killed = True
            else:
                time.sleep(0.001)
        if status is None:
            os.kill(self.child, signal.SIGUSR1)  # where it hangs
            time.sleep(0.5)
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
        said = self.report.read_text(errors="replace")
        calls = re.search(r"\ncalls (\d+)$", said)
        return End(status, time.monotonic() - self.began, int(calls[1]) if calls else 0, said[-1500:])


def _run(words: list[str], folder: Path, kill: Kill | None, report: Path) -> None:
    """The process: never returns."""
    status = 70
    try:
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        out = os.open(report, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(out, stream)
        tqdm.set_lock(threading.RLock())
        faulthandler.register(signal.SIGUSR1, out, all_threads=True)
        calls = _count(str(folder), kill)
        for number in SIGNALS:  # ended by it without a word until the command has begun
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        signal.signal(signal.SIGINT, starting.end)  # as it is in a process that was started for the command
        try:
            sys.argv = ["ptq4dm", *words]
            status = main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
            status = 1
        calls["off"] = True
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(out, f"\ncalls {calls['number']}".encode())
    finally:
        os._exit(status)


def _count(folder: str, kill: Kill | None) -> dict[str, Any]:
    """Count calls that touch files in a folder (and exchanges of two), and be killed before one of them."""
    calls: dict[str, Any] = {"number": 0, "off": False}

    def hook(event: str, args: tuple) -> None:
        if event not in EVENTS or calls["off"]:
            return
        if event == "ctypes.dlsym":
            if args[1] != "renameat2":
                return
        elif not _inside(args[0], folder) or (event == "open" and not _writes(args)):
            return
        calls["number"] += 1
        if kill is not None and kill.call == calls["number"]:
            os.kill(os.getpid(), kill.signal)

    sys.addaudithook(hook)
    return calls


def _inside(path: Any, folder: str) -> bool:
    try:
        return os.path.abspath(os.fsdecode(path)).startswith(folder)
    except TypeError:
        return True  # by its descriptor: within a tree that is being removed


def _writes(args: tuple) -> bool:
    return bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if isinstance(args[2], int) else True
