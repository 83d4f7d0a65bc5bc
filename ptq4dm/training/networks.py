"""The network in training, the moving average of its weights, its optimizer and accelerate."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..layers.shift.convert import Converted, to_integers
from .config import ShiftQuantConfig


class Networks:
    """`net` is trained, `average` follows it; both are copies of a model, their layers on integers.

    `call` is the network as it is to be called: with autocast, compiled, and synchronized between processes.
    ratios: of norms by the mean magnitude, by name. wide: layers that have 8 bits.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ShiftQuantConfig,
        accelerator: Accelerator,
        ratios: Mapping[str, float] | None = None,
        wide: Sequence[str] = (),
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.net = copy.deepcopy(model).to(accelerator.device).train().requires_grad_(True)
        self.converted, self.wide = Converted(), list(wide)
        if config.widths is not None or config.norm == "l1":
            self.converted = to_integers(self.net, config.widths, config.norm == "l1", ratios=ratios, wide=wide)
        self.average = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=0.0, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.call = accelerator.prepare_model(self.net)

    @property
    def kept(self) -> dict[str, nn.Module]:
        """What a checkpoint holds."""
        return {"net": self.net, "average": self.average}

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.config.learning_rate * min(1.0, (step + 1) / self.config.warmup_steps)

    def keep(self, step: int) -> float:
        """The share of the average that stays at a step."""
        return min(self.config.ema_decay, (1 + step) / (10 + step))

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss, clipped."""
        self.accelerator.backward(loss)
        nn.utils.clip_grad_norm_(self.net.parameters(), self.config.gradient_clip)

    def descend(self, step: int, loss: Tensor) -> None:
        """One step of the optimizer, and of the average after it."""
        self.backward(loss)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():  # or the average would be part of a graph that grows with every step
            torch._foreach_lerp_(list(self.average.parameters()), list(self.net.parameters()), 1 - self.keep(step))

    def finite(self) -> bool:
        """True if all weights are free of NaN and infinity; waits for the device."""
        weights = [p for net in self.kept.values() for p in net.parameters()]
        return bool(torch.stack(torch._foreach_norm(weights)).isfinite().all())
