"""The tables of embeddings that hold what is tuned, and calls in which each sample has a row of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...hooks import hooked


@dataclass(frozen=True)
class Table:
    """One nn.Embedding: `name` in `network`, which is the component `part` of a pipeline, and its row `index`."""

    part: str
    network: nn.Module
    name: str
    index: int

    @property
    def weight(self) -> Tensor:
        return self.network.get_submodule(self.name).weight.detach()

    @property
    def names(self) -> list[str]:
        """Of all modules of the network that look up in this table: T5 has two for one weight."""
        weight = self.network.get_submodule(self.name).weight
        embeddings = ((n, m) for n, m in self.network.named_modules() if isinstance(m, nn.Embedding))
        return [name for name, module in embeddings if module.weight is weight]

    @property
    def scale(self) -> float:
        """Root mean square of the table's numbers: the unit in which its row is tuned."""
        return float(self.weight.float().square().mean().sqrt())


class Tables:
    """Rows of several tables, side by side as one vector u [d], float32, in units of each table's scale.

    A class-conditional DiT has a table in each block; a pipeline with two text encoders has two.
    """

    def __init__(self, tables: Sequence[Table], device: torch.device) -> None:
        """device: of u, where the model computes; offloading may keep the tables elsewhere."""
        self.tables = list(tables)
        self.seen: set[int] = set()  # tables whose look-ups were looked at once
        self.widths = [table.weight.shape[1] for table in self.tables]
        for table in self.tables:
            if not table.scale > 0:  # NaN, too
                raise UserError(f"the embeddings '{table.name}' of {table.part} are all zero, or hold NaN.")
        scales = [torch.full((w,), t.scale) for t, w in zip(self.tables, self.widths, strict=True)]
        self.scale = torch.cat(scales).to(device)

    def unit(self, rows: Sequence[Tensor]) -> Tensor:
        """u [d] of rows [width], one for each table."""
        return torch.cat([row.detach().float().to(self.scale.device) for row in rows]) / self.scale

    def rows(self, u: Tensor) -> list[Tensor]:
        """The rows [..., width] of u [..., d], one for each table, float32."""
        return list((u * self.scale).split(self.widths, dim=-1))

    def rounded(self, u: Tensor) -> Tensor:
        """What a model in 16 bits makes of u [..., d], in float32."""
        parts = [row.to(t.weight.dtype).float() for t, row in zip(self.tables, self.rows(u), strict=True)]
        return torch.cat(parts, -1) / self.scale

    @contextmanager
    def given(self, u: Tensor) -> Iterator[None]:
        """In this block sample k of a batch of B finds row u[k] (of u [B, d]) where it asks for the tuned row.

        The tables stay as they are: what a look-up gives is changed on its way.

        Raises UserError where a model looks up nothing in a table, or at the first look not one tuned row a sample.
        """
        hooks: dict[int, tuple[nn.Module, dict[str, Any]]] = {}
        asked: set[int] = set()
        for number, (table, rows) in enumerate(zip(self.tables, self.rows(u), strict=True)):
            network, found = hooks.setdefault(id(table.network), (table.network, {}))
            hook = self._replacing(number, rows, asked)
            found.update(dict.fromkeys(table.names, hook))
        with ExitStack() as stack:
            for network, found in hooks.values():
                stack.enter_context(hooked(network, after=found))
            yield
        if left := [table for number, table in enumerate(self.tables) if number not in asked]:
            raise UserError(
                f"{left[0].part} looks nothing up in its embeddings '{left[0].name}'; it cannot be tuned."
            )

    def _replacing(self, number: int, rows: Tensor, found: set[int]) -> Callable:
        """A hook that puts rows [B, width] where the numbers [B, ...] that a table is asked for are the tuned one."""
        table = self.tables[number]

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
            asked = args[0] if args else kwargs["input"]
            here = asked == table.index
            if asked.shape[0] != len(rows):
                if bool(here.any()):
                    raise UserError(f"{table.part} embeds {len(asked)} texts for {len(rows)} images.")
                return output  # prompts of another kind, negative ones for example
            found.add(number)
            if number not in self.seen:  # the host waits for the answer, so not in every step
                self.seen.add(number)
                if not bool((here.flatten(1).sum(1) == 1).all() if here.ndim > 1 else here.all()):
                    raise UserError(f"what is tuned is not found once in what {table.part} is given for each image.")
            shape = (len(rows), *[1] * (asked.ndim - 1), rows.shape[1])
            return torch.where(here[..., None], rows.to(output).view(shape), output)

        return hook
