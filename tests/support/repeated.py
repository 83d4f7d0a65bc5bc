"""A stand-in for a GPU's kernel and an op that launches it twice, so that recorded calls run on any machine.

A "kernel" is a function of addresses that reads and writes the CPU's memory. Needs Triton, as the launcher does.
"""

import ctypes
import types

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ptq4dm.kernels.runtime import launch, replay
from ptq4dm.kernels.runtime.prepared import prepared
from ptq4dm.kernels.runtime.workspace import Workspace


def floats(address: int, count: int) -> Tensor:
    """The memory there, float32, or what a descriptor of it stands for."""
    at = address if isinstance(address, int) else address.base.data_ptr()
    return torch.frombuffer((ctypes.c_float * count).from_address(at), dtype=torch.float32)


class Kernel:
    """y = a * factor + b, each float32 [count], on the CPU's memory; b may be None."""

    arg_names = ("a_ptr", "b_ptr", "factor", "y_ptr", "count")

    def __init__(self):
        self.compiled, self.driven = 0, 0

    def is_gluon(self):
        return False

    def compute(self, a, b, factor, y, count):
        with _disable_current_modes():  # a GPU's kernel is no operation of torch
            a, b = (None if one is None else floats(one, count) for one in (a, b))
            floats(y, count).copy_(a * factor + (0 if b is None else b))

    def __getitem__(self, grid):
        def through_triton(a_ptr, b_ptr, factor, y_ptr, count):
            self.compiled += 1
            given = (None if one is None else getattr(one, "base", one).data_ptr() for one in (a_ptr, b_ptr, y_ptr))
            a, b, y = given
            self.compute(a, b, factor, y, count)
            target = types.SimpleNamespace(backend="cuda")
            return types.SimpleNamespace(
                run=self.run, function="f", packed_metadata="p", metadata=types.SimpleNamespace(target=target)
            )

        return through_triton

    def run(self, *values):
        assert values[:3] == (1, 1, 1) and values[3] == "stream"
        self.driven += 1
        self.compute(*values[9:])


def stand_in(monkeypatch) -> Kernel:
    """A kernel; what stands between a call and a GPU is replaced until the test ends."""
    active = types.SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: "stream")
    monkeypatch.setattr(launch, "driver", types.SimpleNamespace(active=active))
    monkeypatch.setattr(launch, "CompiledKernel", types.SimpleNamespace)
    monkeypatch.setattr(launch, "JITFunction", Kernel)
    monkeypatch.setattr(replay, "on_gpu", lambda x: x.device.type == "cpu")
    monkeypatch.setattr(replay, "raw_stream", lambda device: "stream")
    monkeypatch.setattr(replay, "current_device", lambda: -1)
    return Kernel()


class Op:
    """x [n] -> 3 (2 x + room) + more, where room = x * slope + offset; `slope` is prepared: 1 / given."""

    def __init__(self, kernel: Kernel, n: int, blocks=None, **replaced):
        self.calls, self.n = 0, n
        self.first = launch.Launch(kernel, (1,), blocks, factor=2.0, count=n)
        self.second = launch.Launch(kernel, (1,), factor=3.0, count=n)
        self.extra = replaced.get("extra", lambda x, y: y)
        self.repeated = replay.Replay(self.written)

    def written(self, x: Tensor, given: Tensor, more: Tensor | None, name: str = "") -> Tensor:
        self.calls += 1
        inverse = prepared(given, "inverse", lambda: 1.0 / given)
        (room,) = Workspace(((self.n,), torch.float32)).take(x)
        y = x.new_empty(1, self.n)
        self.first(x, inverse, room)
        self.second(room, more, y)
        return self.extra(x, y.view(self.n))


def expected(x, given, more):
    return 3 * (2 * x + 1.0 / given) + (0 if more is None else more)


def rand(n=8, seed=0, offset=0):
    return (torch.rand(n + offset, generator=torch.Generator().manual_seed(seed)) + 0.5)[offset:]


def why(op):
    return op.repeated.why()
