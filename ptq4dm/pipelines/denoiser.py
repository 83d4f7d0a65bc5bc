"""The network that a pipeline runs at every step: where it is, what it is conditioned on, and turns at using it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from ..errors import UserError

_turns: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_turns_guard = threading.Lock()


def denoiser_name(pipe) -> str:
    """ "unet" or "transformer": the attribute of the pipeline that holds the network run at every step.

    Raises:
        UserError: the pipeline has neither.
    """
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise UserError(f"{type(pipe).__name__} has neither a unet nor a transformer; ptq4dm needs one of them.")


def denoiser(pipe) -> nn.Module:
    """The pipeline's denoising network: pipe.unet or pipe.transformer (UserError when it has neither)."""
    return getattr(pipe, denoiser_name(pipe))


def model_of(target) -> nn.Module:
    """A model as it is, or the denoiser of a pipeline."""
    return target if isinstance(target, nn.Module) else denoiser(target)


def class_count(pipe) -> int | None:
    """Number of class labels that the denoiser knows; None when it is not class-conditional."""
    config = denoiser(pipe).config
    # DiTTransformer2DModel and UNet2DModel have their own names for it.
    return getattr(config, "num_embeds_ada_norm", None) or getattr(config, "num_class_embeds", None)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout and the like off; afterwards every module is in the mode it was in.

    One thread at a time has a model in it, others wait: hooks on the model's layers then see one thread's calls.
    """
    with _turn(model):
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _turn(model: nn.Module) -> threading.RLock:
    """The lock of a model, and of its compiled copy; a thread that holds it may take it again."""
    with _turns_guard:
        return _turns.setdefault(getattr(model, "_orig_mod", model), threading.RLock())
