"""SVDQuant: 4-bit layers with a low-rank branch."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:  # for editors; at run time, each when it is first used
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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "SVDQuantConfig": "method",
        "export_nunchaku_lite": "nunchaku.export",
        "fuse_lora": "lora",
        "load_nunchaku_flux": "nunchaku.flux",
        "load_nunchaku_lite": "nunchaku.lite",
        "scale_lora": "lora",
        "unfuse_lora": "lora",
    },
    rooms=("layers", "nunchaku"),
)
