"""What a model of text is conditioned on: whatever its own pipeline makes of prompts, worked out once for all."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..hooks import hooked
from ..pipelines.denoiser import TIMES, denoiser, denoiser_name
from ..pipelines.sampling import refusals
from ..progress import progress_bar

AT_ONCE = 16  # prompts in a call


class _Called(BaseException):
    """Ends a pipeline's call where its network is called for the first time."""

    def __init__(self, args: tuple, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_given, self.kwargs_given = args, kwargs


def first_call(pipe, prompts: list[str]) -> tuple[tuple, dict[str, Any]]:
    """What a pipeline calls its network with first, for an image of each prompt: (args, kwargs).

    Without guidance, as a model is trained. Raises UserError where it takes no such prompts, or makes no call.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    arguments: dict[str, Any] = {"prompt": prompts, "num_inference_steps": 1}
    arguments |= {"guidance_scale": 1.0} if "guidance_scale" in parameters else {}
    # Images are of the model's own size, which needs no bin of sizes.
    arguments |= {"use_resolution_binning": False} if "use_resolution_binning" in parameters else {}
    # The pipeline draws noise that nobody uses: not from the generator of the process.
    arguments |= {"generator": torch.Generator().manual_seed(0)} if "generator" in parameters else {}

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        raise _Called(args, kwargs)

    model = getattr(pipe, denoiser_name(pipe))
    try:
        with hooked(model, before={"": stop}), refusals(pipe, {"prompt": prompts}, None):
            pipe(**{name: value for name, value in arguments.items() if name in parameters})
    except _Called as call:
        return call.args_given, call.kwargs_given
    raise UserError(f"{type(pipe).__name__} made a picture without a call of its {denoiser_name(pipe)}.")


class Prompted:
    """Prompts as their model's network takes them, by number; kept on the CPU.

    Raises UserError where the pipeline denoises something else than the latents of its VAE, tells its network other
    times than its scheduler has, or gives prompts of different lengths different shapes.
    """

    def __init__(self, pipe: Any, prompts: Sequence[str], shape: tuple[int, ...]) -> None:
        self.prompts, model = list(prompts), denoiser(pipe)
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        parts: dict[tuple[str, ...], list[Tensor]] = {}
        for i in progress_bar(range(0, len(self.prompts), AT_ONCE), desc="captions", unit="call", leave=False):
            chosen = self.prompts[i : i + AT_ONCE]
            args, kwargs = first_call(pipe, chosen)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            time = next((name for name in TIMES if name in given), None)
            if time is None or tuple(given[names[0]].shape) != (len(chosen), *shape):
                raise UserError(
                    f"{type(model).__name__} is called with {list(given[names[0]].shape)} for {len(chosen)} images "
                    f"{list(shape)}; training is for pipelines that denoise the latents of their VAE as they are."
                )
            if float(torch.as_tensor(given[time]).flatten()[0]) != float(pipe.scheduler.timesteps[0]):
                raise UserError(f"{type(pipe).__name__} tells its network other times than its scheduler has.")
            self.fixed: dict[tuple[str, ...], Any] = {}
            for name, value in _leaves({k: v for k, v in given.items() if k not in (names[0], time, "return_dict")}):
                if isinstance(value, Tensor) and value.ndim and len(value) == len(chosen):
                    parts.setdefault(name, []).append(value.detach().cpu())
                else:
                    self.fixed[name] = value
        if len({tuple(one.shape[1:]) for each in parts.values() for one in each}) > len(parts):
            raise UserError(f"{type(pipe).__name__} makes embeddings of several lengths; training needs one.")
        self.rows = {name: torch.cat(each) for name, each in parts.items()}

    def __call__(self, numbers: Tensor) -> dict[str, Any]:
        """Keyword arguments of the network for the prompts of these numbers [B], on their device."""
        found: dict[str, Any] = {}
        here = {name: rows[numbers.cpu()].to(numbers.device) for name, rows in self.rows.items()}
        for name, value in {**self.fixed, **here}.items():
            inside = found
            for key in name[:-1]:
                inside = inside.setdefault(key, {})
            inside[name[-1]] = value
        return found


def _leaves(values: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """The values in dicts of dicts, each with its keys."""
    found: list[tuple[tuple[str, ...], Any]] = []
    for key, value in values.items():
        name = (*above, key)
        found += _leaves(value, name) if isinstance(value, dict) and value else [(name, value)]
    return found
