"""The bridge to transformers: text encoders save and load quantized, as the networks of diffusers do.

transformers asks the quantizer of a model much as diffusers does, by other names (diffusers_bridge.py). It is in
transformers' two tables through ptq4dm/diffusers_hook.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from ..errors import UserError
from ..layers.base import QuantizedLayer, is_quantized
from ..layers.plan import Plan
from ..pipelines.denoiser import turn_at
from ..pipelines.loading import not_while_loading
from ..undo import whole_or_not
from .checksums import checksums_of, saved_tensors
from .opening import check_keys, check_layers, put_dequantized, put_empty, read_files
from .own_calls import ModelRef, adopt, release
from .packing import link_layers
from .recipe import QuantConfig
from .refusals import check_saving


class TransformersQuantizer(HfQuantizer):
    """Loads packed checkpoints, and says what is saved of a packed model."""

    requires_calibration = False
    is_trainable = False
    is_compileable = True
    quantization_config: QuantConfig

    def __init__(self, quantization_config: QuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.model: ModelRef | None = None
        self._kept: dict[str, torch.dtype] = {}  # tensors that keep the dtype that a file has them in

    @property
    def _plan(self) -> Plan:
        return cast(Plan, self.quantization_config.plan)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """True; transformers asks before it saves, so what would be lost is refused here (UserError), and checksums
        of what will be saved go into the config that it writes next."""
        model = None if self.model is None else self.model.of()
        if model is not None:
            check_saving(model, self._plan.layers)
            self.quantization_config.checksums = checksums_of(model, self._plan)
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict]:
        return saved_tensors(model), {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise UserError(
                "models of transformers are not packed while they load; load the pipeline in full precision, then "
                "call ptq4dm.quantize(pipe, components=[...])."
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[Any] | None = None, **kwargs: Any
    ) -> None:
        with torch.device("cpu"):  # transformers builds its models with "meta" as the default, and plans have values
            self._put_empty(model, [path for path in checkpoint_files or () if str(path).endswith(".safetensors")])

    def _put_empty(self, model: nn.Module, files: Sequence[Any]) -> None:
        """Put empty layers into a new model, and compare its files with them."""
        put_empty(model, self.quantization_config)
        tensors: dict[str, Tensor] = {}
        for path in files:
            tensors |= read_files([path], ())
        if not files:
            raise UserError("a quantized model of transformers is loaded from safetensors files; save it again.")
        check_keys(model, list(tensors))
        sums = self.quantization_config.checksums
        check_layers(model, self._plan, tensors, sums, str(files[0]))
        for place, layer in _layers(model):
            for name in layer.kept:
                if getattr(layer, name) is not None:
                    dtype = self._kept[f"{place}.{name}"] = tensors[f"{place}.{name}"].dtype
                    layer.put(**{name: getattr(layer, name).to(dtype)})  # transformers casts to what it finds

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for place, layer in _layers(model):
            for name in layer.kept:
                if (dtype := self._kept.get(f"{place}.{name}")) is not None:  # T5's `wo` was made float32 as a whole
                    layer.put(**{name: getattr(layer, name).to(dtype)})
            for parameter in cast(nn.Module, layer).parameters(recurse=False):
                parameter.requires_grad_(False)
        link_layers(model.get_submodule, self._plan.layers)
        self._kept = {}
        _settle(model, self)
        return model

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """The model with float layers in the place of the quantized ones, in the dtype that each has."""
        with turn_at(model), not_while_loading():
            return whole_or_not([model], lambda gate: super(TransformersQuantizer, self).dequantize(model, dtype))

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        put_dequantized(model)
        release(model)
        return model


def mark(model: Any, config: QuantConfig) -> None:
    """Tell transformers that a model was quantized after loading, so that it saves and loads as such."""
    model.hf_quantizer = TransformersQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config
    _settle(model, model.hf_quantizer)


def _settle(model: Any, quantizer: TransformersQuantizer) -> None:
    """What holds of a quantized model, loaded or made. Its tensors are saved by their names in the model, which the
    plan has, too: older names, which transformers writes otherwise, are none of theirs."""
    quantizer.model = ModelRef(model)
    model._weight_conversions = []
    adopt(model)


def _layers(model: nn.Module) -> list[tuple[str, QuantizedLayer]]:
    return [(name, cast(QuantizedLayer, module)) for name, module in model.named_modules() if is_quantized(module)]
