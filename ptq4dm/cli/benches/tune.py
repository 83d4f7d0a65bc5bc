"""`ptq4dm bench tune`: which launches to search settings for, and the search told as it goes."""

from __future__ import annotations

import json
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...calibration.look import look
from ...calibration.request import request_of
from ...calibration.sampled import record_calls
from ...errors import UserError
from ...files.places import file_place
from ...kernels import dispatch
from ...kernels.runtime import settings as tuning
from ...kernels.w4.layer import FP8, INT4, MODES, SHORT, WEIGHT_ONLY, kernel_name
from ...layers.base import holds_quantized
from ...pipelines.denoiser import denoiser
from ...pipelines.sampling import default_steps
from ...progress import progress_bar
from ..output import result, say

W8A8 = "w8a8"
KERNELS = dispatch.tunable()
USUAL = f"w4a16 up to {SHORT} rows, above w4a8 and w4a4; and {W8A8}"  # what serves a shape
EMBEDDED_BATCH = 256  # images at once in the embedded models, which are small
RANK = 32  # of the low-rank branch
LATEST = 1e9  # a time after any of a sampler's: the one nearest to it is the first

Shape = tuple[int, int, int]


def check_gpu() -> None:
    """Raises UserError where there is no GPU that the kernels run on."""
    if not torch.cuda.is_available():
        raise UserError("kernels are tuned on the GPU they run on; PyTorch finds none here.")
    if find_spec("triton") is None:
        raise UserError("the kernels are written in Triton, which is not installed here; install triton.")
    if torch.cuda.get_device_capability() < tuning.OLDEST:
        needed, has = (".".join(map(str, one)) for one in (tuning.OLDEST, torch.cuda.get_device_capability()))
        raise UserError(f"the kernels need compute capability {needed}; {torch.cuda.get_device_name()} has {has}.")


def parse_shape(text: str) -> Shape:
    """ "4608,3072,12288" -> (M, N, K): rows, outputs and inputs of a Linear layer."""
    try:
        m, n, k = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"'{text}' is no shape; write M,N,K (rows, outputs, inputs), such as 4608,3072,3072."
        ) from None
    if min(m, n, k) < 1 or max(m, n, k) >= 1 << 31:
        raise UserError(f"'{text}' is no shape: each of M,N,K must be at least 1 and less than 2^31.")
    if k % 64:
        raise UserError(f"'{text}': the kernels take inputs in groups of 64, and K = {k} is no multiple of 64.")
    return m, n, k


def cases_of_pipeline(
    pipe, batch: int, conditioning: dict | None = None, pipeline_kwargs: dict | None = None
) -> list:
    """The products of a pipeline's denoiser in one step that makes `batch` images: `w8a8_cases.Case`.

    Raises:
        UserError: the model has no layers in full precision.
    """
    from ...kernels.tuning.cases import cases_of

    model = denoiser(pipe)
    if holds_quantized(model):
        raise UserError("this model is quantized; name its original, whose layers have the same shapes.")

    options: dict[str, Any] = {
        "num_inference_steps": default_steps(pipe, 2),
        "conditioning": conditioning,
        "pipeline_kwargs": pipeline_kwargs,
    }
    sampling = look(request_of(pipe, **options), 0)

    def first_step():
        record_calls(pipe, [0], [LATEST], sampling=sampling, **options)

    cases = cases_of(model, first_step, batch)
    if not cases:
        raise UserError("the model has no Linear or Conv2d layers to tune for.")
    return cases


def linear_shapes(cases: list) -> list[Shape]:
    """(M, N, K) of those that 4-bit kernels could serve: inputs in groups of 64."""
    return list(dict.fromkeys((c.rows, c.outputs, c.channels) for c in cases if c.linear and c.channels % 64 == 0))


def linear_cases(shapes: list[Shape]) -> list:
    from ...kernels.tuning.cases import Case
    from ...kernels.w8a8.window import Window

    return [Case(Window(m, 1, 1), k, n) for m, n, k in shapes]


def known_shapes() -> list[Shape]:
    from ...kernels.tuning.launches_w4 import SHAPES

    return list(SHAPES.values())


