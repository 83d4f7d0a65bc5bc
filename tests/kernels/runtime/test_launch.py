"""What a repeated launch of a kernel may share with an earlier one, and that it computes the same."""

import types

import pytest
import torch

launch = pytest.importorskip("ptq4dm.kernels.runtime.launch", reason="needs Triton", exc_type=ImportError)
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from ptq4dm.kernels.runtime import settings, step, workspace  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] * CUDA


@triton.jit
def _sum_kernel(a_ptr, b_ptr, scale, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(a_ptr + i, mask=i < N, other=0.0).to(tl.float32) * scale
    if b_ptr is not None:
        y += tl.load(b_ptr + i, mask=i < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < N)


def tensors(n=40, dtype=torch.float16, offset=0):
    generator = torch.Generator().manual_seed(n)
    a, b = (torch.randn(n + offset, generator=generator).to(DEVICE, dtype)[offset:] for _ in range(2))
    return a, b, torch.empty(n, dtype=torch.float32, device=DEVICE)


def sum_launch(n=40):
    return launch.Launch(_sum_kernel, (triton.cdiv(n, 32),), scale=2.0, N=n, BLOCK=32)


def test_signature():
    a, b, y = tensors()
    key, addresses = launch.signature(0, (a, None, y))
    assert addresses == [a.data_ptr(), None, y.data_ptr()]
    assert launch.signature(0, (b, None, y.clone()))[0] == key
    others = [
        launch.signature(1, (a, None, y)),
        launch.signature(0, (a, b, y)),
        launch.signature(0, (None, a, y)),
        launch.signature(0, (a.bfloat16(), None, y)),
        launch.signature(0, (a[1:], None, y)),
        launch.signature(0, (a, None, y[1:])),
        launch.signature(0, (a.to("meta"), None, y)),
    ]
    keys = [other for other, _ in others]
    if not CUDA:
        assert keys[-1][2] == key[2]  # a meta tensor says -1, as the CPU does; no GPU's tensor does
        keys.pop()
    assert key not in keys and len(set(keys)) == len(keys)


def test_signatures_tell_apart_what_they_are_of():
    """None takes one place in a key and a tensor three: no two lists of tensors meet in one key."""
    a, _, _ = tensors()
    keys = {launch.signature(0, given)[0] for given in [(a, None), (None, a), (a,), (a, a), (None, None), (None,)]}
    assert len(keys) == 6


def test_plans_are_kept_by_content():
    built = []

    @launch.planned
    def plan(config, m, dtype):
        built.append(config)
        return object()

    first = plan(dict(BM=16, TMA=True), 3, torch.int8)
    assert plan(dict(BM=16, TMA=True), 3, torch.int8) is first and built == [dict(BM=16, TMA=True)]
    others = [plan(dict(BM=32, TMA=True), 3, torch.int8), plan(dict(BM=16, TMA=True), 4, torch.int8)]
    assert len({id(p) for p in (first, *others, plan(dict(BM=16, TMA=True), 3, torch.uint8))}) == 4


class Stub:
    """Stands where Triton and the driver are: compiled kernels note what they were launched with."""

    def __init__(self, monkeypatch):
        self.compiled, self.launched, self.calls = [], [], types.SimpleNamespace(calls=[])
        active = types.SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: "stream")
        monkeypatch.setattr(launch, "driver", types.SimpleNamespace(active=active))
        monkeypatch.setattr(launch, "CompiledKernel", types.SimpleNamespace)
        monkeypatch.setattr(launch, "JITFunction", Stub)
        none = types.SimpleNamespace(calls=[])
        runtime = types.SimpleNamespace(launch_enter_hook=self.calls, launch_exit_hook=none)
        monkeypatch.setattr(step, "knobs", types.SimpleNamespace(runtime=runtime))
        self.arg_names = ["a_ptr", "b_ptr", "scale", "y_ptr", "N", "BLOCK"]
        self.backend = "cuda"

    def is_gluon(self):
        return False

    def __getitem__(self, grid):
        def through_triton(**arguments):
            self.compiled.append((grid, arguments))
            target = types.SimpleNamespace(backend=self.backend)
            return types.SimpleNamespace(
                run=lambda *values: self.launched.append(values), function="function", packed_metadata="packed",
                metadata=types.SimpleNamespace(target=target),
            )  # fmt: skip

        return through_triton


def stub_launch(stub, **more):
    return launch.Launch(stub, (2,), scale=2.0, N=40, BLOCK=32, num_warps=4, **more)


def test_later_launches_go_to_the_driver(monkeypatch):
    stub = Stub(monkeypatch)
    kernel = stub_launch(stub)
    a, b, y = tensors()
    kernel(a, None, y)
    assert not stub.launched
    (grid, arguments), = stub.compiled  # fmt: skip
    assert grid == (2, 1, 1) and arguments["a_ptr"] is a and arguments["b_ptr"] is None
    assert {name: arguments[name] for name in ("scale", "N", "BLOCK", "num_warps")} == {
        "scale": 2.0, "N": 40, "BLOCK": 32, "num_warps": 4,
    }  # fmt: skip
    kernel(b, None, y)
    expected = (
        2,
        1,
        1,
        "stream",
        "function",
        "packed",
        None,
        None,
        None,
        b.data_ptr(),
        None,
        2.0,
        y.data_ptr(),
        40,
        32,
    )
    assert stub.launched == [expected] and len(stub.compiled) == 1
    for given in [(a, b, y), (a.float(), None, y), (a[1:], None, y)]:
        before = len(stub.compiled)
        kernel(*given)
        assert len(stub.compiled) == before + 1
        kernel(*given)
        assert len(stub.compiled) == before + 1
    assert len(stub.launched) == 4
    with pytest.raises(ValueError):
        kernel(a, None)


