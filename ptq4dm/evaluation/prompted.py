"""How well pictures fit their prompts, by networks that somebody has on disk: CLIP score and ImageReward.

    CLIP score     max(100 cos(image, text), 0) of a CLIP model's embeddings (Hessel et al. 2021)
    ImageReward    the reward that people's choices taught a BLIP (Xu et al. 2023), of which 0 is the mean

Neither compares two models picture by picture: each is of one model's pictures, of which a table has two rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files.outside import outside
from ..pipelines.images import to_uint8

Score = Callable[[Tensor, Sequence[str]], list[float]]  # float [N, 3, H, W] in [0, 1], N prompts -> N scores
REWARD_WEIGHTS, REWARD_CONFIG = "ImageReward.pt", "med_config.json"
VOCABULARY = "bert-base-uncased"  # whose tokenizer ImageReward's package takes from the hub's cache


def load_clip(folder: str | os.PathLike, device: torch.device | str = "cpu") -> Score:
    """The CLIP score with a CLIP model of transformers in a folder, such as of openai/clip-vit-large-patch14.

    torchmetrics' own `clip_score` takes names on the hub alone and does not run with transformers 5. Prompts are cut
    at the model's length.

    Raises:
        UserError: transformers is missing, or there is no such folder.
        DamagedFile: the folder does not hold a whole CLIP model.
    """
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ModuleNotFoundError as error:
        raise UserError(
            f"the CLIP score needs transformers ({error.name} is missing): pip install transformers."
        ) from None
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is no folder of a CLIP model; download one, and give its folder.")
    with outside(folder, "give the folder of a CLIP model of transformers"):
        only = {"local_files_only": True}
        model: Any = CLIPModel.from_pretrained(folder, use_safetensors=True, **only)
        processor: Any = CLIPProcessor.from_pretrained(folder, **only)
    model = model.to(device).eval()

    @torch.no_grad()
    def score(images: Tensor, prompts: Sequence[str]) -> list[float]:
        pictures = [picture.permute(1, 2, 0).numpy() for picture in to_uint8(images).cpu()]
        given = processor(text=list(prompts), images=pictures, return_tensors="pt", padding=True, truncation=True)
        found = model(**given.to(device))
        cosine = (found.image_embeds.double() * found.text_embeds.double()).sum(-1)
        return (100 * cosine).clamp(min=0).tolist()

    return score


def load_image_reward(folder: str | os.PathLike, device: torch.device | str = "cpu") -> Score:
    """ImageReward by its own package, with ImageReward.pt and med_config.json of a folder; nothing is downloaded.

    Raises:
        UserError: the package is missing or does not import, a file is, or the hub's cache lacks the vocabulary of
            bert-base-uncased, which the package takes from there.
        DamagedFile: the files do not hold its network.
    """
    from huggingface_hub import try_to_load_from_cache

    paths = [Path(folder) / name for name in (REWARD_WEIGHTS, REWARD_CONFIG)]
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"{path} is missing; ImageReward takes {REWARD_WEIGHTS} and {REWARD_CONFIG} of one folder."
            )
    if not isinstance(try_to_load_from_cache(VOCABULARY, "vocab.txt"), str):
        raise UserError(
            f"ImageReward needs the vocabulary of {VOCABULARY} in the hub's cache: hf download {VOCABULARY}."
        )
    try:
        import ImageReward
    except ModuleNotFoundError as error:
        raise UserError(
            f"ImageReward needs its package ({error.name} is missing): pip install image-reward."
        ) from None
    except (ImportError, RuntimeError, OSError) as error:  # made for an older transformers
        raise UserError(f"image-reward is installed but does not import ({error}).") from error
    with outside(folder, f"give the folder of {REWARD_WEIGHTS} and {REWARD_CONFIG}"):
        model = ImageReward.load(str(paths[0]), device=str(device), med_config=str(paths[1]))

    @torch.no_grad()
    def score(images: Tensor, prompts: Sequence[str]) -> list[float]:
        from PIL import Image

        pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in to_uint8(images).cpu()]
        return [float(model.score(prompt, one)) for prompt, one in zip(prompts, pictures, strict=True)]

    return score