def plan(kernels: list[str] | None, shapes: list[Shape], cases: list) -> list:
    """The launches to search.

    kernels: names from KERNELS, each of which is tuned for every shape. Left out: what usually serves a shape, which
        is the weight-only kernel up to SHORT rows, and above those that quantize activations; and W8A8 for `cases`.
    shapes: (M, N, K) of Linear layers that 4-bit kernels serve.
    cases: the products of layers that W8A8 serves.

    Raises:
        UserError: a kernel that this GPU does not run, or nothing to do.
    """
    from ...kernels.tuning import launches_integer as search_integer
    from ...kernels.tuning import launches_lut as search_lut
    from ...kernels.tuning import launches_w4 as search_svdq
    from ...kernels.tuning import launches_w8a8 as search_w8a8

    fp8 = kernel_name(torch.device("cuda"), "fp8", 64)
    if fp8 != FP8 and "w4a8-fp8" in (kernels or ()):
        raise UserError(f"{torch.cuda.get_device_name()} does not multiply fp8; choose w4a8-int8.")
    usual = [MODES[fp8], MODES[INT4], MODES[WEIGHT_ONLY], None]
    found: list = []
    for mode in [KERNELS[name] for name in kernels] if kernels else usual:
        if mode is None:
            found += search_w8a8.launches(cases)
            continue
        if mode not in MODES.values():
            search = search_lut if mode in search_lut.RUN else search_integer
            found += [one for shape in shapes for one in search.launches(*shape, mode)]
            continue
        for m, n, k in shapes:
            if kernels or (m <= SHORT) == (mode == MODES[WEIGHT_ONLY]):
                found += search_svdq.launches(m, n, k, RANK, mode)
    if not found:
        raise UserError("the model has no layer that these kernels serve.")
    return list(dict.fromkeys(found))


def tune(launches: list, path: Path | None = None, seconds: float | None = None) -> list:
    """Search, print what is found as it is found, and record it. Returns `search.Found` of each launch.

    path: where the settings go; left out, where the kernels look for them (tuning.tuned_file).
    seconds: launches that are not begun by then are left as they are.

    Raises:
        UserError: no such file can be written, or no setting of any launch runs.
    """
    from ...kernels.tuning import search

    path = tuning.tuned_file() if path is None else path
    file_place(path, ".json")
    try:
        tuning.settings_in(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    workers, began = search.default_workers(), time.monotonic()
    total = sum(len(search.candidates(launch)) for launch in launches)
    say(f"{torch.cuda.get_device_name()}: {len(launches)} launches, {total} settings, {workers} processes")
    say(f"settings go to {path}")
    done = []
    try:
        with progress_bar(total=total, desc="tune", unit="setting") as bar:
            for found in search.search(launches, path, workers, seconds, bar.update):
                done.append(found)
                say(line(found))
                result(gpu=torch.cuda.get_device_name(), settings=path, tuned=[facts(one) for one in done])
    except OSError as error:
        raise UserError(f"the search stopped: {error.strerror or error} ({error.filename or path}).") from error
    finally:  # of an interrupted search, too
        for text in left_out(done):
            say(text)
        kept = sum(bool(found.times) for found in done)
        say(f"{kept} of {len(launches)} launches tuned in {time.monotonic() - began:.0f} s: {path}")
        result(launches=len(launches))
    if len(done) < len(launches):
        say("out of time; the rest keeps what it had")
    if done and not kept:
        raise UserError(f"no setting of any kernel ran on this GPU; the first: {done[0].left_out[0][0]}")
    return done


def line(found) -> str:
    """What came of one launch."""
    if not found.times:
        return f"{found.name}: no setting ran"
    spent, setting = found.times[0]
    before = "" if found.before is None else f" (until now {found.before:.1f})"
    return f"{found.name}: {spent:.1f} us{before}  {json.dumps(setting)}"


def facts(found) -> dict:
    """The same for a program; times in microseconds, the fastest setting first."""
    times = [{"microseconds": spent, "setting": setting} for spent, setting in found.times]
    return {"launch": found.name, "before": found.before, "times": times, "left_out": len(found.left_out)}


def left_out(done: list, most: int = 10) -> list[str]:
    """The commonest reasons why settings were left out, each with one of them."""
    reasons: Counter = Counter()
    example: dict[str, str] = {}
    for found in done:
        for reason, setting in found.left_out:
            reasons[reason] += 1
            example.setdefault(reason, f"{found.name} {json.dumps(setting)}")
    lines = [f"left out {count}: {reason}  such as {example[reason]}" for reason, count in reasons.most_common(most)]
    rest = len(reasons) - most
    return lines + ([f"and {rest} other reasons"] if rest > 0 else [])
