"""Memory kept between forward passes: pages are not mapped anew while somebody keeps it, and are again after."""

import resource

import pytest
import torch

from ptq4dm.inference import kept_memory

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not kept_memory.can_keep(), reason="allocates by another library than glibc"),
]


def faults():
    """Pages that were mapped for some tensors of 8 MiB, made and dropped again."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        made = [torch.ones(2 << 20) for _ in range(4)]
        del made
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_pages_stay_until_the_last_has_released_them(monkeypatch):
    monkeypatch.setattr(kept_memory, "_users", 0)  # models of other tests may be optimized still
    pages = 5 * 4 * (8 << 20) // resource.getpagesize()
    kept_memory.keep()
    kept_memory.keep()
    try:
        faults()
        assert faults() < 0.1 * pages
        kept_memory.release()
        assert faults() < 0.1 * pages
    finally:
        kept_memory.release()
    assert faults() > 0.3 * pages
