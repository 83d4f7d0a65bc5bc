"""Two processes of one command: the second waits for the first, and what both leave is what one leaves."""

import os
import signal
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DDPMPipeline

import fresh
from models import unet
from ptq4dm.cli.main import main
from ptq4dm.files.outside import read_tensors

fcntl = pytest.importorskip("fcntl", reason="locks of POSIX")
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
        begun.append(fresh.begin(fresh.COMMAND, *command.split(), said=tmp_path / name, folder=tmp_path))
        return begun[-1]

    yield call
    for process in begun:
        process.signal(signal.SIGKILL)
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
        process.signal(signal.SIGSTOP)
        process.until_stopped()
        place = os.open(lock.parent, os.O_RDONLY)
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            process.signal(signal.SIGCONT)
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
    until(lambda: two.said.exists() and "waiting for another run with the same settings" in two.text(), two)
    assert three.wait() == 2
    said = three.text()
    assert "another run with other settings is writing into" in said and said.count("\n") == 1
    assert two.poll() is None
    one.signal(signal.SIGCONT)
    assert [one.wait(), two.wait()] == [0, 0], two.text()
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
