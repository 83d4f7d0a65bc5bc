"""What is minimised: the denoising loss of the user's images in the embedding, on batches that a key decides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ...pipelines.denoiser import evaluation_mode, networks_of
from ..schedule import Schedule
from ..task import seed_of
from .config import PersonalizeConfig
from .targets import Target

FIXED = 32  # rows of the set that progress is measured on


@dataclass(frozen=True)
class Draw:
    """The random choices of b rows: images [b] and t [b] int64, noise [b, C, H, W], directions [b, n, d]."""

    images: list[int]
    t: Tensor
    noise: Tensor
    directions: Tensor


@dataclass
class Problem:
    """target: what is tuned. images: x_0 [N, C, H, W] float32, on the model's device. schedule: of the noise."""

    target: Target
    images: Tensor
    schedule: Schedule
    config: PersonalizeConfig

    def draw(self, *key: object) -> Draw:
        """A step's choices. They depend on seed and key alone: nothing has to be saved to go on.

        The generator is made here and on the CPU: that of the process is neither seeded nor drawn from, and every
        device sees the same noise.
        """
        config, d = self.config, self.target.start.numel()
        g = torch.Generator().manual_seed(seed_of(config.seed, *key))
        b, n = config.batch_size, config.perturbations
        images = torch.randint(0, len(self.images), (b,), generator=g).tolist()
        t = torch.randint(*self.schedule.times(config.first_time, config.last_time), (b,), generator=g)
        noise = torch.randn(b, *self.images.shape[1:], generator=g)
        return self._placed(images, t, noise, torch.randn(b, n, d, generator=g))

    def fixed(self) -> Draw:
        """The rows that progress is measured on: every image in turn, timesteps evenly over their range."""
        g = torch.Generator().manual_seed(self.config.seed + 2**40)
        first, last = self.schedule.times(self.config.first_time, self.config.last_time)
        t = first + (torch.arange(FIXED) * (last - first)) // FIXED
        noise = torch.randn(FIXED, *self.images.shape[1:], generator=g)
        images = [k % len(self.images) for k in range(FIXED)]
        return self._placed(images, t, noise, torch.zeros(FIXED, 0, self.target.start.numel()))

    def _placed(self, images: list[int], t: Tensor, noise: Tensor, directions: Tensor) -> Draw:
        return Draw(images, *(self._on_device(one) for one in (t, noise, directions)))

    def _on_device(self, one: Tensor) -> Tensor:
        """From pinned memory a copy waits for nothing, so that the host runs ahead of a GPU."""
        device = self.images.device
        return (one.pin_memory() if device.type == "cuda" else one).to(device, non_blocking=True)

    def losses(self, u: Tensor, images: list[int], t: Tensor, noise: Tensor) -> Tensor:
        """Mean squared errors [B], float32, of B rows: embeddings u [B, d], images, timesteps [B], noise [B, ...].

        All in one forward pass, or as many rows at a time as `forward_batch` says. Nothing is kept for a gradient.
        """
        most = self.config.forward_batch or len(u)
        parts = [slice(start, start + most) for start in range(0, len(u), most)]
        with torch.no_grad():
            return torch.cat([self.errors(u[rows], images[rows], t[rows], noise[rows]) for rows in parts])

    def errors(self, u: Tensor, images: list[int], t: Tensor, noise: Tensor) -> Tensor:
        """The same in one forward pass, with gradients where they are enabled."""
        x = self.images[self._on_device(torch.tensor(images))]
        with self.target.tables.given(u):
            predicted = self.target.predict(self.schedule.noisy(x, noise, t), self.schedule.told[t], images)
        return (predicted - self.schedule.target(x, noise, t)).square().flatten(1).mean(1)

    def pairs(self, u: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """(losses [b, 1 + n] of u [d] and its perturbations, directions [b, n, d] that were really added).

        An image's perturbations see the same noise and timestep as the embedding itself (common random numbers), and
        all go through the model together. The embedding is only read: it cannot drift.
        """
        b, n, d = draw.directions.shape
        size, tables = self.config.perturbation, self.target.tables
        moved = torch.cat([u.expand(b, 1, d), u + size * draw.directions], 1)
        given = tables.rounded(moved)
        images = [image for image in draw.images for _ in range(1 + n)]
        t, noise = (one[:, None].expand(b, 1 + n, *one.shape[1:]).flatten(0, 1) for one in (draw.t, draw.noise))
        losses = self.losses(given.flatten(0, 1), images, t, noise)
        return losses.view(b, 1 + n), (given[:, 1:] - given[:, :1]) / size

    def fixed_loss(self, u: Tensor, draw: Draw) -> Tensor:
        """The mean loss of an embedding on the fixed rows, in as many forward passes as a step's batch size asks."""
        most = self.config.batch_size * (1 + self.config.perturbations)
        rows = [slice(start, start + most) for start in range(0, FIXED, most)]
        given = self.target.tables.rounded(u).expand(FIXED, -1)
        found = [self.losses(given[r], draw.images[r], draw.t[r], draw.noise[r]) for r in rows]
        return torch.cat(found).mean()


@contextmanager
def ready(pipe) -> Iterator[None]:
    """A pipeline's networks in evaluation mode, without gradients, and without its bars."""
    with ExitStack() as stack:
        for network in networks_of(pipe).values():
            stack.enter_context(evaluation_mode(network))
        before = getattr(pipe, "_progress_bar_config", None)
        pipe._progress_bar_config = {**(before or {}), "disable": True}
        try:
            with torch.no_grad():
                yield
        finally:
            if before is None:
                del pipe._progress_bar_config
            else:
                pipe._progress_bar_config = before
