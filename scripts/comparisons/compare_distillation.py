"""A one-step student against its teacher: feature-FID by evaluations, curves of training, and the student in 8 bits.

    python scripts/comparisons/compare_distillation.py --student out/student --student out/plain
        --output out/distillation.json

Rows: each student with its one evaluation; the teacher with 1, 5, 10, 20 and 50 evaluations of DDIM and DEIS; each
student in W8A8 (PTQ4DM, calibrated on its one step; static and dynamic activations). feature-FID over --num-fid
images; same-seed PSNR and noise prediction error of the W8A8 rows are against their own full precision. Curves are
read from OUT.run/log.jsonl beside each student and drawn into a picture beside the output. Rows and curves already in
the output are kept, so an interrupted run goes on, and --output on a finished file prints its table again.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch

import ptq4dm
from ptq4dm.calibration.plot import pyplot, save_figure
from ptq4dm.errors import run
from ptq4dm.evaluation.evaluate import EvaluateConfig, evaluate
from ptq4dm.files.outside import read_object
from ptq4dm.files.rows import Rows
from ptq4dm.pipelines.denoiser import denoiser, denoiser_name
from ptq4dm.pipelines.load import load_pipeline
from ptq4dm.progress import progress_bar
from ptq4dm.samplers.catalog import make_sampler
from ptq4dm.samplers.distillation.log import read_log

SETTINGS = ("teacher", "num_fid", "num_paired", "calibration_samples")
EVALUATIONS = (1, 5, 10, 20, 50)
SAMPLERS = ("ddim", "deis")
W8A8 = {"W8A8": {}, "W8A8 dynamic": {"activations": "dynamic"}}


def rows(students: list[str]) -> list[dict]:
    """Every row, in the order it is printed."""
    table = [{"model": s, "sampler": "one step", "evaluations": 1, "bits": "full"} for s in students]
    table += [
        {"model": "teacher", "sampler": sampler, "evaluations": n, "bits": "full"}
        for sampler in SAMPLERS
        for n in EVALUATIONS
    ]
    return table + [
        {"model": s, "sampler": "one step", "evaluations": 1, "bits": bits} for s in students for bits in W8A8
    ]


def measure(row: dict, args) -> dict:
    """The row with its figures."""
    start = time.time()
    pipe = load_pipeline(args.teacher if row["model"] == "teacher" else row["model"], torch.float32, args.device)
    pipe.set_progress_bar_config(disable=True)
    original = None
    if row["model"] == "teacher":
        pipe.scheduler = make_sampler(row["sampler"], pipe.scheduler.config)
    if row["bits"] != "full":
        original = copy.copy(pipe)
        setattr(original, denoiser_name(pipe), copy.deepcopy(denoiser(pipe)))
        quantize(pipe, row, args)
    config = EvaluateConfig(
        num_images=args.num_fid, num_paired=args.num_paired, num_heldout=args.num_paired,
        num_inference_steps=row["evaluations"], batch_size=args.batch_size, timed_steps=10,
    )  # fmt: skip
    report = evaluate(pipe, original, config)
    found = {"feature_fid": report["frechet"]["value"]}
    if original is not None:
        found |= {"psnr": report["paired"]["psnr_db"], "eps_error": report["epsilon_error"]["overall"]}
        found |= {"bytes_ratio": report["bytes"]["ratio"], "speedup": report["step_time"]["speedup"]}
    device = torch.cuda.get_device_name() if torch.device(args.device).type == "cuda" else "CPU"
    return {**row, **found, "seconds": round(time.time() - start, 1), "device": device}


def quantize(pipe, row: dict, args) -> None:
    """PTQ4DM's W8A8, calibrated on the one step that the student takes."""
    if row["bits"] == "W8A8 dynamic":
        ptq4dm.quantize(pipe, ptq4dm.RTNConfig(**W8A8[row["bits"]]))
        return
    config = ptq4dm.CalibrationConfig("solver", args.calibration_samples, 1, batch_size=args.batch_size)
    ptq4dm.quantize(pipe, ptq4dm.PTQ4DMConfig(), ptq4dm.collect(pipe, config))


