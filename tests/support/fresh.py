"""New processes of Python that need not import the libraries: one does, for each worker of pytest, and parts.

They have imported nothing of ptq4dm, and nothing of diffusers where it is to be without. What depends on who imports
PyTorch first needs its own process.
A program that ends well, or by SystemExit, ends there, once its threads have: to free all modules takes seconds.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ptq4dm

ROOT = str(Path(ptq4dm.__file__).parents[1])
HERE = str(Path(__file__).parent)
SERVER = """
import atexit, gc, json, os, sys, threading
import accelerate, torch._dynamo
try:
    import peft, transformers.modeling_utils
except ModuleNotFoundError:
    pass
assert "diffusers" not in sys.modules
if sys.argv[2] == "diffusers":
    import torchmetrics, diffusers.quantizers, diffusers.models.unets, diffusers.models.transformers
    import diffusers.models.autoencoders, diffusers.pipelines.pipeline_utils
    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
assert not [name for name in sys.modules if name.partition(".")[0] == "ptq4dm"]
paths, cache = sys.path[1:], sys.argv[1]
gc.collect()
gc.freeze()
for line in sys.stdin:
    asked = json.loads(line)
    if "pid" in asked:
        pid, status = os.waitpid(asked["pid"], asked["how"])
        answer = [bool(pid), os.WIFSTOPPED(status), 0 if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)]
    else:
        answer = os.fork()
        if not answer:
            break
    print(json.dumps(answer), flush=True)
else:
    sys.exit()
os.setsid()
os.chdir(asked["folder"])
os.environ.clear()
os.environ.update(asked["environment"])
said = os.open(asked["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
for number, place in enumerate((os.open(os.devnull, os.O_RDONLY), said, said)):
    os.dup2(place, number)
sys.path[:] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *paths]
sys.argv = ["-c", *asked["words"]]
if sys.dont_write_bytecode and "diffusers" in sys.modules:
    sys.dont_write_bytecode, sys.pycache_prefix = False, cache
status = 0
try:
    exec(compile(asked["code"], "<string>", "exec"), {"__name__": "__main__"})
except BaseException as end:
    status = (end.code or 0) if isinstance(end, SystemExit) else None
    if not isinstance(status, int):
        gc.unfreeze()
        raise
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
"""
COMMAND = "import runpy, sys; runpy.run_module('ptq4dm', run_name='__main__', alter_sys=True)"


@dataclass
class Process:
    """A process that was begun; its session is its own. said: the file of what it prints."""

    pid: int
    said: Path
    server: subprocess.Popen

    def _ended(self, how: int) -> list:
        if not hasattr(self, "status"):
            gone, stopped, status = _ask(self.server, pid=self.pid, how=how)
            if stopped or not gone:
                return [stopped, None]
            self.status = status
        return [False, self.status]

    def poll(self) -> int | None:
        """Exit status, or None while it runs; negative where a signal ended it."""
        return self._ended(os.WNOHANG)[1]

    def wait(self, seconds: float = 120) -> int:
        end = time.monotonic() + seconds
        while (status := self.poll()) is None:
            assert time.monotonic() < end, self.text()
            time.sleep(0.002)
        return status

    def signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def until_stopped(self) -> None:
        """Wait until a signal has stopped it."""
        assert self._ended(os.WUNTRACED)[0], self.text()

    def text(self) -> str:
        return self.said.read_text()


def begin(
    code: str, *words: str, said: Path, folder: Path | str = ROOT, base: str = "diffusers", **environment: str
) -> Process:
    """Run code as `python -c` does, with words as its arguments, in a folder, with ptq4dm of this checkout.

    base: "diffusers", which is imported then, or "" for a process that has imported other libraries alone.
    """
    environment = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"} | environment
    asked = {"code": code, "words": list(words), "said": str(said), "folder": str(folder)}
    server = _server(base)
    return Process(_ask(server, **asked, environment=environment), said, server)


def printed(code: str, *words: str, said: Path, **more: Any) -> str:
    """What a process printed that ended well."""
    process = begin(code, *words, said=said, **more)
    assert process.wait() == 0, process.text()[-3000:]
    return process.text()


def _ask(server: subprocess.Popen, **asked: object) -> Any:
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


@functools.cache
def _server(base: str) -> subprocess.Popen:
    """Ends with pytest's process, which holds its input."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    compiled = tempfile.mkdtemp()  # what Python compiles, where it may not write it beside the code
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    return subprocess.Popen(
        [sys.executable, "-c", SERVER, compiled, base], env=environment | {"OMP_NUM_THREADS": "1"}, cwd="/",
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
