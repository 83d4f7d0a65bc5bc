"""Memory kept between forward passes: pages are not mapped anew while somebody keeps it, and are again after.

In a process of its own: pieces that other tests left free in the heap are used again whatever glibc is told. Without
huge pages: where a machine uses them always, one fault maps 512 pages.
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

def share():
    "Pages mapped for 20 tensors of 8 MiB, made and dropped four at a time, as a share of all that they have."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        made = [torch.ones(2 << 20) for _ in range(4)]
        del made
    mapped = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return mapped * resource.getpagesize() / (20 * (8 << 20))

PR_SET_THP_DISABLE = 41
assert ctypes.CDLL(None, use_errno=True).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
torch.set_num_threads(1)
kept_memory.keep()
kept_memory.keep()
share()
kept = share()
kept_memory.release()
still_kept = share()
kept_memory.release()
print(kept, still_kept, share())
"""


def test_pages_stay_until_the_last_has_released_them():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kept, still_kept, given_back = map(float, done.stdout.split())
    assert kept < 0.1
    assert still_kept < 0.1
    assert given_back > 0.9
