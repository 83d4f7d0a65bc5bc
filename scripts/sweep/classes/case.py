"""A case of the sweep: how a model is made, and how the arguments of one call are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .discover import denoisers


@dataclass(frozen=True)
class Case:
    """One configuration of one class.

    make_model(): the model with random weights, in evaluation mode; the same weights each time.
    make_call(batch, seed): (args, kwargs) of one call. Models that take no batch ignore it.
    """

    name: str
    variant: str
    make_model: Callable[[], nn.Module]
    make_call: Callable[[int, int], tuple[tuple, dict[str, Any]]]

    @property
    def label(self) -> str:
        return f"{self.name} ({self.variant})" if self.variant else self.name


class Draw:
    """Draws the arguments of one call. Shapes are those of one sample; the batch comes before them."""

    def __init__(self, batch: int, seed: int) -> None:
        self.batch, self.seed = batch, seed
        self.generator = torch.Generator().manual_seed(seed)

    def alone(self, *shape: int) -> Tensor:
        """Normal numbers without a batch."""
        return torch.randn(shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return self.alone(self.batch, *shape)

    def uniform(self, *shape: int) -> Tensor:
        """In [0.1, 1)."""
        return 0.1 + 0.9 * torch.rand((self.batch, *shape), generator=self.generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, (self.batch, *shape), generator=self.generator)

    def steps(self, *shape: int) -> Tensor:
        """Timesteps of 1000, as whole numbers."""
        return self.integers(1000, *shape)

    def ones(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones((self.batch, *shape), dtype=dtype)

    def full(self, values: list, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same values for each sample: [batch, len(values)]."""
        return torch.tensor([values] * self.batch, dtype=dtype)


def grid(*sizes: int) -> Tensor:
    """The places of a grid, [product of sizes, len(sizes)]."""
    return torch.cartesian_prod(*[torch.arange(size) for size in sizes]).float()


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random weights that keep the size of what goes through it.

    Layers have normal weights of variance 1 / inputs, so no adaptive norm that diffusers makes of zeros stays closed,
    and no output is constant. Norms stay near one.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, scale: float) -> Tensor:
        return scale * torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.dtype)

    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, nn.Embedding):
                    parameter.copy_(normal(parameter, 1.0))
                elif parameter.ndim >= 2:
                    parameter.copy_(normal(parameter, parameter[0].numel() ** -0.5))
                elif name.endswith("bias"):
                    parameter.copy_(normal(parameter, 0.1))
                elif name.endswith("weight"):
                    parameter.copy_(1 + normal(parameter, 0.1))
                else:
                    parameter.copy_(normal(parameter, 0.5))
    return model.eval()


class Table(dict):
    """The cases of a family, by label."""

    def add(
        self,
        name: str,
        config: dict[str, Any],
        call: Callable[[Draw], dict[str, Any]],
        variant: str = "",
        make: Callable[..., nn.Module] | None = None,
        adjust: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """Add a configuration of the class `name`.

        call: from a Draw to the keyword arguments of one call.
        make: from the configuration to the model, where its class alone does not do.
        adjust: of the random weights, in place, where the class expects others.
        """

        def make_model() -> nn.Module:
            torch.manual_seed(0)
            model = randomized((make or denoisers()[name])(**config))
            if adjust is not None:
                adjust(model)
            return model

        case = Case(name, variant, make_model, lambda batch, seed: ((), call(Draw(batch, seed))))
        if case.label in self:
            raise ValueError(f"{case.label} is in the table already")
        self[case.label] = case
