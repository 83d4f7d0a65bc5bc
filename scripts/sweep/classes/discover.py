"""Which denoiser classes the installed diffusers has: models that are called with a time."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil

from diffusers.models.modeling_utils import ModelMixin

FOLDERS = ("transformers", "unets", "controlnets")  # of diffusers.models

# Denoisers that lie elsewhere or are told no time, by name.
BESIDES = {
    "AudioLDM2UNet2DConditionModel": "diffusers.pipelines.audioldm2.modeling_audioldm2",
    "UVit2DModel": "diffusers.models.unets.uvit_2d",
}

# Classes that the rule finds and the catalogue leaves out, each with the reason.
A_LIST = "a list of ControlNets, saved and quantized one by one; the ControlNets themselves are swept"
EXCLUDED = {
    "FluxMultiControlNetModel": A_LIST,
    "HunyuanDiT2DMultiControlNetModel": A_LIST,
    "MultiControlNetModel": A_LIST,
    "MultiControlNetUnionModel": A_LIST,
    "QwenImageMultiControlNetModel": A_LIST,
    "SD3MultiControlNetModel": A_LIST,
}


@functools.cache
def denoisers() -> dict[str, type]:
    """name -> class of every model of `FOLDERS` whose forward takes a time, and of `BESIDES`.

    Classes of pipelines that diffusers itself calls deprecated are not in `FOLDERS`.
    """
    found = {}
    for folder in FOLDERS:
        package = importlib.import_module(f"diffusers.models.{folder}")
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for name, cls in vars(importlib.import_module(info.name)).items():
                model = inspect.isclass(cls) and issubclass(cls, ModelMixin) and cls.__module__ == info.name
                if model and takes_time(cls):
                    found[name] = cls
    return found | {name: getattr(importlib.import_module(module), name) for name, module in BESIDES.items()}


def takes_time(cls: type) -> bool:
    """Whether an argument of `forward` is a time, by its name."""
    names = inspect.signature(cls.forward).parameters
    return any(name in ("t", "sigma") or "time" in name for name in names)
