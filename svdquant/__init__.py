"""SVDQuant: 4-bit layers with a low-rank branch."""

from .layers import fused_blocks as fuse  # noqa: F401, registers fused forward passes
from .lora import fuse_lora, scale_lora, unfuse_lora
from .method import SVDQuantConfig
from .nunchaku.export import export_nunchaku_lite
from .nunchaku.flux import load_nunchaku_flux
from .nunchaku.lite import load_nunchaku_lite

__all__ = [
    "SVDQuantConfig",
    "export_nunchaku_lite",
    "fuse_lora",
    "load_nunchaku_flux",
    "load_nunchaku_lite",
    "scale_lora",
    "unfuse_lora",
]