def test_hooks_see_every_launch(monkeypatch):
    stub = Stub(monkeypatch)
    kernel = stub_launch(stub)
    given = tensors()
    kernel(*given)
    stub.calls.calls.append(print)
    kernel(*given)
    assert len(stub.compiled) == 2 and not stub.launched
    stub.calls.calls.clear()
    kernel(*given)
    assert len(stub.compiled) == 2 and len(stub.launched) == 1


def test_other_makers_gpus_are_left_to_triton(monkeypatch):
    stub = Stub(monkeypatch)
    stub.backend = "hip"
    kernel = stub_launch(stub)
    for _ in range(2):
        kernel(*tensors())
    assert len(stub.compiled) == 2 and not stub.launched


def test_descriptors_are_of_the_tensors_at_hand(monkeypatch):
    stub = Stub(monkeypatch)
    kernel = stub_launch(stub, blocks={"b_ptr": (8, 16)})
    a, _, y = tensors()
    first, second = torch.zeros(16, 32), torch.ones(24, 32)
    kernel(a, first, y)
    assert stub.compiled[0][1]["b_ptr"].base is first
    kernel(a, second, y)
    descriptor = stub.launched[0][10]
    assert type(descriptor) is type(stub.compiled[0][1]["b_ptr"]) and descriptor.base is second
    right = triton.tools.tensor_descriptor.TensorDescriptor.from_tensor(second, [8, 16])
    assert {**vars(descriptor), "base": None} == {**vars(right), "base": None}
    assert all(fields["base"] is None for *_, known in kernel.known.values() for _, _, fields in known)


def test_a_target_gets_the_launches():
    """Nothing runs; afterwards all is as before, also where something fails in between."""
    given, device = [], torch.device(DEVICE)
    before = settings.capability(device), settings.multiprocessors(device)
    gpu = settings.Target((9, 0), 132, lambda kernel, arguments: given.append((kernel, arguments)))
    meta = torch.empty(40, device="meta")
    with pytest.raises(ZeroDivisionError), settings.target(gpu):
        assert settings.capability(device) == (9, 0) and settings.multiprocessors(meta.device) == 132
        sum_launch()(meta, None, meta)
        raise ZeroDivisionError
    ((kernel, arguments),) = given
    assert kernel is _sum_kernel
    assert arguments == dict(a_ptr=meta, b_ptr=None, y_ptr=meta, scale=2.0, N=40, BLOCK=32)
    assert (settings.capability(device), settings.multiprocessors(device)) == before
    a, _, y = tensors()
    sum_launch()(a, None, y)
    assert torch.equal(y, 2 * a.float()) and len(given) == 1


def test_pieces_are_tensors_of_one_buffer():
    sizes = ((3, 5), torch.int8), ((3,), torch.float32), ((3, 0), torch.float16), ((2, 7), torch.bfloat16)
    room = workspace.Workspace(*sizes)
    like = torch.empty(1, device=DEVICE)
    pieces = room.take(like)
    tensors = [piece.tensor() for piece in pieces]
    for i, (piece, tensor) in enumerate(zip(pieces, tensors, strict=True)):
        assert (piece.shape, piece.dtype, piece.stride()) == (tuple(tensor.shape), tensor.dtype, tensor.stride())
        assert tensor.numel() == 0 or piece.data_ptr() == tensor.data_ptr()
        assert piece.data_ptr() % 16 == 0 and tensor.is_contiguous() and tensor.device == like.device
        tensor.fill_(i)
    assert all((tensor == i).all() for i, tensor in enumerate(tensors))  # none lies over another
    flat = pieces[0].flatten()
    assert torch.equal(flat.tensor(), tensors[0].flatten()) and flat.stride() == (1,)


def test_a_piece_and_a_tensor_have_kernels_of_their_own(monkeypatch):
    stub = Stub(monkeypatch)
    kernel = stub_launch(stub, blocks={"b_ptr": (8, 16)})
    a, _, y = tensors()
    room = workspace.Workspace(((16, 32), torch.float32))
    for _ in range(2):
        (piece,) = room.take(a)
        kernel(a, piece, y)
    assert isinstance(stub.compiled[0][1]["b_ptr"].base, torch.Tensor) and len(stub.compiled) == 1
    descriptor = stub.launched[0][10]
    assert descriptor.base.data_ptr() == piece.data_ptr()
    assert (tuple(descriptor.shape), tuple(descriptor.strides)) == ((16, 32), (32, 1))
    kernel(a, piece.tensor(), y)
    assert len(stub.compiled) == 2


def test_repeated_launches_compute_the_same():
    """The second of each goes to the driver at once, on a GPU."""
    kernel, known = sum_launch(), 0
    for dtype in (torch.float16, torch.float32):
        for offset in (0, 1):  # begins at a multiple of 16 bytes, or not
            for with_b in (True, False):
                a, b, y = tensors(dtype=dtype, offset=offset)
                right = 2 * a.float() + (b.float() if with_b else 0)
                for _ in range(2):
                    y.fill_(float("nan"))
                    kernel(a, b if with_b else None, y)
                    assert torch.equal(y, right)
                known += 1
                assert len(kernel.known) == (known if CUDA else 0)
    for n in (33, 64):
        a, _, y = tensors(n)
        sum_launch(n)(a, None, y)
        assert torch.equal(y, 2 * a.float())


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_tensor_in_other_memory_is_refused():
    kernel = sum_launch()
    a, b, y = tensors()
    kernel(a, b, y)
    kernel(a, b, y)
    with pytest.raises(ValueError, match="cannot be accessed"):
        kernel(a.cpu(), b, y)
