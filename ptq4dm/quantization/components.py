"""The networks of a pipeline: which of them are quantized, by which recipes, and their plans on disk.

plan.json beside a pipeline is the plan of its denoiser; where more than one network is quantized, it is
{"components": {name: plan}}.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..checks import shown
from ..errors import UserError
from ..files.atomic import replacing
from ..files.outside import naming, read_json
from ..layers.base import holds_quantized
from ..layers.plan import Plan
from ..layers.view import find_layers
from ..pipelines.denoiser import check_pipeline, denoiser_name, denoiser_names, model_of, networks_of
from ..pipelines.parts import DENOISER, kind_of, of_transformers
from .diffusers_bridge import quantization_config
from .recipe import DEFAULTS, QuantConfig

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PLANS = "plan.json"  # beside model_index.json


Components = Sequence[str] | Mapping[str, QuantConfig | None]


def networks_to_quantize(
    target: DiffusionPipeline | nn.Module,
    component: str | None,
    calibrated: Iterable[str] = (),
    components: Components | None = None,
) -> dict[str, nn.Module]:
    """Name -> network to quantize: the components named, else those that were calibrated, else all denoisers.

    A model by itself has the name "". Raises UserError where there is no such network.
    """
    if components is not None:
        _check_named(target, component, components)
        return {name: component_of(target, name) for name in components}
    if isinstance(target, nn.Module) or component is not None:
        return {component or "": component_of(target, component)}
    check_pipeline(target, "what is quantized")
    there = networks_of(target)
    names = [name for name in calibrated if name in there] or denoiser_names(target)
    return {name: component_of(target, name) for name in names}


def _check_named(target: object, component: str | None, components: Components) -> None:
    """Raises UserError where `components` names no networks, or one twice, or stands beside `component`."""
    if component is not None:
        raise UserError("component names one network, and components several; give one of the two.")
    if isinstance(target, nn.Module):
        raise UserError(f"a {type(target).__name__} is one network and has no components; give the pipeline.")
    if isinstance(components, str) or not isinstance(components, Sequence | Mapping) or not components:
        raise UserError(f"components are names of networks, or name -> recipe; got {shown(components)}.")
    names = list(components)
    if wrong := next((name for name in names if not isinstance(name, str)), None):
        raise UserError(f"components are names of networks, such as 'text_encoder'; got {shown(wrong)}.")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"components names '{twice}' twice.")
    for name, own in components.items() if isinstance(components, Mapping) else ():
        if not (own is None or isinstance(own, QuantConfig)):
            raise UserError(f"the recipe of '{name}' is one such as RTNConfig(), or None; got {shown(own)}.")


def recipes_of(
    target: DiffusionPipeline | nn.Module,
    networks: dict[str, nn.Module],
    config: QuantConfig | None,
    components: Components | None,
) -> dict[str, QuantConfig]:
    """Network -> its recipe. Of `components`: what they say; else `config`, where it is a denoiser; else that of its
    kind (DEFAULTS), as it is for denoisers, too, where config is None.

    Raises UserError where there is none, and where modules_to_not_convert names no layer.
    """
    if components is None:
        return narrowed(networks, cast(QuantConfig, config))
    found: dict[str, QuantConfig] = {}
    shared: dict[str, nn.Module] = {}
    for name, network in networks.items():
        kind, own = kind_of(target, name), components[name] if isinstance(components, Mapping) else None
        if own is None and config is not None and kind == DENOISER:
            shared[name] = network
        else:
            found |= narrowed({name: network}, own or DEFAULTS.find(kind))
    if config is not None and not shared:
        raise UserError(
            f"config is the recipe of denoisers, and components names none ({', '.join(networks)}); name one, "
            "or give components={name: recipe}."
        )
    if config is not None:
        found |= narrowed(shared, config)
    return {name: found[name] for name in networks}


def narrowed(networks: dict[str, nn.Module], config: QuantConfig) -> dict[str, QuantConfig]:
    """Network -> the recipe with those of modules_to_not_convert that it has.

    Raises UserError where a name or pattern is of none.
    """
    patterns = config.modules_to_not_convert
    if len(networks) == 1:
        find_layers(next(iter(networks.values())), patterns)
        return dict.fromkeys(networks, config)
    views = {name: find_layers(network) for name, network in networks.items()}
    chosen = {name: tuple(p for p in patterns if any(one.matches([p]) for one in views[name])) for name in networks}
    if unknown := [p for p in patterns if not any(p in some for some in chosen.values())]:
        raise UserError(f"'{unknown[0]}' in modules_to_not_convert names no layer of {', '.join(networks)}.")
    return {name: replace(config, modules_to_not_convert=some) for name, some in chosen.items()}


def left_out(target: DiffusionPipeline | nn.Module) -> list[str]:
    """The networks of a pipeline that have no quantized layer."""
    if isinstance(target, nn.Module):
        return []
    return [name for name, part in networks_of(target).items() if not holds_quantized(part)]


def component_of(target: DiffusionPipeline | nn.Module, component: str | None) -> nn.Module:
    """The network to quantize: `target` itself, its denoiser, or the component of that name.

    Raises UserError where there is no such network, or one that could not be loaded again.
    """
    if component is None:
        return model_of(target)
    if isinstance(target, nn.Module):
        raise UserError(f"a model has no component '{component}'; give the pipeline.")
    check_pipeline(target, "what is quantized")
    found = getattr(target, component, None)
    networks = networks_of(target)
    if component not in networks:
        raise UserError(f"{type(target).__name__} has no network '{component}'; it has {', '.join(networks)}.")
    if not (isinstance(found, ModelMixin) or of_transformers(networks[component])):
        raise UserError(
            f"'{component}' is a {type(found).__name__}, which neither diffusers nor transformers loads: it could "
            "not be loaded again as it would be saved; quantize networks of these."
        )
    return networks[component]


def quantized_plans(pipe: DiffusionPipeline) -> dict[str, Plan]:
    """Component name -> plan, of every quantized network of a pipeline."""
    configs = {name: quantization_config(network) for name, network in networks_of(pipe).items()}
    return {name: cast(Plan, config.plan) for name, config in configs.items() if config is not None}


def save_plans(pipe: DiffusionPipeline, path: Path) -> None:
    """Write the plans of a pipeline's quantized networks into one JSON file."""
    plans = quantized_plans(pipe)
    if list(plans) == [denoiser_name(pipe)]:
        next(iter(plans.values())).save(path)
        return
    with replacing(path) as temporary:
        whole = {"components": {name: plan.to_dict() for name, plan in plans.items()}}
        temporary.write_text(json.dumps(whole, indent=1))


def load_plans(path: str | Path) -> dict[str, Plan]:
    """Component name -> plan, as `save_plans` wrote them; "" is the name of the denoiser where it is the only one.

    Raises DamagedFile where the file cannot be read, UserError where it is the report that lies beside the plan.
    """
    data = read_json(path, "give a plan that ptq4dm has saved")
    if isinstance(data, dict) and isinstance(data.get("layers"), list):
        raise UserError(f"{path} is a report of what was quantized, and no plan; give {Path(path).with_name(PLANS)}.")
    if not (isinstance(data, dict) and isinstance(data.get("components"), dict)):
        return {"": Plan.load(path)}
    with naming(path):
        plans = {name: Plan.from_dict(plan) for name, plan in data["components"].items()}
        for plan in plans.values():
            plan.check()
        return plans
