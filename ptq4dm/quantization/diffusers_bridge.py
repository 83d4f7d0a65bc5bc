"""The bridge to diffusers: save_pretrained, from_pretrained and quantization while loading.

diffusers has no entry point for quantizers of other packages; like sdnq, we add ourselves to its two tables
(ptq4dm/diffusers_hook.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, cast

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from ..calibration.store import CalibrationStore, layer_fingerprint
from ..checks import shown
from ..errors import UserError
from ..layers.attention.planned import follow_attention
from ..layers.base import is_quantized, replace_module
from ..layers.plan import Plan
from ..layers.registry import empty_quantized, needs_of
from ..layers.shift.norms import norms_of
from ..pipelines.denoiser import turn_at
from ..pipelines.loading import not_while_loading
from ..pipelines.parts import of_transformers
from ..transforms.base import is_online
from ..transforms.named import named
from ..undo import whole_or_not
from .checksums import checksums_of
from .opening import check_keys, check_layers, lacking, put_dequantized, put_empty, read_files
from .own_calls import ModelRef, adopt, release
from .packing import link_layers
from .planning import check_plan, make_plan
from .recipe import METHODS, QuantConfig
from .refusals import bare, check_saving
from .transforming import transformed

Sink = Callable[[str, nn.Module, Tensor], None]
SINK: ContextVar[tuple[Sink, torch.device] | None] = ContextVar("sink", default=None)


@contextmanager
def layers_to(sink: Sink, device: torch.device) -> Iterator[None]:
    """In the block sink(name, layer, weight) is called with each layer that is packed, on a device, while a model
    loads: it may take its tensors away."""
    token = SINK.set((sink, device))
    try:
        yield
    finally:
        SINK.reset(token)


class PTQ4DMQuantizer(DiffusersQuantizer):
    """Loads packed checkpoints, or packs each layer as its weight arrives.

    Packing while loading needs a plan, a calibration store (`config.calibration`) or a recipe without calibration.
    """

    use_keep_in_fp32_modules = True
    is_trainable = False
    is_compileable = True
    quantization_config: QuantConfig

    def __init__(self, quantization_config: QuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.store: CalibrationStore | None = None
        self.model: ModelRef | None = None
        self._on_disk: tuple[str, ...] = ()  # names of modules
        self._files: list[Any] = []
        self._keys: list[str] = []  # of the checkpoint, as diffusers calls them
        self._unread: nn.Module | None = None  # until its tensors come

    @property
    def is_serializable(self) -> bool:
        """True; diffusers asks before it saves, so what would be lost is refused here (UserError), and the checksums
        of what will be saved go into the config that it writes next."""
        model = None if self.model is None else self.model.of()
        if model is not None:
            check_saving(model, self._plan.layers)
            self.quantization_config.checksums = checksums_of(model, self._plan)
            set_entry(model, self.quantization_config)
        return True

    @property
    def supports_parallel_loading(self) -> bool:
        return self.pre_quantized  # packing replaces modules while their biases arrive: one file at a time

    @property
    def _plan(self) -> Plan:
        """The plan that is there as soon as the model's weights are being read."""
        return cast(Plan, self.quantization_config.plan)

    def _process_model_before_weight_loading(
        self, model: nn.Module, device_map: Any = None, keep_in_fp32_modules: Sequence[str] = (), **kwargs: Any
    ) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            put_empty(model, config)
            self._check_checkpoint(model)
        elif not config.packs_while_loading or not all(is_online(named(text)[0].name) for text in config.changes):
            raise _not_while_loading(config)
        else:
            if config.calibration is not None:
                self.store = CalibrationStore.load(config.calibration)
            if self.store is not None and config.rotates:  # static grids are measured behind rotations
                raise _not_while_loading(config)
            try:
                transforms = [] if config.plan else transformed(model, config.changes, None, None)[0]
                plan = config.plan or make_plan(model, config, self.store, transforms)
            except (RuntimeError, NotImplementedError) as error:  # of tensors without values
                raise _not_while_loading(config) from error
            check_plan(model, plan)
            changed = any(not is_online(one.kind) for one in plan.transforms)
            if changed or any(needs_of(one) for one in plan.layers.values()):
                raise _not_while_loading(config)
            self.quantization_config = resolved(config, plan.copy())  # packing completes it
        set_entry(model, self.quantization_config)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[Any]) -> list[str]:
        self._keys, self._files = loaded_keys, list(checkpoint_files)
        return loaded_keys

    def _check_checkpoint(self, model: nn.Module) -> None:
        """Compare the files with the empty model; one file, or files not of safetensors, when they are read."""
        check_keys(model, self._keys)
        if len(self._files) > 1 and all(str(path).endswith(".safetensors") for path in self._files):
            tensors = read_files(self._files, self._keys)
            check_layers(model, self._plan, tensors, self.quantization_config.checksums, str(self._files[0]))
        else:
            self._unread = model

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        if self._unread is not None:
            whole = len(self._files) == 1
            sums = self.quantization_config.checksums if whole else None
            check_layers(self._unread, self._plan, state_dict, sums, str(self._files[0]), whole)
        return state_dict

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        places = device_map.items() if isinstance(device_map, dict) else ()
        self._on_disk = tuple(name for name, device in places if device == "disk")

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        missing = [key for key in missing_keys if not self._is_made_here(model, key)]
        if missing:
            raise lacking(missing)
        return missing

    def _is_made_here(self, model: nn.Module, key: str) -> bool:
        """Files of versions before `like` lack it. Where accelerate looks for it on disk, layers do without."""
        name, _, tensor = key.rpartition(".")
        layer = model.get_submodule(name)
        if tensor != "like" or not is_quantized(layer):
            return False
        if any(f"{key}.".startswith(f"{place}." if place else "") for place in self._on_disk):
            layer.like = None
        else:
            layer.put(like=torch.zeros(1, dtype=layer.model_dtype))
        return True

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, new_param: Tensor) -> None:
        if current_param.shape != new_param.shape:
            raise UserError(
                f"'{param_name}' of the checkpoint has shape {list(new_param.shape)} and the model needs "
                f"{list(current_param.shape)}: it is of another model."
            )

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> bool:
        module, _, tensor = param_name.rpartition(".")
        if self.pre_quantized:
            return tensor in getattr(model.get_submodule(module), "kept", ())
        return tensor == "weight" and module in self._plan.layers

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Tensor],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        name, _, tensor = param_name.rpartition(".")
        module = model.get_submodule(name)
        if self.pre_quantized:  # param_value has been cast to the model's dtype; kept tensors stay as stored
            value = state_dict[param_name].to(target_device)
            setattr(module, tensor, nn.Parameter(value, requires_grad=False))
            return
        if self.store is not None and self.store.fingerprint.get(name) != layer_fingerprint(param_value):
            self.store.raise_foreign()
        sink = SINK.get()
        weight = param_value.to(target_device if sink is None else sink[1])
        layer = empty_quantized(module, self._plan.layers[name], "meta")
        layer.pack(weight, name)
        self._plan.layers[name] = layer.plan  # completed by what packing found
        if layer.like is not None:
            layer.put(like=torch.zeros(1, dtype=param_value.dtype, device=target_device))
        layer.bias = module.bias  # loaded already or still to come
        if sink is not None:
            sink[0](name, layer, weight)
        replace_module(model, name, layer)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self.store, self._unread, self._files, self._keys = None, None, [], []
        link_layers(model.get_submodule, self._plan.layers)
        if self._plan.attention:
            follow_attention(model, self._plan.attention)
        self.model = ModelRef(model)
        adopt(model)
        return model

    def get_state_dict_and_metadata(self, state_dict: dict, safe_serialization: bool = False) -> tuple[dict, dict]:
        return {bare(name): tensor for name, tensor in state_dict.items()}, {}

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        return torch_dtype or torch.float32

    def dequantize(self, model: nn.Module) -> nn.Module:
        with turn_at(model), not_while_loading():
            found = whole_or_not([model], lambda gate: super(PTQ4DMQuantizer, self).dequantize(model))
            mark_norms(found)
            return found

    def _dequantize(self, model: nn.Module) -> nn.Module:
        put_dequantized(model)
        follow_attention(model, {})
        before = model.config
        model._internal_dict = type(before)({k: v for k, v in before.items() if k != "quantization_config"})
        for key, value in vars(before).items():  # diffusers has no call that takes an entry out, and sets attributes
            if key != "quantization_config":
                setattr(model.config, key, value)
        release(model)
        return model