def curves(students: list[str], output: Path) -> dict[str, list[dict]]:
    """The feature-FIDs in the output that there is, and those in each student's log instead where there is one:
    images the student learnt from, images of stage 1, feature_fid.
    """
    found = read_object(output, {"curves": dict}, "give another --output")["curves"] if output.exists() else {}
    for student in students:
        path = Path(student).with_name(f"{Path(student).name}.run") / "log.jsonl"
        if path.is_file():
            found[student] = [line for line in read_log(path) if "feature_fid" in line]
    return found


def draw(lines: dict[str, list[dict]], results: list[dict], picture: Path) -> None:
    """feature-FID over images that the student learnt from; dotted: with the images of stage 1 before them.

    Most of it happens early: both axes are logarithmic, and the untrained student is left out.
    """
    figure, axes = pyplot().subplots(figsize=(8, 4.5))
    from matplotlib.ticker import LogLocator, NullFormatter  # pyplot() has said so where there is no matplotlib

    trained = {name: [p for p in points if p["images"]] for name, points in lines.items()}
    for number, (name, points) in enumerate((name, points) for name, points in trained.items() if points):
        values = [p["feature_fid"] for p in points]
        degraded = points[-1]["degraded_images"]
        label = f"{Path(name).name}, {'with' if degraded else 'without'} backtracking"
        axes.plot([p["images"] / 1e3 for p in points], values, f"C{number}o-", ms=3, label=label)
        if degraded:
            shifted = [(p["images"] + p["degraded_images"]) / 1e3 for p in points]
            axes.plot(shifted, values, f"C{number}:", label="the same, images of stage 1 counted")
    for row in results:
        if row["model"] == "teacher" and row["sampler"] == "ddim" and row["evaluations"] > 1:
            axes.axhline(row["feature_fid"], color="grey", lw=0.8)
            text, place = f" teacher, {row['evaluations']} DDIM steps", (1, row["feature_fid"])
            axes.annotate(text, place, xycoords=("axes fraction", "data"), fontsize=7, va="center")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 7)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("thousand images that the student learnt from")
    axes.set_ylabel("feature-FID")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.92))
    save_figure(figure, picture)


def markdown(results: list[dict]) -> str:
    lines = ["| model | sampler | evaluations | bits | feature-FID | PSNR (dB) | eps error |", "|---" * 7 + "|"]
    for r in results:
        psnr, eps = (f"{r['psnr']:.2f}", f"{r['eps_error']:.1e}") if "psnr" in r else ("", "")
        cells = [
            Path(r["model"]).name,
            r["sampler"],
            r["evaluations"],
            r["bits"],
            f"{r['feature_fid']:.2f}",
            psnr,
            eps,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", default="unet-cifar10")
    parser.add_argument("--student", action="append", required=True, help="folder from `ptq4dm distill`; repeatable")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num-fid", type=int, default=10_000, help="images of each feature-FID")
    parser.add_argument("--num-paired", type=int, default=256, help="same-seed pairs of the W8A8 rows")
    parser.add_argument("--calibration-samples", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--output", type=Path, default=Path("out/distillation.json"))
    args = parser.parse_args(arguments)
    wanted, lines = rows(args.student), curves(args.student, args.output)
    results = Rows(args.output, {name: getattr(args, name) for name in SETTINGS}, curves=lines)

    def found(row: dict) -> dict | None:
        return next((r for r in results if row.items() <= r.items()), None)

    for row in progress_bar([row for row in wanted if found(row) is None], desc="rows", unit="row"):
        results.add(measure(row, args))
    results = [found(row) for row in wanted]
    print(markdown(results))
    if lines:
        draw(lines, results, args.output.with_suffix(".png"))
        print(f"picture: {args.output.with_suffix('.png')}")


if __name__ == "__main__":
    run(main)
