"""Everything that registers itself: importing this makes SVDQuant and its formats known."""

from . import method, openvino_form, plot  # noqa: F401
from .layers import nvfp4, split, svdq  # noqa: F401
from .nunchaku import model  # noqa: F401
