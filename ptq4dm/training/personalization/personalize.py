"""Personalization of a packed quantized model by forward passes alone.

"Efficient Personalization of Quantized Diffusion Model without Backpropagation" (ZOODiP), Seo et al., CVPR 2025,
arXiv:2503.14868. An embedding is tuned on a few images while the model stays in its packed codes: no weight is
unpacked, no activation is kept, no gradient is computed. What is tuned is

    a token     personalize(pipe, "dog", token="<dog>", init="dog")     of a pipeline with a text encoder
    a class     personalize(pipe, "dog", class_row=5)                   a row of a class-conditional model's tables

    zeroth_order.py   the estimate of the gradient, and Adam
    subspace.py       the paper's subspace gradient
    problem.py        losses of perturbations, on common random numbers; partial uniform timesteps
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ...checks import checked
from ...errors import UserError
from ...pipelines.denoiser import check_sampled, turn_at
from ..pictures import image_size
from ..schedule import schedule_of
from .config import PersonalizeConfig
from .pictures import learned_from, pictures_of
from .problem import Problem, ready
from .run import Personalized, alone_in, identity_of, tune
from .targets import PROMPTS, Target, class_target, token_target


@checked
def personalize(
    pipe,
    images: str | os.PathLike | Sequence[str | os.PathLike] | Tensor,
    config: PersonalizeConfig | None = None,
    folder: str | os.PathLike = "out/personalized",
    *,
    token: str | None = None,
    class_row: int | None = None,
    init: str | None = None,
    prompts: Sequence[str] | None = None,
    resume: bool = False,
) -> Personalized:
    """Tune a token or a class row on images; returns the path of its file, of a few kilobytes, and the losses.

    The pipeline stays as it is, to the bit. `ptq4dm.load_embedding(pipe, path)` puts the result into it, and
    diffusers' `pipe.load_textual_inversion(path)` a token.

    Args:
        images: a folder, paths, or a tensor uint8 [N, 3, H, W]; they are cut to the middle and resized.
        folder: of result, checkpoint and log; new, or with `resume` that of an earlier call with the same settings,
            steps aside, which then goes on as if it had never stopped: on a CPU bit for bit.
        token: a new word, such as "<dog>"; `init` is the word that it starts as and that the model knows.
        class_row: the class whose row is tuned; `init` is "null", the row of no class, "mean", of the other
            rows, or a class number; "null" where there is one.
        prompts: texts with {} in the place of the token; image k has prompt k mod their number. A caption for each
            image is what the paper has.

    Raises:
        UserError: no images, neither or both of token and class_row, a model without text or classes, a token that
            exists, an init that is no single token, a class out of range, or a folder in use; before any work. Losses
            that come to NaN or infinity.
    """
    check_sampled(pipe)
    config = config or PersonalizeConfig()
    with turn_at(pipe), ready(pipe):
        target = _target(pipe, token, class_row, init, prompts)
        schedule = schedule_of(pipe, target.start.device)
        image_size(pipe)
        pictures = pictures_of(images)
        identity = identity_of(pipe, target, pictures, config)
        with alone_in(Path(folder), identity, resume):
            problem = Problem(target, learned_from(pipe, pictures), schedule, config)
            return tune(problem, Path(folder), identity, resume)


def _target(
    pipe, token: str | None, class_row: int | None, init: str | None, prompts: Sequence[str] | None
) -> Target:
    if (token is None) == (class_row is None):
        raise UserError("personalize tunes either a token (--token) or a row of a class (--class-row); give one.")
    if token is not None:
        return token_target(pipe, token, init, PROMPTS if prompts is None else prompts)
    if prompts is not None:
        raise UserError("prompts belong to a token; a class row has none.")
    assert class_row is not None
    return class_target(pipe, class_row, init)
