"""A program run as two ranks on the CPU, as torchrun would."""

import contextlib
import os
import signal
import socket
import tempfile
from pathlib import Path

import fresh

START = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def two_ranks(program, *arguments, timeout=300):
    """Run a file of Python in two processes that find each other by gloo. AssertionError where one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    world["PYTHONPATH"] = os.pathsep.join([fresh.ROOT, fresh.HERE])
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ending:
        ranks = []
        for rank in "01":
            said, place = Path(folder, rank), {"RANK": rank, "LOCAL_RANK": rank}
            ranks.append(fresh.begin(START, *map(str, (program, *arguments)), said=said, **world, **place))
            ending.callback(ranks[-1].signal, signal.SIGKILL)
        for one in ranks:
            assert one.wait(timeout) == 0, "\n".join(rank.text()[-3000:] for rank in ranks)
