"""An op's call that repeats an earlier one: its launches with other addresses, and nothing else.

Between an op and its launches lie choices, settings, rooms and descriptors, which take the host longer than many
kernels run. They depend on the *form* of the arguments alone: of tensors the shape, strides, type, device and the
address modulo 16, of the rest the value. The first call of a form runs as the op is written. The second is recorded
(recording.py), and written out as a function of the addresses (written.py), which later calls are.

Nothing is repeated while kernels are looked at or sent elsewhere (hooks of Triton's profiler, `settings.target`), and
settings that change drop what was recorded. A call that does what cannot be done again from other addresses runs as
it is written for ever; `Replay.why` says why.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import settings
from .recording import Recording, current
from .written import MISSING, Unrepeatable, written

TENSORS = (Tensor, nn.Parameter)
VALUES = (type(None), bool, int, float, str, list, tuple, torch.dtype)
ATTEMPTS = 3  # of recording: a prepared form of a weight may have to be made anew just then
MOST = 2048  # forms of an op; more are forgotten together
FORMS: dict[tuple[type, ...], Callable | None] = {}
on_gpu = Tensor.is_cuda.__get__
current_device = getattr(torch._C, "_cuda_getDevice", None)  # a PyTorch without CUDA has none, nor the next
raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def form_of(args: tuple) -> Callable | None:
    """What tells the form of such arguments, (form, addresses of tensors); None where classes of their own are among
    them, or the first is on no GPU."""
    kinds = tuple(map(type, args))
    try:
        found = FORMS[kinds]
    except KeyError:
        found = FORMS[kinds] = _form_of(kinds)
    return found if found is not None and on_gpu(args[0]) else None


def _form_of(kinds: tuple[type, ...]) -> Callable | None:
    if not {*kinds} <= {*TENSORS, *VALUES}:
        return None
    facts, addresses = [], []
    for i, kind in enumerate(kinds):
        if kind in TENSORS:
            strides = f"a{i}.is_contiguous() or a{i}.stride()"
            facts.append(f"a{i}.shape, {strides}, a{i}.dtype, a{i}.get_device(), (p{i} := a{i}.data_ptr()) & 15")
            addresses.append(f"p{i}")
        else:
            facts.append(f"tuple(a{i})" if kind is list else f"a{i}")
    names = ", ".join(f"a{i}" for i in range(len(kinds)))
    return eval(f"lambda {names}: (({', '.join(facts)},), ({', '.join(addresses)},))")  # a loop takes twice as long


class Replay:
    """`function`, of a tensor on a GPU and more."""

    def __init__(self, function: Callable):
        self.function = function
        self.known: dict[tuple, Callable | list[str]] = {}
        settings.REMEMBERED.append(self)

    def __call__(self, *args):
        form = form_of(args)
        return self.function(*args) if form is None else self.repeated(form, args)

    def repeated(self, form: Callable, args: tuple):
        """The call, where form_of(args) is this form."""
        device = args[0].get_device()
        if on_gpu(args[0]) and device != current_device():
            with torch.cuda.device(device):  # of a model spread over GPUs: kernels are launched on the current one
                return self.repeated(form, args)
        key, addresses = form(*args)
        found = self.known.get(key)
        if found.__class__ is list or found is None or settings.TARGET is not None or current() is not None:
            return self._as_written(key, found, args)
        result = found(args, raw_stream(device), *addresses)
        return self.function(*args) if result is MISSING else result

    def _as_written(self, key: tuple, found, args: tuple):
        """The call as it is written, recorded if it is the second one of this form or the last try failed."""
        if found is None:
            if len(self.known) >= MOST:
                self.known.clear()
            self.known[key] = []
            return self.function(*args)
        busy = settings.TARGET is not None or current() is not None
        if busy or found.__class__ is not list or len(found) >= ATTEMPTS:
            return self.function(*args)
        with Recording(args) as now:
            result = self.function(*now.args)
        try:
            self.known[key] = written(now, result, args[0].device)
        except Unrepeatable as error:
            found.append(str(error))
        return result

    def why(self) -> dict[str, int]:
        """How many forms are "repeated", "seen once", or why they are not repeated."""
        said: dict[str, int] = {}
        for found in self.known.values():
            text = "repeated" if found.__class__ is not list else found[-1] if found else "seen once"
            said[text] = said.get(text, 0) + 1
        return said

    def cache_clear(self) -> None:
        """Forget what was recorded; `settings.forget` calls it."""
        self.known.clear()
