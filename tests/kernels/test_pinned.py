"""Inner parts of Triton and PyTorch that launch.py and ops.py rely on, as they are in the versions installed here.

Where one of these fails after an upgrade, read the file it names before the kernels run on a GPU: there nothing else
checks what goes to the driver.
"""

import ast
import dataclasses
import inspect
import textwrap

import pytest
import torch

from ptq4dm.kernels.runtime import ops

triton = pytest.importorskip("triton", reason="needs Triton")
from triton import knobs  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from ptq4dm.kernels.runtime import launch  # noqa: E402


def test_a_compiled_kernel_is_run_as_triton_itself_does():
    """Launch.__call__: grid, stream, function, metadata, three that only hooks need, then every argument."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(JITFunction.run)))
    (call,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "kernel.run"
    )
    *given, rest = (ast.unparse(argument) for argument in call.args)
    assert given[:6] == ["grid_0", "grid_1", "grid_2", "stream", "kernel.function", "kernel.packed_metadata"]
    assert given[6] == "launch_metadata" and [name.rpartition(".")[2] for name in given[7:]] == [
        "launch_enter_hook", "launch_exit_hook",
    ]  # fmt: skip
    assert rest == "*bound_args.values()" and not call.keywords
    assert isinstance(vars(CompiledKernel)["run"], property)
    assert {"function", "packed_metadata", "metadata"} <= set(CompiledKernel.__init__.__code__.co_names)


def test_hooks_are_lists():
    assert knobs.runtime.launch_enter_hook.calls == knobs.runtime.launch_exit_hook.calls == []
    assert not launch._hooked()


def descriptors():
    def gluon(tensor):
        return pytest.importorskip("ptq4dm.kernels.runtime.hopper", exc_type=ImportError).blocks(tensor, 16, 64)

    return [lambda tensor: TensorDescriptor.from_tensor(tensor, [16, 64]), gluon]


@pytest.mark.parametrize("make", descriptors(), ids=["triton", "gluon"])
def test_a_descriptor_is_its_tensor_and_what_all_of_its_kind_share(make):
    """Launch.__call__ makes one without its __init__: no slots, nothing made of the tensor but shape and strides."""
    first, second = make(torch.zeros(32, 128, dtype=torch.float16)), make(torch.ones(48, 256, dtype=torch.float16))
    fields = {field.name for field in dataclasses.fields(first)}
    assert fields == set(vars(first)) >= {"base", "shape", "strides"}
    open_ = {"base", "shape", "strides"}
    assert all(getattr(first, name) == getattr(second, name) for name in fields - open_)
    again = object.__new__(type(first))
    shape, strides = second.base.shape, second.base.stride()
    again.__dict__.update({**vars(first), "base": None}, base=second.base, shape=shape, strides=strides)
    assert all(list(getattr(again, name)) == list(getattr(second, name)) for name in ("shape", "strides"))
    assert again.base is second.base


def test_triton_specializes_on_what_a_signature_holds():
    """launch.signature: two tensors of one key are one to Triton, whatever their sizes; None is apart."""
    native = pytest.importorskip("triton._C.libtriton", reason="no such part").native_specialize_impl
    backend = pytest.importorskip("triton.backends.nvidia.compiler").CUDABackend
    rooms = [torch.zeros(size, dtype=dtype) for size in ((64,), (40, 3)) for dtype in (torch.float16, torch.int8)]
    found = {}
    for room in rooms:
        for begin in (0, 1, 8, 16):
            tensor = room.flatten()[begin:]
            key, _ = launch.signature(0, (tensor,))
            found.setdefault(key, set()).add(native(backend, tensor, False, True, True))
    assert len(found) == 4 and all(len(kinds) == 1 for kinds in found.values())
    assert len(set.union(*found.values())) == 4
    assert native(backend, None, False, True, True) == ("constexpr", None)


def test_below_autograd_there_is_no_autograd():
    """ops.op: what the autograd kernel hands on to has the devices' keys, and none that would come back to it."""
    below, key = torch._C._after_autograd_keyset, torch._C.DispatchKey
    assert all(below.has(k) for k in (key.CPU, key.CUDA, key.Meta, key.Python, key.Functionalize))
    assert not any(below.has(k) for k in (key.AutogradCPU, key.AutogradCUDA, key.AutogradMeta, key.AutogradOther))
    assert callable(torch._C._AutoDispatchBelowAutograd)
    parameters = inspect.signature(ops.LIBRARY.impl).parameters
    assert "with_keyset" in parameters and hasattr(torch._ops.OpOverload, "redispatch")
