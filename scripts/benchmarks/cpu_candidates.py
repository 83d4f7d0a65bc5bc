"""What a denoiser can run on a CPU by, each as a function (x, t, labels or None) -> the predicted noise, float32."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import ptq4dm
from ptq4dm.pipelines.denoiser import class_count, denoiser

Row = tuple[Tensor, Tensor, Tensor | None]
Run = Callable[[Tensor, Tensor, Tensor | None], Tensor]
HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
HAS_NNCF = HAS_OPENVINO and importlib.util.find_spec("nncf") is not None


def rows_of(pipe, seeds: list[int], steps: int) -> list[Row]:
    """The calls of a pipeline's denoiser while it samples, one row for each step, of all seeds."""
    found: list[Row] = []
    model = denoiser(pipe)
    names = list(inspect.signature(type(model).forward).parameters)[1:]

    def look(_, args, kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        x = given[names[0]]
        time = torch.as_tensor(given["timestep"]).reshape(-1).expand(len(x))
        found.append((x.clone(), time.clone(), given.get("class_labels")))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        ptq4dm.sample(pipe, seeds, num_inference_steps=steps)
    finally:
        handle.remove()
    return found


def torch_run(model: nn.Module, dtype: torch.dtype = torch.float32) -> Run:
    """A model called by PyTorch, in this dtype."""

    def run(x, t, labels):
        more = {} if labels is None else {"class_labels": labels}
        return model(x.to(dtype), t, **more, return_dict=False)[0].float()

    return run


def through(model: nn.Module, precision: str) -> nn.Module:
    """The model, run through OpenVINO."""
    ptq4dm.optimize(model, engine="openvino", precision=precision)
    return model


def nncf_run(model: nn.Module, rows: list[Row], options: dict) -> Run:
    """NNCF's int8 of OpenVINO's conversion of the model, calibrated on rows of one sample; the rest in bfloat16."""
    import nncf

    from ptq4dm.inference.openvino.compiled import Compiled

    served = through(copy.deepcopy(model), "float32")
    torch_run(served)(*rows[0])
    (made,) = served.forward.conversions.values()
    made = made.clone()
    made.reshape({port: [-1, *port.get_partial_shape()[1:]] for port in made.inputs})
    inputs = [[one for one in row if one is not None] for row in rows]
    dataset = nncf.Dataset([[tensor.numpy() for tensor in row] for row in inputs])
    quantized = nncf.quantize(made, dataset, subset_size=len(rows), **options)
    compiled: dict[int, Compiled] = {}

    def run(x, t, labels):
        tensors = [x, t] if labels is None else [x, t, labels]
        if len(x) not in compiled:
            compiled[len(x)] = Compiled(quantized, "bfloat16", tensors)
        return compiled[len(x)](tensors)[0]

    return run


def candidates(exact: nn.Module, int8: nn.Module, rows: list[Row], compiling: bool) -> Iterator[tuple[str, Run]]:
    """(name, run), the float32 model first; those of libraries that are not installed are left out."""
    last = {"memory_format": torch.channels_last}
    half = copy.deepcopy(exact).to(torch.bfloat16)
    yield "PyTorch float32", torch_run(exact)
    yield "PyTorch bfloat16", torch_run(half, torch.bfloat16)
    if compiling:
        yield "PyTorch float32, compiled", torch_run(torch.compile(copy.deepcopy(exact)))
        yield "PyTorch bfloat16, compiled", torch_run(torch.compile(copy.deepcopy(half)), torch.bfloat16)
    if HAS_OPENVINO:
        for precision in ("float32", "bfloat16"):
            yield f"OpenVINO {precision}", torch_run(through(copy.deepcopy(exact), precision))
    if HAS_NNCF:
        import nncf

        yield "OpenVINO, NNCF int8", nncf_run(exact, rows, {"model_type": nncf.ModelType.TRANSFORMER})
        plain = {"advanced_parameters": nncf.AdvancedQuantizationParameters(smooth_quant_alpha=-1)}
        yield "OpenVINO, NNCF int8, plain ranges", nncf_run(exact, rows, plain)
    yield "ptq4dm W8A8", torch_run(copy.deepcopy(int8).to(**last))
    if HAS_OPENVINO:
        for precision in ("float32", "bfloat16"):
            name = f"ptq4dm W8A8 through OpenVINO, {precision}"
            yield name, torch_run(through(copy.deepcopy(int8), precision))


def labels_of(pipe, batch: int) -> Tensor | None:
    """A class for each of a batch; None for a model without."""
    count = class_count(pipe)
    return None if count is None else torch.arange(batch) % count
