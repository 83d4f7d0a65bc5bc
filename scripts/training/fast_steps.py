"""Training steps without a wait for the host: data on the device, compiled, in one CUDA graph if asked for."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from reference_output import autocast
from torch import Tensor, nn

EMA_DECAY = 0.999
CLIP = 1.0


@dataclass
class Recipe:
    """steps: in all; peak: the learning rate after the warm-up; the rate falls to zero over the last 70 %."""

    steps: int
    batch_size: int
    peak: float
    weight_decay: float

    def rate(self, step: int) -> float:
        done = step / self.steps
        fall = 0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0.0, done - 0.3) / 0.7))
        return self.peak * min(1.0, (step + 1) / max(1, min(1000, self.steps // 10))) * fall


class Trainer:
    """A network and the moving average of its weights, trained step by step.

    loss_of: a function of (network, images, labels) -> scalar; images [N, 3, H, W] float32 and labels [N] lie on the
    device. compiled: whether torch.compile makes the forward and backward pass. graph: whether a whole step, the
    optimizer's too, is one CUDA graph.
    """

    def __init__(
        self,
        net: nn.Module,
        recipe: Recipe,
        images: Tensor,
        labels: Tensor,
        loss_of: Callable,
        compiled: bool,
        graph: bool,
    ) -> None:
        self.net, self.recipe, self.images, self.labels, self.loss_of = net, recipe, images, labels, loss_of
        self.device = images.device
        self.average = copy.deepcopy(net).requires_grad_(False)
        gpu = self.device.type == "cuda"
        self.rate = torch.zeros((), device=self.device)
        self.keep = torch.zeros((), device=self.device)
        self.optimizer = self.new_optimizer(self.rate if gpu else 0.0)
        self.call = torch.compile(net) if compiled else net
        self.total = torch.zeros((), device=self.device)
        self.step, self.graph = 0, None
        if graph:
            self.graph = self._captured()

    def new_optimizer(self, rate: Tensor | float = 0.0) -> torch.optim.Optimizer:
        """One for the network's weights that has seen no step."""
        return torch.optim.AdamW(
            self.net.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=self.recipe.weight_decay, fused=True,
            capturable=self.device.type == "cuda",
        )  # fmt: skip

    def take(self, other: torch.optim.Optimizer) -> None:
        """Go on from the moments of another optimizer of these weights.

        In place where there are some: a CUDA graph has their addresses. The rate stays the tensor that is filled at
        each step, of which an optimizer that loads a state makes a copy.
        """
        for parameter, found in other.state.items():
            mine = self.optimizer.state[parameter]
            for name, value in found.items():
                if name in mine:
                    mine[name].copy_(value)
                else:
                    mine[name] = value.clone()

    def _once(self) -> None:
        rows = torch.randint(0, len(self.images), (self.recipe.batch_size,), device=self.device)
        with autocast(self.device):
            loss = self.loss_of(self.call, self.images[rows], self.labels[rows])
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            change = torch._foreach_sub(list(self.net.parameters()), list(self.average.parameters()))
            torch._foreach_mul_(change, 1 - self.keep)
            torch._foreach_add_(list(self.average.parameters()), change)
        self.total.add_(loss.detach())

    def _captured(self) -> torch.cuda.CUDAGraph:
        """One step as a CUDA graph. The steps that warm it up change nothing: their learning rate is zero, and the
        optimizer starts anew."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        self.keep.fill_(1.0)
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._once()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._once()
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        self.total.zero_()
        return graph

    def run(self, until: int) -> None:
        """Steps up to number `until`; the host does not wait for the device."""
        while self.step < until:
            rate, keep = self.recipe.rate(self.step), min(EMA_DECAY, (1 + self.step) / (10 + self.step))
            self.keep.fill_(keep)
            if self.device.type == "cuda":
                self.rate.fill_(rate)
            else:
                self.optimizer.param_groups[0]["lr"] = rate
            if self.graph is None:
                self._once()
            else:
                self.graph.replay()
            self.step += 1

    def lost(self) -> float:
        """The sum of the losses since the last look. The host waits."""
        value, _ = self.total.item(), self.total.zero_()
        return value
