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

triton = pytest.importorskip("triton", reason="needs Triton")
from triton import knobs  # noqa: E402
from triton.backends.nvidia import driver  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from ptq4dm.kernels.runtime import launch, step  # noqa: E402


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
    assert not launch.hooked()


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


def test_triton_s_launcher_in_c_is_called_as_triton_calls_it():
    """step.in_c: of 3.6 the function behind `run`, whose arguments are these; of other versions none."""
    described = {"swizzle": 0, "elem_size": 2, "elem_type": 6, "block_size": [16, 64], "fp4_padded": False}
    run = object.__new__(driver.CudaLauncher)
    run.global_scratch_size = run.profile_scratch_size = 0
    if "kernel_signature" in inspect.getsource(driver.CudaLauncher.__init__):
        run.kernel_signature = None
        assert step.in_c(run) is None
        return
    run.launch = driver.wrap_handle_tensordesc(print, {0: "*fp16", 1: "tensordesc<fp16[16, 64]>"}, [described])
    assert step.in_c(run) == (print, {1: described})
    run.launch = driver.wrap_handle_tensordesc(print, {0: "*fp16"}, None)
    assert step.in_c(run) == (print, {})
    run.global_scratch_size = 4
    assert step.in_c(run) is None
    assert step.in_c(lambda *values: None) is None
    tree = ast.parse(textwrap.dedent(inspect.getsource(driver.CudaLauncher.__call__)))
    (call,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.launch"
    )
    assert [ast.unparse(argument) for argument in call.args] == [
        "gridX", "gridY", "gridZ", "stream", "function", "self.launch_cooperative_grid", "self.launch_pdl",
        "global_scratch", "profile_scratch", "*args",
    ]  # fmt: skip
    assert "return [cu_tensor_map, *shape, *strides]" in inspect.getsource(driver.make_tensordesc_arg)


def test_pytorch_says_whether_somebody_looks():
    """ops.observed and recording.Recording ask these; written.py takes memory as torch.compile's code does."""
    assert callable(torch._C._dynamo.guards._empty_strided_cuda)
    assert torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0
    assert torch._C._functorch.maybe_current_level() is None is torch._C._get_tracing_state()
    assert torch._C._autograd._profiler_enabled() is False
    assert torch.ops.aten.view.default.is_view and torch.ops.aten.view.dtype.is_view
    assert not torch.ops.aten.new_empty.default.is_view and not torch.ops.aten.add_.Tensor.is_view
    assert callable(torch._C._AutoDispatchBelowAutograd) and callable(torch.library.fallthrough_kernel)
