"""Parts of score distillation: a one-step generator, noise, and two denoisers that disagree about it.

    generator     x_0 = G(z) = (x - sigma_* eps_G(x, t_*)) / alpha_*             x = s z, z ~ N(0, I), t_* fixed
    noise         x_t = alpha_t x_0 + sigma_t n
    denoised      D_net(x_t) = (x_t - sigma_t eps_net(x_t, t)) / alpha_t
    fake score    min over phi of |eps_phi(x_t, t) - n|^2 on generated x_0       (denoising score matching)
    generator     dL/dx_0 = (D_phi(x_t) - D_target(x_t)) / mean |x_0 - D_target(x_t)|

The last line is the gradient of KL(generated || target) over noise levels up to a weight: Diff-Instruct
(arXiv:2305.18455, eq. 3.3), with the weight of DMD (arXiv:2311.18828, eq. 8), which gives every image and noise
level the same say. Networks are called in whatever precision they are wrapped in; all else is float32.

s^2 = alpha_*^2 + sigma_*^2 is 1 where noise preserves variance; of a flow, alpha = 1 - sigma, it is less. eps_net is
the noise that follows from what a network predicts: itself, the velocity of diffusion (v) or of a flow, or the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...training.task import seed_of
from ..maths.outputs import noise_in


@dataclass
class Batch:
    """Random choices of one iteration, B rows.

    z, noise [B, C, H, W] float32; t [B] int64; labels [B] int64, or None for an unconditional model.
    """

    z: Tensor
    noise: Tensor
    t: Tensor
    labels: Tensor | None

    def rows(self, rows: slice) -> Batch:
        labels = None if self.labels is None else self.labels[rows]
        return Batch(self.z[rows], self.noise[rows], self.t[rows], labels)


class Chance:
    """Batches that depend on their key alone: nothing has to be saved to go on, or to do the same twice.

    Args:
        shape: of one image; classes: how many labels there are, None for an unconditional model.
        times: t is uniform over the whole numbers from times[0] to times[1], the latter left out.
    """

    def __init__(
        self, seed: int, shape: tuple[int, ...], classes: int | None, times: tuple[int, int], device
    ) -> None:
        self.seed, self.shape, self.classes, self.times = seed, shape, classes, times
        self.generator = torch.Generator(device)

    def draw(self, size: int, *key) -> Batch:
        """`size` rows for a key, e.g. a stage and an iteration."""
        g = self.generator.manual_seed(seed_of(self.seed, *key))
        z, noise = (torch.randn(size, *self.shape, generator=g, device=g.device) for _ in range(2))
        t = torch.randint(*self.times, (size,), generator=g, device=g.device)
        labels = None
        if self.classes is not None:
            labels = torch.randint(0, self.classes, (size,), generator=g, device=g.device)
        return Batch(z, noise, t, labels)


class Diffusion:
    """The noise levels of a model, and how networks of diffusers are asked at them.

    alpha, sigma: float64 [T] at whole times; generator_timestep: t_* above; prediction_type: what networks predict.
    """

    def __init__(self, alpha: Tensor, sigma: Tensor, generator_timestep: int, prediction_type: str, device) -> None:
        self.alpha, self.sigma = alpha.float().to(device), sigma.float().to(device)
        self.t, self.prediction_type = generator_timestep, prediction_type
        self.alpha_t, self.sigma_t = float(alpha[self.t]), float(sigma[self.t])
        self.scale = (self.alpha_t**2 + self.sigma_t**2) ** 0.5

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at t [B], shaped to be multiplied with x [B, ...]."""
        shape = (-1, *[1] * (like.ndim - 1))
        return self.alpha[t].reshape(shape), self.sigma[t].reshape(shape)

    def epsilon(self, net: nn.Module, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The noise that a network sees in x [B, C, ...], float32; a learned variance is left out."""
        extra = {} if labels is None else {"class_labels": labels}
        # In one memory layout, whatever the network's: for each other one torch.compile would compile again.
        output = net(x, t, return_dict=False, **extra)[0][:, : x.shape[1]].float().contiguous()
        return noise_in(output, x, *self.levels(t, x), self.prediction_type)

    def generate(self, net: nn.Module, z: Tensor, labels: Tensor | None) -> Tensor:
        """G(z): clean data, not clipped."""
        t, x = torch.full((len(z),), self.t, device=z.device), self.scale * z
        return (x - self.sigma_t * self.epsilon(net, x, t, labels)) / self.alpha_t

    def denoising_loss(self, net: nn.Module, x0: Tensor, batch: Batch) -> Tensor:
        """Scalar mean |eps_net(x_t, t) - n|^2."""
        alpha, sigma = self.levels(batch.t, x0)
        predicted = self.epsilon(net, alpha * x0 + sigma * batch.noise, batch.t, batch.labels)
        return (predicted - batch.noise).square().mean()

    @torch.no_grad()
    def score_difference(self, fake: nn.Module, target: nn.Module, x0: Tensor, batch: Batch) -> Tensor:
        """dL/dx_0 as above, [B, ...]: no gradient flows through the two networks."""
        alpha, sigma = self.levels(batch.t, x0)
        x = alpha * x0 + sigma * batch.noise
        eps_fake = self.epsilon(fake, x, batch.t, batch.labels)
        eps_target = self.epsilon(target, x, batch.t, batch.labels)
        size = (x0 - (x - sigma * eps_target) / alpha).abs().flatten(1).mean(1).reshape(alpha.shape)
        return (eps_target - eps_fake) * (sigma / alpha) / size