def _not_while_loading(config: QuantConfig) -> UserError:
    return UserError(
        f"{type(config).__name__} looks at layers together, or at what they are fed, and cannot pack them "
        f"while a model loads; load it in full precision, then call ptq4dm.quantize{config.otherwise(loading=True)}."
    )


def resolved(config: QuantConfig, plan: Plan) -> QuantConfig:
    """What a quantized model carries: the recipe with its plan, without the folder it was calibrated from."""
    return replace(config, plan=plan, calibration=None)


def mark_quantized(model: nn.Module, config: QuantConfig) -> None:
    """Tell diffusers, or transformers, that a model was quantized after loading: it saves and loads as such."""
    if of_transformers(model):
        from .transformers_bridge import mark

        mark(model, config)
        return
    if not hasattr(model, "register_to_config"):
        return  # a plain nn.Module: nothing saves it by configuration
    model.hf_quantizer = PTQ4DMQuantizer(config, pre_quantized=True)
    model.hf_quantizer.model = ModelRef(model)
    adopt(model)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    set_entry(model, config)


def mark_norms(model: nn.Module) -> None:
    """Tell diffusers of a model's norms by the mean magnitude, if any, so that it saves and loads with them."""
    if norms := norms_of(model):
        kind = next(kind for _, kind in METHODS.items() if kind.norms_only)
        mark_quantized(model, kind(plan=Plan(kind.method, norms=norms)))


def set_entry(model: nn.Module, config: QuantConfig) -> None:
    """Put the recipe into the model's config. `register_to_config` makes a new config, without the attributes that
    diffusers sets on the old one (of an IP-Adapter, for one)."""
    model.config["quantization_config"] = config
    model.config.quantization_config = config


def quantization_config(model: nn.Module) -> QuantConfig | None:
    """The recipe and plan a model was quantized with, or None. Raises UserError for what is no model."""
    if not isinstance(model, nn.Module):
        raise UserError(f"model must be a network, such as pipe.unet; got {shown(model)}.")
    config = getattr(model, "config", None)
    # transformers' configs have attributes, and diffusers' are mappings
    name = "quantization_config"
    found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    if isinstance(found, dict):  # diffusers leaves one when it saves; the loader has the recipe with all its tensors
        kept = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
        if isinstance(kept, QuantConfig):
            return kept
        found = QuantConfig.from_dict(found) if found.get("quant_method") == "ptq4dm" else None
    return found if isinstance(found, QuantConfig) else None
