"""Wait for the first calls of a network, whoever makes them, then do with them what there is to do.

The calls run as ever, and what they were given is kept on the CPU, as `record` does: the arguments of the network
itself, so that memory grows with `count` alone. When the last of them is over, `finish` gets them, inside of that
call and before it gives its answer; what the caller has switched on or drawn (inference mode, autocast, random
numbers) does not reach it. It happens between calls: where several threads call the network, when none is in a call.

Where `finish` fails, its error comes out of the call, and nothing waits any more; where it is interrupted, the
network waits for that last call anew. Calls that fail do not count.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from ..calibration.calls import Call, Calls, parameter_place
from ..calibration.record import add_call, decodes, kept
from ..calibration.store import source_of
from ..errors import UserError
from ..hooks import AWAITED, input_of, is_unwatched
from ..interrupts import uninterrupted
from ..pipelines.denoiser import turn_at


class Wait:
    """One network that waits for `count` calls: finish(calls) is called with them, once.

    target: whose turn is taken for that: the pipeline, or the network itself. name: of the network, for sentences.
    calls: what was made so far. done: whether `finish` is over; failed: the error that ended it.

    Raises UserError: see `check_awaitable`.
    """

    def __init__(self, target: Any, model: nn.Module, name: str, count: int, finish: Callable[[Wait], None]) -> None:
        check_awaitable(model, name)
        self.target, self.model, self.name, self.count, self._finish = target, model, name, count, finish
        self.calls = Calls(parameter_place(model)[1], source_of(model))
        self.done, self.failed = False, cast(Exception | None, None)
        self._running: dict[int, Call] = {}  # by thread
        self._lock = threading.RLock()
        self._handles: list[Any] = []
        self._arm()

    @property
    def waits(self) -> bool:
        return bool(self._handles)

    def cancel(self) -> None:
        """Wait no more: the network stays as it is."""
        with uninterrupted():
            for handle in self._handles:
                handle.remove()
            self._handles = []
            for name in (AWAITED, "save_pretrained"):
                vars(self.model).pop(name, None)

    def __str__(self) -> str:
        if self.failed is not None:
            return f"{self.name or 'the model'} was not quantized and is in full precision: {self.failed}"
        made = f"{len(self.calls)} of {self.count} made"
        return (
            f"{self.name or 'the model'} waits for calls of its own use ({made}) and is in full precision until then"
        )

    def refuse(self, *_: Any, **__: Any) -> NoReturn:
        """Takes the place of what would take the network for a finished one."""
        raise UserError(f"{self}; call it (the pipeline), or call cancel() of the report.")

    def __deepcopy__(self, memo: dict) -> NoReturn:
        self.refuse()

    __reduce__ = refuse

    def _arm(self) -> None:
        with uninterrupted():
            before = self.model.register_forward_pre_hook(self._before, with_kwargs=True)
            after = self.model.register_forward_hook(self._after, with_kwargs=True, always_call=True)
            self._handles = [before, after]
            vars(self.model)[AWAITED] = self
            if hasattr(self.model, "save_pretrained"):
                vars(self.model)["save_pretrained"] = self.refuse

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            self.refuse()
        with self._lock, torch.inference_mode(False), torch.no_grad():  # while another thread finishes, it waits here
            if self.waits and not is_unwatched():
                self._running[threading.get_ident()] = kept(Call(args, kwargs))

    def _after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], answer: Any) -> None:
        """Also after a call that failed: then there is no answer."""
        with self._lock:
            call = self._running.pop(threading.get_ident(), None)
            if call is not None and answer is not None and self.waits and len(self.calls) < self.count:
                add_call(self.calls, model, call)
            if not (self.waits and self._complete()):
                return
        with turn_at(self.target, self.model), self._lock:  # in this order: who has the turn may wait for the lock
            if self.waits and self._complete():
                self._end()

    def _complete(self) -> bool:
        alive = {thread.ident for thread in threading.enumerate()}
        return len(self.calls) == self.count and not alive & self._running.keys()

    def _end(self) -> None:
        device = parameter_place(self.model)[0]
        drawn = [device] if device.type == "cuda" else []
        try:
            self.cancel()
            with (
                torch.inference_mode(False),
                torch.random.fork_rng(drawn),
                torch.autocast(device.type, enabled=False),
            ):
                self._finish(self)
            self.done = True
        except Exception as error:
            self.failed = error
            raise
        except BaseException:
            with uninterrupted():
                self.calls = self.calls[:-1]
                self._arm()
            raise


def check_awaitable(model: nn.Module, name: str) -> None:
    """Raises UserError for a network that cannot wait for calls: one that is compiled, or an autoencoder."""
    called = f"'{name}'" if name else "the model"
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise UserError(f"{called} is compiled; quantize it first and compile it then.")
    if decodes(model):
        raise UserError(
            f"{called} is an autoencoder, which pipelines call once an image; record its calls with ptq4dm.record."
        )


def rows_of(calls: Calls) -> int:
    """Rows of all calls together."""
    return sum(_rows(part.call()) for part in calls.batches(max(1, len(calls))))


def _rows(call: Call) -> int:
    """Rows of a call: of its first argument, a tensor [B, ...] or a list of B."""
    first = input_of(call.args, call.kwargs)
    if isinstance(first, Tensor):
        return first.shape[0] if first.ndim else 1
    return len(first) if isinstance(first, (list, tuple)) else 1
