"""ptq4dm: quantize, sample and measure diffusion models; nothing pretended, everything measured."""

from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))  # a source checkout: ptq4dm.kernels lives in ./kernels

# The quantizer registers with diffusers, which loads a saved scheduler only from a module that has been imported.
from . import samplers  # noqa: E402, F401
from .calibration.collect import CalibrationConfig, collect  # noqa: E402
from .calibration.store import CalibrationStore  # noqa: E402
from .errors import UserError  # noqa: E402
from .layers.fuse import fuse, unfuse  # noqa: E402
from .layers.plan import Plan  # noqa: E402
from .methods.ptq4dm import PTQ4DMConfig  # noqa: E402
from .methods.rtn import RTNConfig  # noqa: E402
from .pipelines.generate import generate  # noqa: E402
from .pipelines.load import load_pipeline, load_reference  # noqa: E402
from .pipelines.pixel_dit import PixelDiTPipeline  # noqa: E402
from .quantization.diffusers_bridge import quantization_config  # noqa: E402
from .quantization.quantize import quantize  # noqa: E402
from .quantization.recipe import QuantConfig  # noqa: E402
from .svdquant import SVDQuantConfig  # noqa: E402
from .version import __version__  # noqa: E402, F401

__all__ = [
    "CalibrationConfig",
    "CalibrationStore",
    "PTQ4DMConfig",
    "PixelDiTPipeline",
    "Plan",
    "QuantConfig",
    "RTNConfig",
    "SVDQuantConfig",
    "UserError",
    "collect",
    "fuse",
    "generate",
    "load_pipeline",
    "load_reference",
    "quantization_config",
    "quantize",
    "unfuse",
]
