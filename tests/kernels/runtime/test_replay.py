"""Calls that are repeated from a recording: what they compute, and when they are not repeated.

Where there is no GPU, a "kernel" is a function of addresses that reads and writes the CPU's memory.
"""

import contextlib
import gc
import threading
import types
import weakref

import pytest
import torch

pytest.importorskip("ptq4dm.kernels.runtime.launch", reason="needs Triton", exc_type=ImportError)
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from ptq4dm.kernels.runtime import replay, settings, step  # noqa: E402
from ptq4dm.kernels.runtime.prepared import CACHE, prepared  # noqa: E402
from tests.support.repeated import Op, expected, rand, why  # noqa: E402


def test_the_third_call_of_a_form_is_repeated_on_other_tensors(kernel):
    op, given = Op(kernel, 8), rand(seed=9)
    results = []
    for seed in range(6):
        x, more = rand(seed=seed), rand(seed=seed + 20)
        y = op.repeated(x, given, more)
        results.append((y, expected(x, given, more)))
        assert op.calls == min(seed + 1, 2)
    assert all(torch.allclose(y, e) and y.shape == (8,) for y, e in results)  # the first are not written over
    assert why(op) == {"repeated": 1} and kernel.driven >= 8


@pytest.mark.parametrize("again", [False, True])
def test_tensors_that_are_given_twice_are_followed_apart(kernel, again):
    """Recorded with x in both places, and repeated with two; and the other way round."""
    op, given, x, other = Op(kernel, 8), rand(seed=9), rand(seed=1), rand(seed=2)
    for first, second in [(x, x if again else other)] * 3 + [(x, other if again else x), (other, x)]:
        assert torch.allclose(op.repeated(first, given, second), expected(first, given, second))
    assert why(op) == {"repeated": 1} and op.calls == 2


def test_forms_are_apart(kernel):
    op, given = Op(kernel, 8), rand(seed=9)
    kinds = [
        (rand(), given, None),
        (rand(), given, rand(seed=3)),
        (rand(offset=1), given, None),  # begins amid 16 bytes
        (rand(16)[::2], given, None),
        (rand(), given, None, "name"),
    ]
    for args in kinds * 3:
        op.repeated(*args)
    assert len(op.repeated.known) == len(kinds) and op.calls == 2 * len(kinds)


def test_what_is_prepared_is_of_the_tensor_at_hand_and_of_today(kernel):
    op, x = Op(kernel, 8), rand()
    one, two = rand(seed=4), rand(seed=5)
    for given in (one, one, one, two, two, one):
        assert torch.allclose(op.repeated(x, given, None), expected(x, given, None))
    assert op.calls == 3  # once more for `two`, of which nothing was prepared
    two.mul_(2)
    assert torch.allclose(op.repeated(x, two, None), expected(x, two, None)) and op.calls == 4
    one.data = rand(seed=6)
    assert torch.allclose(op.repeated(x, one, None), expected(x, one, None)) and op.calls == 5
    assert torch.allclose(op.repeated(x, one, None), expected(x, one, None)) and op.calls == 5


def test_what_is_a_view_of_a_weight_is_not_kept(kernel):
    """Kept beside its weight, it would live for ever, and hold the weight's memory."""
    op, held = Op(kernel, 8), weakref.WeakSet()

    def written(x, given):
        y = x.new_empty(8)
        op.second(prepared(given, "as it is", lambda: given.view(2, 4).reshape(8)), x, y)
        return y

    repeated, given = replay.Replay(written), rand(16, seed=9)[8:]
    for seed in range(4):
        assert torch.allclose(repeated(rand(seed=seed), given), 3 * given + rand(seed=seed))
    assert repeated.why() == {"repeated": 1} and CACHE[id(given)][1] == {}
    held.add(given)
    del given
    gc.collect()
    assert not held


def test_several_results_of_other_strides(kernel):
    op, given = Op(kernel, 8), rand(seed=9)

    def extra(x, y):
        other = x.new_empty(4, 2).t()
        op.second(x, None, other)
        return other, y, x.new_empty(3, 0)  # as a branch of rank 0

    op.extra = extra
    for seed in range(4):
        x = rand(seed=seed)
        other, y, nothing = op.repeated(x, given, None)
        assert nothing.shape == (3, 0) and nothing.dtype == x.dtype
        assert other.shape == (2, 4) and other.stride() == (1, 2)
        assert torch.allclose(other, 3 * x.view(4, 2).t()) and torch.allclose(y, expected(x, given, None))
    assert op.calls == 2


