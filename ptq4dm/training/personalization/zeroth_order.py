"""Zeroth-order Adam of ZOODiP (arXiv:2503.14868, algorithm 1): an embedding tuned by losses alone.

    L_0, L_1, ..., L_n    losses of u, u + mu z_1, ..., u + mu z_n on one image, noise and timestep
    s_i = (L_i - L_0) / mu, of each image; with equal weights over its root mean square
    g = mean over images and perturbations of s_i z_i                           eq. 3
    g <- g - (g P') P                                                           subspace.py
    u <- u - lr m^ / (sqrt(v^) + epsilon)                                       Adam of g

Equal weights are our own: timesteps whose losses change most say least about the images. Each image has perturbations
of its own (our assumption; the paper has one image a step): as many forward passes with
the same perturbations for all images would give a noisier gradient. All of it is float32 on the embedding's device,
and nothing waits for the device but the buffer's axes, once in tau steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import PersonalizeConfig
from .subspace import noise_axes, without


@dataclass
class Tuned:
    """What is tuned, and all that the next step depends on. u, first, second, average [d]; embeddings [<= tau, d];
    axes [r, d]."""

    u: Tensor
    first: Tensor
    second: Tensor
    average: Tensor
    axes: Tensor
    embeddings: list[Tensor] = field(default_factory=list)
    step: int = 0

    @staticmethod
    def start(u: Tensor) -> Tuned:
        """The state before the first step."""
        u = u.float()
        return Tuned(u.clone(), torch.zeros_like(u), torch.zeros_like(u), u.clone(), u.new_zeros(0, u.numel()))

    def tensors(self) -> dict[str, Tensor]:
        """The state as tensors by name, for a file."""
        seen = torch.stack(self.embeddings) if self.embeddings else self.u.new_zeros(0, self.u.numel())
        parts = {name: getattr(self, name) for name in ("u", "first", "second", "average", "axes")}
        return {**parts, "embeddings": seen}

    @staticmethod
    def of(tensors: dict[str, Tensor], step: int, device: torch.device) -> Tuned:
        """The state from tensors of `tensors()`."""
        parts = {name: value.to(device) for name, value in tensors.items()}
        return Tuned(**parts | {"embeddings": list(parts["embeddings"])}, step=step)


def gradient(losses: Tensor, directions: Tensor, config: PersonalizeConfig) -> Tensor:
    """The estimate g [d] of eq. 3.

    Args:
        losses: [b, 1 + n], of the embedding itself and of its perturbations.
        directions: [b, n, d], what was really added, divided by size: a model in 16 bits rounds its embeddings.
    """
    slopes = (losses[:, 1:] - losses[:, :1]) / config.perturbation
    if config.weights == "equal":
        tiny = torch.finfo(torch.float32).tiny  # where no loss of an image changed
        slopes = slopes / slopes.square().mean(1, keepdim=True).sqrt().clamp_min(tiny)
    return torch.einsum("bn,bnd->d", slopes, directions) / slopes.numel()


def buffer_size(config: PersonalizeConfig, numbers: int) -> int:
    """tau for an embedding of so many numbers."""
    return max(2, min(config.buffer, numbers // 6))


def change(state: Tuned, g: Tensor, config: PersonalizeConfig) -> Tensor:
    """What a step with this gradient adds to the embedding [d]; the moments of Adam are updated."""
    d, n = g.numel(), config.perturbations
    if config.subspace == "released":
        g = g / ((d - len(state.axes) + n - 1) / n) ** 0.5
    if config.subspace != "none":
        g = without(g, state.axes)
    one, two = config.betas
    k = state.step + 1
    state.first = one * state.first + (1 - one) * g
    state.second = two * state.second + (1 - two) * g.square()
    root = (state.second / (1 - two**k)).sqrt() + config.epsilon
    tiny = torch.finfo(torch.float32).tiny  # where no loss ever changed, nothing moves
    return -config.learning_rate * state.first / (1 - one**k) / root.clamp_min(tiny)


def take(state: Tuned, step: Tensor, config: PersonalizeConfig) -> None:
    """Add a step to the embedding; every tau steps find the axes anew, and begin a new buffer."""
    state.u = state.u + step
    state.step += 1
    keep = min(config.average, (1 + state.step) / (10 + state.step)) if config.average else 0.0
    state.average = state.average + (1 - keep) * (state.u - state.average)
    if config.subspace == "none":
        return
    state.embeddings.append(state.u)
    if len(state.embeddings) == buffer_size(config, state.u.numel()):
        state.axes = noise_axes(torch.stack(state.embeddings).cpu(), config.variance).to(state.u.device)
        state.embeddings = []
