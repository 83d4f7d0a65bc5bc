"""A training step as one CUDA graph: the host, which takes longer than the device else, has no part in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.runtime.capture import captured
from .networks import Networks
from .task import Batch

WARM = 3  # steps before the capture: what chooses its kernels at a first call has chosen


class GraphedStep:
    """Loss, gradients, AdamW and the average, captured once, replayed on other data: step(number, batch) -> loss [].

    loss_of: a function of a batch on the device -> scalar, without a wait for the device. Capturing changes neither
    weights nor the optimizer's state. Randomness follows torch's generator of the device at each replay.

    Raises UserError where what the model does cannot be captured.
    """

    def __init__(self, networks: Networks, loss_of: Callable[[Batch], Tensor], batch: Batch) -> None:
        self.networks, self.loss_of = networks, loss_of
        self.batch = batch.copy()
        device = batch.t.device
        self.rate, self.keep = torch.zeros((), device=device), torch.ones((), device=device)
        for group in networks.optimizer.param_groups:
            group["lr"], group["capturable"] = self.rate, True
        before = {k: {n: v.clone() for n, v in one.items()} for k, one in networks.optimizer.state.items()}
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # at a rate of zero: nothing moves but the optimizer's state
            for _ in range(WARM):
                self._once()
        torch.cuda.current_stream(device).wait_stream(stream)
        try:
            with captured(device=device) as self.graph:
                self.loss = self._once()
        except RuntimeError as error:
            raise UserError(
                f"a step of {type(networks.net).__name__} cannot be one CUDA graph "
                f"({str(error).splitlines()[0]}); leave graph out."
            ) from error
        for parameter, state in networks.optimizer.state.items():
            for name, value in state.items():
                old = before.get(parameter, {}).get(name)
                value.zero_() if old is None else value.copy_(old)

    def __call__(self, step: int, batch: Batch) -> Tensor:
        for mine, given in zip(vars(self.batch).values(), vars(batch).values(), strict=True):
            if mine is not None:
                mine.copy_(given)
        self.rate.fill_(self.networks.rate(step))
        self.keep.fill_(self.networks.keep(step))
        self.graph.replay()
        return self.loss

    def _once(self) -> Tensor:
        loss = self.loss_of(self.batch)
        self.networks.backward(loss)
        self.networks.optimizer.step()
        self.networks.optimizer.zero_grad(set_to_none=True)
        mine, other = (list(net.parameters()) for net in (self.networks.average, self.networks.net))
        with torch.no_grad():
            change = torch._foreach_sub(other, mine)
            torch._foreach_mul_(change, 1 - self.keep)
            torch._foreach_add_(mine, change)
        return loss.detach()