def test_settings_that_change_are_read_again(kernel):
    op, given = Op(kernel, 8), rand(seed=9)
    for _ in range(3):
        op.repeated(rand(), given, None)
    settings.forget()
    assert why(op) == {}
    op.repeated(rand(), given, None)
    assert op.calls == 3


def test_profilers_and_targets_see_what_is_written(kernel, monkeypatch):
    op, given, x = Op(kernel, 8), rand(seed=9), rand()
    for _ in range(3):
        op.repeated(x, given, None)
    hooks = types.SimpleNamespace(calls=[print])
    runtime = types.SimpleNamespace(launch_enter_hook=hooks, launch_exit_hook=types.SimpleNamespace(calls=[]))
    with monkeypatch.context() as watching:
        watching.setattr(step, "knobs", types.SimpleNamespace(runtime=runtime))
        before = kernel.compiled
        assert torch.allclose(op.repeated(x, given, None), expected(x, given, None))
        assert op.calls == 3 and kernel.compiled == before + 2
    op.repeated(x, given, None)
    assert op.calls == 3
    seen = []
    with settings.target(settings.Target((9, 0), 132, lambda *given: seen.append(given))):
        for _ in range(3):
            op.repeated(x, given, None)
    assert len(seen) == 6 and why(op) == {}


def test_forms_do_not_pile_up(kernel, monkeypatch):
    monkeypatch.setattr(replay, "MOST", 3)
    op = Op(kernel, 8)
    for i in range(10):
        op.repeated(rand(), rand(seed=9), None, str(i))
        assert len(op.repeated.known) <= 3


def test_a_tensor_of_a_class_of_its_own_is_not_kept(kernel):
    class Own(torch.Tensor):
        pass

    op, own = Op(kernel, 8), rand(seed=9).as_subclass(Own)
    for _ in range(3):
        op.repeated(rand(), own, None)
    assert op.calls == 3 and not op.repeated.known


def test_an_error_in_a_recorded_call_ends_the_recording(kernel):
    op, given = Op(kernel, 8), rand(seed=9)
    op.repeated(rand(), given, None)
    op.extra = lambda x, y: 1 / 0
    with contextlib.suppress(ZeroDivisionError):
        op.repeated(rand(), given, None)
    op.extra = lambda x, y: y
    for _ in range(2):
        assert torch.allclose(op.repeated(rand(), given, None), expected(rand(), given, None))
    assert why(op) == {"repeated": 1} and torch.ones(2).add(1).sum() == 4


def test_descriptors_are_of_the_memory_at_hand(kernel):
    op, given = Op(kernel, 8, blocks={"a_ptr": (8,)}), rand(seed=9)
    held = [rand(seed=seed) for seed in range(5)]
    for x in [*held, *held]:
        assert torch.allclose(op.repeated(x, given, None), expected(x, given, None))
    assert op.calls == 2
    (repeated,) = op.repeated.known.values()
    (make,) = (one for one in repeated.__globals__.values() if getattr(one, "__name__", "") == "make")
    assert {x.data_ptr() for x in held[2:]} <= make.__self__.kept.keys()
    one = make(held[0].data_ptr())
    assert one is make.__self__.kept[held[0].data_ptr()]
    right = TensorDescriptor.from_tensor(held[0], [8])
    assert type(one) is TensorDescriptor
    assert [list(getattr(one, name)) for name in ("shape", "strides", "block_shape")] == [
        list(getattr(right, name)) for name in ("shape", "strides", "block_shape")
    ]


def test_threads(kernel):
    """What one records is not disturbed by what others launch meanwhile."""
    op, given, wrong = Op(kernel, 64), rand(64, seed=9), []

    def work(seed):
        for i in range(40):
            x = rand(64, seed=100 * seed + i)
            if not torch.allclose(op.repeated(x, given, None), expected(x, given, None)):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and why(op) == {"repeated": 1}
