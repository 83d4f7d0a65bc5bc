"""ptq4dm: quantize, sample and measure diffusion models; nothing pretended, everything measured.

Importing it is cheap: PyTorch, diffusers and the rest come with the first name that is used. From then on diffusers
knows our saved models, too, whichever of the two is imported first.
"""

from . import starting as _starting  # noqa: F401  # isort: skip  # first: it is about what follows
from pathlib import Path as _Path
from typing import TYPE_CHECKING

_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))  # a source checkout: ptq4dm.kernels lives in ./kernels

from . import diffusers_hook, registry  # noqa: E402
from .errors import DamagedFile, UserError  # noqa: E402
from .lazy import lazy_names  # noqa: E402
from .version import __version__  # noqa: E402, F401

if TYPE_CHECKING:  # for editors; at run time, each when it is first used
    from .attention.eight_bits import attention_in_8_bits
    from .attention.measure import attention_errors
    from .attention.planned import plan_attention
    from .caching.cached_embeddings import cached_embeddings
    from .caching.cached_steps import cached_steps
    from .caching.cached_text import cached_text
    from .caching.plan_steps import StepPlanConfig, plan_cached_steps
    from .caching.step_plan import StepPlan
    from .calibration.collect import CalibrationConfig, collect
    from .calibration.record import record
    from .calibration.store import CalibrationStore
    from .comparing.compare import compare
    from .comparing.config import CompareConfig
    from .evaluation.evaluate import EvaluateConfig, evaluate
    from .inference.optimize import optimize, unoptimize
    from .interchange.export import export_comfy
    from .interchange.load import load_quantized_file
    from .layers.fusing.fuse import fuse, unfuse
    from .layers.plan import Plan
    from .methods.gradptq import GradPTQConfig
    from .methods.lutgemm import LUTGEMMConfig
    from .methods.mixllm import MixLLMConfig
    from .methods.mixpe import MixPEConfig
    from .methods.ohq import OHQConfig
    from .methods.pdquant import PDQuantConfig
    from .methods.ptq4dm import PTQ4DMConfig
    from .methods.qoq import QoQConfig
    from .methods.rtn import RTNConfig
    from .methods.splitquant import SplitQuantConfig
    from .pipelines.generate import generate
    from .pipelines.load import load_pipeline, load_reference
    from .pipelines.pixel_dit import PixelDiTPipeline
    from .pipelines.sampling import sample
    from .quantization.diffusers_bridge import quantization_config
    from .quantization.quantize import quantize
    from .quantization.recipe import QuantConfig
    from .quantization.saving import verify
    from .svdquant import SVDQuantConfig
    from .training.config import ShiftQuantConfig
    from .training.personalization.config import PersonalizeConfig
    from .training.personalization.embedding_file import load_embedding
    from .training.personalization.personalize import personalize
    from .training.train import train

__all__ = [
    "CalibrationConfig",
    "CalibrationStore",
    "CompareConfig",
    "DamagedFile",
    "EvaluateConfig",
    "GradPTQConfig",
    "LUTGEMMConfig",
    "MixLLMConfig",
    "MixPEConfig",
    "OHQConfig",
    "PDQuantConfig",
    "PTQ4DMConfig",
    "PersonalizeConfig",
    "PixelDiTPipeline",
    "Plan",
    "QoQConfig",
    "QuantConfig",
    "RTNConfig",
    "SVDQuantConfig",
    "ShiftQuantConfig",
    "SplitQuantConfig",
    "StepPlan",
    "StepPlanConfig",
    "UserError",
    "attention_errors",
    "attention_in_8_bits",
    "cached_embeddings",
    "cached_steps",
    "cached_text",
    "collect",
    "compare",
    "evaluate",
    "export_comfy",
    "fuse",
    "generate",
    "load_embedding",
    "load_pipeline",
    "load_quantized_file",
    "load_reference",
    "optimize",
    "personalize",
    "plan_attention",
    "plan_cached_steps",
    "quantization_config",
    "quantize",
    "record",
    "sample",
    "train",
    "unfuse",
    "unoptimize",
    "verify",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CalibrationConfig": "calibration.collect",
        "CalibrationStore": "calibration.store",
        "CompareConfig": "comparing.config",
        "EvaluateConfig": "evaluation.evaluate",
        "GradPTQConfig": "methods.gradptq",
        "LUTGEMMConfig": "methods.lutgemm",
        "MixLLMConfig": "methods.mixllm",
        "MixPEConfig": "methods.mixpe",
        "OHQConfig": "methods.ohq",
        "PDQuantConfig": "methods.pdquant",
        "PTQ4DMConfig": "methods.ptq4dm",
        "PersonalizeConfig": "training.personalization.config",
        "PixelDiTPipeline": "pipelines.pixel_dit",
        "Plan": "layers.plan",
        "QoQConfig": "methods.qoq",
        "QuantConfig": "quantization.recipe",
        "RTNConfig": "methods.rtn",
        "SVDQuantConfig": "svdquant.method",
        "ShiftQuantConfig": "training.config",
        "SplitQuantConfig": "methods.splitquant",
        "StepPlan": "caching.step_plan",
        "StepPlanConfig": "caching.plan_steps",
        "attention_errors": "attention.measure",
        "attention_in_8_bits": "attention.eight_bits",
        "cached_embeddings": "caching.cached_embeddings",
        "cached_steps": "caching.cached_steps",
        "cached_text": "caching.cached_text",
        "collect": "calibration.collect",
        "compare": "comparing.compare",
        "evaluate": "evaluation.evaluate",
        "export_comfy": "interchange.export",
        "fuse": "layers.fusing.fuse",
        "generate": "pipelines.generate",
        "load_embedding": "training.personalization.embedding_file",
        "load_pipeline": "pipelines.load",
        "load_quantized_file": "interchange.load",
        "load_reference": "pipelines.load",
        "optimize": "inference.optimize",
        "plan_attention": "attention.planned",
        "plan_cached_steps": "caching.plan_steps",
        "personalize": "training.personalization.personalize",
        "quantization_config": "quantization.diffusers_bridge",
        "quantize": "quantization.quantize",
        "record": "calibration.record",
        "sample": "pipelines.sampling",
        "train": "training.train",
        "unfuse": "layers.fusing.fuse",
        "unoptimize": "inference.optimize",
        "verify": "quantization.saving",
    },
    rooms=(
        "attention",
        "budgets",
        "caching",
        "calibration",
        "evaluation",
        "hardware",
        "inference",
        "interchange",
        "kernels",
        "layers",
        "methods",
        "pipelines",
        "quantization",
        "reconstruction",
        "seams",
        "samplers",
        "svdquant",
        "training",
    ),
    first=registry.load_late,
)

diffusers_hook.install()
registry.LATE += [
    f"{__name__}.methods",
    f"{__name__}.inference.openvino.engine",
    f"{__name__}.svdquant.registered",
    f"{__name__}.interchange.imported",
]
