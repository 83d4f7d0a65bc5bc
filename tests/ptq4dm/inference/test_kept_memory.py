"""Memory kept between forward passes: pages are not mapped anew while somebody keeps it, and are again after.

In a process of its own: pieces that other tests left free in the heap are used again whatever glibc is told. So is
what this one leaves there, at most 32 MiB: what is asked for last are pieces of which at most one finds place in it.
Without huge pages: where a machine uses them always, one fault maps 512 pages.
"""

import subprocess
import sys

import pytest

from ptq4dm.inference import kept_memory

pytestmark = pytest.mark.skipif(not kept_memory.can_keep(), reason="allocates by another library than glibc")

PROGRAM = """
import ctypes
import resource
import torch
from ptq4dm.inference import kept_memory

def share(mib=8):
    "Pages mapped for 20 tensors of so many MiB, made and dropped four at a time, as a share of all that they have."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        made = [torch.ones(mib << 18) for _ in range(4)]
        del made
    mapped = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return mapped * resource.getpagesize() / (20 * (mib << 20))

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

PR_SET_THP_DISABLE = 41
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
torch.set_num_threads(1)
kept_memory.keep()
kept_memory.keep()
share()
kept = share()
kept_memory.release()
still_kept = share()
before = resident()
kept_memory.release()
print(kept, still_kept, before - resident(), share(31))
"""


def test_pages_stay_until_the_last_has_released_them():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kept, still_kept, given_back, mapped_anew = map(float, done.stdout.split())
    assert kept < 0.1
    assert still_kept < 0.1
    assert given_back > 28  # MiB, of 32
    assert mapped_anew > 0.7
