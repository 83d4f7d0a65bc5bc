"""One network: each layer is quantized as its weight is read, written, and let go of."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import DamagedFile, UserError
from ..files.outside import naming, read_object, reason
from ..pipelines.folder import ADVICE
from ..pipelines.loading import loading
from ..quantization.checksums import checksums_of, saved_tensors
from ..quantization.diffusers_bridge import layers_to, set_entry
from ..quantization.recipe import QuantConfig
from ..quantization.saving import network_tensors
from ..reconstruction.layer_errors import Ratio
from .shards import LIMIT, Shards


@dataclass
class Streamed:
    """A network that lies in a folder; `model` has its shapes and no values of quantized layers.

    errors: of each layer's weight. kernels: that serve each on the device on which it was packed. writing, summing:
        seconds that writing and its checksums took.
    """

    model: Any
    errors: dict[str, Ratio] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    writing: float = 0.0
    summing: float = 0.0


def stream_network(
    kind: type,
    source: Path,
    output: Path,
    config: QuantConfig,
    dtype: torch.dtype,
    device: torch.device,
    limit: int = LIMIT,
) -> Streamed:
    """Quantize the network of class `kind` in the folder `source` into the new folder `output`, to the bit as if it
    were loaded so and saved.

    In memory at a time: a layer of the source and what its decomposition takes on `device`, `limit` bytes of packed
    layers, and all tensors of no quantized layer. Files of the source are mapped, not read whole.

    Raises UserError where the recipe cannot pack while a model loads, or the folder is of another model.
    """
    if read_object(source / "config.json", {}, ADVICE).get("quantization_config"):
        raise UserError(f"{source} is quantized already; quantize the model that it was made from.")
    output.mkdir()
    shards, done = Shards(output, limit), Streamed(None)

    def sink(name: str, layer: nn.Module, weight: Tensor) -> None:
        done.errors[name] = Ratio.between(weight, layer.dequantized_weight())
        done.kernels[name] = layer.kernels_text()
        start = time.perf_counter()
        own = {key: one for key, one in layer.named_parameters(recurse=False) if key != "bias"}
        shards.add({f"{name}.{key}": one for key, one in own.items()})
        for key, one in own.items():
            setattr(layer, key, nn.Parameter(one.to("meta"), requires_grad=False))
        done.writing += time.perf_counter() - start

    try:
        with naming(source), loading(), layers_to(sink, device), torch.no_grad():
            model = cast(Any, kind).from_pretrained(
                source, quantization_config=config, dtype=dtype, use_safetensors=True
            )
    except UserError:
        raise
    except (OSError, ValueError, LookupError) as error:  # of diffusers, on files that are not its own
        raise DamagedFile(f"{source} cannot be loaded: {reason(error)}.") from error
    start = time.perf_counter()
    shards.add({name: one for name, one in saved_tensors(model).items() if not one.is_meta})
    shards.close()
    done.writing += time.perf_counter() - start
    start = time.perf_counter()
    made = model.hf_quantizer.quantization_config
    made.checksums = checksums_of(model, made.plan, network_tensors(output))
    done.summing = time.perf_counter() - start
    set_entry(model, made)
    model.save_config(output)
    done.model = model
    return done
