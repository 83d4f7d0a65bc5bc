"""Layers that are fed embeddings of times, classes and texts, computed once for each step of a schedule.

Time embeddings, and the modulation (adaLN) that is made of them, depend on the time of a step and on the conditions,
not on the picture. Whoever samples many batches on one schedule needs them once a step: from then on their layers
are not run and their weights not read. That is what quantizing these layers (methods/lutgemm.py) is to be compared
with, where there are few conditions: a table of so many steps instead of weights of fewer bits.

    with ptq4dm.cached_embeddings(pipe) as cache:
        for seeds in batches:
            ptq4dm.sample(pipe, seeds)
    print(cache)

Pictures are the same to the bit, and nothing is ever stale. Which layers these are is found out by what is computed
from what: in the first call with new times or conditions every op is watched, and a layer is kept only if nothing
that its input was computed from is a tensor of three or more dimensions of the model's arguments (dependence.py). A
call is known by the values of all other arguments, to the bit. Other weights, adapters, scales of adapters, dtypes,
devices or autocast compute everything anew (state.py says what cannot be seen). The host reads times and conditions
in each call of the model; it works in no CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import nn

from ..errors import UserError
from ..hooks import computing
from ..pipelines.denoiser import check_pipeline, denoiser_names, turn_at
from .embedding_table import Table

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class EmbeddingCache:
    """The tables of a pipeline's denoisers by name, "" of a model; `str()` of it is a report, after the block too."""

    def __init__(self, tables: dict[str, Table]) -> None:
        self.tables = tables

    @property
    def layers(self) -> list[str]:
        """Names of the layers whose outputs were kept."""
        return sorted(
            f"{model}.{name}" if model else name for model, one in self.tables.items() for name in one.served
        )

    @property
    def made(self) -> int:
        """Outputs of layers that were computed to be kept."""
        return sum(one.made for one in self.tables.values())

    @property
    def reused(self) -> int:
        """Outputs that were taken from the tables: layers that were not run."""
        return sum(one.reused for one in self.tables.values())

    @property
    def uncached(self) -> int:
        """Calls of a model of which nothing could be kept, because hooks wait for its layers' calls, or an argument
        is of a kind that cannot be compared."""
        return sum(one.uncached for one in self.tables.values())

    @property
    def most_bytes(self) -> int:
        """The most that was kept at a time."""
        return sum(max(one.most, one.bytes) for one in self.tables.values())

    def __str__(self) -> str:
        weights = [one.linears[name] for one in self.tables.values() for name in one.served]
        held = sum(t.numel() * t.element_size() for layer in weights for t in layer.parameters())
        lines = [
            f"outputs of {len(weights)} layers: computed {self.made} times, reused {self.reused}",
            f"at most {self.most_bytes:,} bytes, in the place of layers of {held:,}",
        ]
        if self.uncached:
            lines.append(f"{self.uncached} calls kept nothing: hooks, other threads, or arguments of unknown kinds")
        return "\n".join(lines)


@contextmanager
def cached_embeddings(target: DiffusionPipeline | nn.Module) -> Iterator[EmbeddingCache]:
    """An `EmbeddingCache` that serves the denoisers of a pipeline, or a model, in the `with` block.

    Tables outlive a call of the pipeline, and end with the block. Calls in other threads are as before.

    Raises:
        UserError: a model is compiled, has no Linear layer, or is called with gradients enabled.
    """
    if not isinstance(target, nn.Module):
        check_pipeline(target, "what is sampled with cached_embeddings")
    with turn_at(target):
        models = {"": target} if isinstance(target, nn.Module) else _denoisers(target)
        tables = {name: _table(model) for name, model in models.items()}
        with ExitStack() as stack:
            for table in tables.values():
                stack.callback(table.clear)
                stack.enter_context(computing(table.model, _through(table)))
            yield EmbeddingCache(tables)


def _denoisers(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    names = denoiser_names(pipe)
    return {name if len(names) > 1 else "": getattr(pipe, name) for name in names}


def _table(model: nn.Module) -> Table:
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise UserError(
            "cached_embeddings watches a model's ops, which a compiled model does not show; compile none."
        )
    table = Table(model)
    if not table.linears:
        raise UserError(f"{type(model).__name__} has no Linear layer whose outputs could be kept.")
    return table


def _through(table: Table) -> dict[str, Callable]:
    """What a table's model and its layers compute by, by name: calls go through the table."""

    def layer(name: str, forward: Callable) -> Callable:
        return lambda input: table.layer(name, forward, input)

    through = {name: layer(name, one.forward) for name, one in table.linears.items()}
    of_model = through.pop("", table.model.forward)  # a model may be one of the layers
    return {**through, "": lambda *args, **kwargs: table.call(of_model, args, kwargs)}
