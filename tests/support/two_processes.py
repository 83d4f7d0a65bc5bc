"""A program run as two ranks on the CPU, as torchrun would; the libraries are imported once, for both."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import ptq4dm

# The process parts in two after its imports, which take longer than what tests do, and before torch has threads.
START = """
import os, runpy, sys
import accelerate, torch._dynamo, ptq4dm.evaluation.evaluate, ptq4dm.samplers.distillation.disback
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
other = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if other else "1"
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
if other:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
"""


def two_ranks(program, *arguments, timeout=300):
    """Run a file of Python in two processes that find each other by gloo. AssertionError where one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    paths = [Path(ptq4dm.__file__).parents[1], Path(__file__).parent]
    world["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command = [sys.executable, "-c", START, *map(str, (program, *arguments))]
    both = subprocess.Popen(
        command, env=os.environ | world, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, said = both.communicate(timeout=timeout)
        assert both.returncode == 0, said[-3000:]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(both.pid, signal.SIGKILL)
