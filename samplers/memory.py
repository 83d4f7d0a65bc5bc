"""What a multistep sampler remembers between two steps, kept with the tensor that the first of them returned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .maths.evaluations import Evaluation
from .maths.timesteps import likely_index, own_index, single


@dataclass(frozen=True)
class State:
    """Memory of earlier evaluations that the next one needs, in tensors that no caller can write to."""

    index: int
    shape: torch.Size
    base: torch.Tensor | None  # where its step began, if before it
    history: tuple[torch.Tensor, ...]


class States(WeakTensorKeyDictionary):
    """States by the sample that was returned, as long as it lives; not part of a pickled scheduler."""

    def __reduce__(self):
        return States, ()


def state_for(
    following: Evaluation,
    index: int,
    sample: torch.Tensor,
    model_output: torch.Tensor,
    base: torch.Tensor,
    history: tuple[torch.Tensor, ...],
) -> State:
    """The state that evaluation `index`, `following`, needs of the one before it.

    Args:
        sample, model_output: what the caller gave; `base` and history[0] may be these tensors themselves.
        history: what the model said, the latest first.
    """
    past = history[: following.past]
    # The caller may write the next sample and output over these two (static buffers of a CUDA graph).
    if past and past[0] is model_output:
        past = (model_output.clone(), *past[1:])
    kept = None if following.starts else base.clone() if base is sample else base
    return State(index, sample.shape, kept, past)


class Remembering:
    """Of a DEISScheduler: finds, and forgets, what it remembers of the sample at hand."""

    def _state_for(self, timestep: int | float | torch.Tensor, sample: torch.Tensor) -> tuple[int, State | None]:
        """(index of the evaluation at `timestep`, the state that led to it: of this sample or the latest, if any)."""
        state = self._states.get(sample, self._latest)
        if state is not None and state.shape != sample.shape:
            state = None
        expected, timestep = None if state is None else state.index, single(timestep)
        index = own_index(timestep, self._own_timesteps)
        if index is None:
            index = likely_index(timestep, self._times, self._evaluations, expected, self._begin_index)
        return index, state if index == expected else None

    def _forget(self) -> None:
        self._states, self._latest = States(), None
