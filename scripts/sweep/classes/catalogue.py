"""The catalogue: a tiny configuration or more of every denoiser class of diffusers."""

from __future__ import annotations

from .case import Case
from .controlnets import CONTROL
from .transformers_image import IMAGES
from .transformers_other import OTHER
from .transformers_packed import PACKED
from .transformers_tokens import TOKENS
from .transformers_video import VIDEO
from .transformers_video_more import MORE_VIDEO
from .transformers_wan import WANS
from .unets import UNETS

FAMILIES = {
    "transformers of images": {**IMAGES, **TOKENS, **PACKED},
    "transformers of video": {**VIDEO, **MORE_VIDEO, **WANS},
    "transformers of sound, embeddings, molecules": OTHER,
    "UNets": UNETS,
    "ControlNets": CONTROL,
}
CASES: dict[str, Case] = {label: case for family in FAMILIES.values() for label, case in family.items()}
