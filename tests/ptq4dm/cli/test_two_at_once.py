"""Two processes of one command: the second waits for the first, and what both leave is what one leaves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DDPMPipeline

import ptq4dm
from models import unet
from ptq4dm.cli.main import main
from ptq4dm.files.outside import read_tensors

fcntl = pytest.importorskip("fcntl", reason="locks of POSIX")
ROOT = str(Path(ptq4dm.__file__).parents[1])
STUDENT = "--images 8 --batch-size 4 --degradation-steps 2 --path-points 1 --evaluate-every 8 --num-fid 0"
SAMPLES = "--num-samples 8 --batch-size 1 --calibration-steps 2 --num-bins 2"
# command, its lock, what it leaves, what the second is told besides, what makes the settings others
CASES = [
    (f"collect --model m {SAMPLES} --output store", "store/.ptq4dm-run", "store", "", "--seed 1"),
    (f"quantize --model m {SAMPLES} --objective max --output q", ".q.ptq4dm-run", "q", "", "--objective mse"),
    (f"distill --model m {STUDENT} --output s", ".s.ptq4dm-run", "s/unet", "--resume", "--seed 1"),
]

NAMES = ["collect", "quantize", "distill"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def start(tmp_path):
    begun = []

    def call(command, name):
        env = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
        with open(tmp_path / name, "wb") as said:
            begun.append(
                subprocess.Popen(
                    [sys.executable, "-m", "ptq4dm", *command.split()],
                    cwd=tmp_path,
                    env=env,
                    stdout=said,
                    stderr=said,
                )
            )
        return begun[-1]

    yield call
    for process in begun:
        process.kill()
        process.wait()


def until(found, process):
    end = time.monotonic() + 120
    while not found():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.001)


def held(process, lock):
    """Stop a process that has its lock, but not while it looks at locks, which all others wait for."""

    def found():
        if not (lock.exists() and lock.stat().st_size):
            return False
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        place = os.open(lock.parent, os.O_RDONLY)
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            process.send_signal(signal.SIGCONT)
            return False
        finally:
            os.close(place)

    until(found, process)


def tensors(folder):
    return {
        path.relative_to(folder): read_tensors(path, lambda file: file.tensors())
        for path in sorted(folder.rglob("*.safetensors"))
    }


@pytest.mark.parametrize(("command", "lock", "left", "second", "other"), CASES, ids=NAMES)
def test_the_same_wait_and_others_are_refused(tmp_path, monkeypatch, start, command, lock, left, second, other):
    DDPMPipeline(unet(), DDIMScheduler()).save_pretrained(tmp_path / "m")
    one = start(command, "one")
    held(one, tmp_path / lock)
    two, three = start(f"{command} {second}", "two"), start(f"{command} {other}", "three")
    until(lambda: "waiting for another run with the same settings" in (tmp_path / "two").read_text(), two)
    assert three.wait(120) == 2
    said = (tmp_path / "three").read_text()
    assert "another run with other settings is writing into" in said and said.count("\n") == 1
    assert two.poll() is None
    one.send_signal(signal.SIGCONT)
    assert [one.wait(120), two.wait(120)] == [0, 0], (tmp_path / "two").read_text()
    assert not list(tmp_path.rglob(".*"))
    both = tensors(tmp_path / left)
    (tmp_path / left).rename(tmp_path / "both")
    for run in tmp_path.glob("s.run"):
        run.rename(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 0
    AcceleratorState._reset_state()
    alone = tensors(tmp_path / left)
    assert both and both.keys() == alone.keys()
    for name, found in both.items():
        assert all(torch.equal(found[key], alone[name][key]) for key in found.keys() | alone[name].keys())
