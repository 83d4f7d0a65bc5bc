"""What a denoiser can run on a CPU by, each as a function of one call -> the predicted noise, float32."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator

import torch
from cpu_subjects import Row, Subject
from torch import Tensor, nn

import ptq4dm
from ptq4dm.inference.openvino.processor import sums_fit
from ptq4dm.kernels.cpu import library

Run = Callable[[Row], Tensor]
HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
HAS_NNCF = HAS_OPENVINO and importlib.util.find_spec("nncf") is not None
FIRST = "PyTorch float32"
"""What times are ratios of, and whose outputs the errors are to."""


def torch_run(model: nn.Module, dtype: torch.dtype = torch.float32) -> Run:
    """A model called by PyTorch, in this dtype."""

    def run(row: Row) -> Tensor:
        x, time, *rest = row
        rest = [one.to(dtype) if one.is_floating_point() else one for one in rest]
        return model(x.to(dtype), time, *rest, return_dict=False)[0].float()

    return run


def compiled(model: nn.Module, dtype: torch.dtype) -> Run:
    """A copy of a model compiled by torch.compile, its weights folded into the code as constants."""
    torch._inductor.config.freezing = True
    return torch_run(torch.compile(copy.deepcopy(model)), dtype)


def by_reference(model: nn.Module) -> Run:
    """The model as it runs where this library's kernels are not compiled."""
    plain = torch_run(model)

    def run(row: Row) -> Tensor:
        with library.switched_off():
            return plain(row)

    return run


def through(model: nn.Module, precision: str) -> nn.Module:
    """The model, run through OpenVINO."""
    ptq4dm.optimize(model, engine="openvino", precision=precision)
    return model


def optimized(model: nn.Module, precision: str) -> Run:
    """The model by our own kernels, as `optimize` leaves it."""
    print(ptq4dm.optimize(model, precision=precision))
    return torch_run(model)


def nncf_run(model: nn.Module, rows: list[Row], options: dict) -> Run:
    """NNCF's int8 of OpenVINO's conversion of the model, calibrated on rows of one sample; the rest in bfloat16."""
    import nncf

    from ptq4dm.inference.openvino.compiled import Compiled

    served = through(copy.deepcopy(model), "float32")
    torch_run(served)(rows[0])
    (made,) = served.forward.conversions.values()
    made = made.clone()
    made.reshape({port: [-1, *port.get_partial_shape()[1:]] for port in made.inputs})
    dataset = nncf.Dataset([[tensor.numpy() for tensor in row] for row in rows])
    quantized = nncf.quantize(made, dataset, subset_size=len(rows), **options)
    of_batch: dict[int, Compiled] = {}

    def run(row: Row) -> Tensor:
        batch = len(row[0])
        if batch not in of_batch:
            of_batch[batch] = Compiled(quantized, "bfloat16", list(row))
        return of_batch[batch](list(row))[0]

    return run


def candidates(subject: Subject, groups: list[str]) -> Iterator[tuple[str, Callable[[], Run]]]:
    """(name, what makes it), the float32 model first. Those of libraries that are not installed are left out, and
    our codes through OpenVINO where its sums of their products overflow."""
    exact, half = subject.exact, torch.bfloat16
    yield FIRST, lambda: torch_run(exact)
    yield "PyTorch bfloat16", lambda: torch_run(copy.deepcopy(exact).to(half), half)
    if "compiled" in groups:
        yield "PyTorch float32, compiled", lambda: compiled(exact, torch.float32)
        yield "PyTorch bfloat16, compiled", lambda: compiled(copy.deepcopy(exact).to(half), half)
    if "openvino" in groups and HAS_OPENVINO:
        for precision in ("float32", "bfloat16"):
            yield f"OpenVINO {precision}", lambda p=precision: torch_run(through(copy.deepcopy(exact), p))
    if "nncf" in groups and HAS_NNCF:
        import nncf

        smooth = {"model_type": nncf.ModelType.TRANSFORMER}
        plain = {"advanced_parameters": nncf.AdvancedQuantizationParameters(smooth_quant_alpha=-1)}
        yield "OpenVINO, NNCF int8", lambda: nncf_run(exact, subject.seen, smooth)
        yield "OpenVINO, NNCF int8, plain ranges", lambda: nncf_run(exact, subject.seen, plain)
    for method, config in subject.methods.items():
        if method.partition(" ")[0] in groups:
            yield from _ours(subject, method, config, "reference" in groups)


def _ours(
    subject: Subject, method: str, config: ptq4dm.QuantConfig, reference: bool
) -> Iterator[tuple[str, Callable[[], Run]]]:
    made: list[nn.Module] = []

    def model() -> nn.Module:
        if not made:
            made.append(subject.quantized(config).to(memory_format=torch.channels_last))
        return copy.deepcopy(made[0])

    yield f"ptq4dm {method}", lambda: torch_run(model())
    if reference and method.startswith("SVDQuant"):  # whose layers ask in each call
        yield f"ptq4dm {method}, by the reference", lambda: by_reference(model())
    for precision in ("float32", "bfloat16"):
        yield f"ptq4dm {method}, optimized, {precision}", lambda p=precision: optimized(model(), p)
    if HAS_OPENVINO and sums_fit():
        for precision in ("float32", "bfloat16"):
            name = f"ptq4dm {method} through OpenVINO, {precision}"
            yield name, lambda p=precision: torch_run(through(model(), p))
