"""What an evaluation leaves behind: a table on the screen, report.json, and samples.png."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..errors import UserError
from ..files.atomic import replacing
from ..files.outside import read_json
from ..files.places import file_place, picture_place
from ..pipelines.images import image_grid, save_picture, to_uint8
from ..quantization.report import memory_lines
from .measures import LABELS
from .published import cell, directions, not_measured_text, published_table, rows_of

REPORT, PICTURE = "report.json", "samples.png"
CELL = 96  # pixels a side, about, of one picture in samples.png
MAX_COLUMNS = 8


def check_places(folder: Path) -> None:
    """Raises UserError where files of somebody else have the names of the report and its picture."""
    picture_place(folder / PICTURE)
    file_place(folder / REPORT, ".json")
    if (folder / REPORT).is_file():
        found = read_json(folder / REPORT, "it is no report, and would be replaced: choose another --output")
        if not isinstance(found, dict) or not found.keys() & {"frechet", "paired", "epsilon_error", "bytes"}:
            raise UserError(f"{folder / REPORT} is no report of evaluate; choose another folder.")


def format_report(report: dict) -> str:
    """The dict of `evaluate` or `evaluate_images` as text: one figure a line, its conditions beside it."""
    lines = []
    if f := report.get("frechet"):
        lines.append(f"{f['label']:<22} {max(f['value'], 0):.4g}")
        facts = [f"{f['num_images']} images", f"extractor {f['extractor']}", f"resize {f['resize']}"]
        if "seed" in f:
            facts.append(f"seeds from {f['seed']}, {f['num_inference_steps']} steps")
        lines += [f"    {', '.join(facts)}", f"    against {f['reference']}"]
    if p := report.get("paired"):
        same = f", {p['identical']} identical (counted as 120 dB)" if p["identical"] else ""
        low, high = p["psnr_interval"] or (None, None)
        reach = "" if low is None else f" (95 %: {low:.2f} to {high:.2f})"
        lines.append(f"{'same-seed PSNR':<22} {p['psnr_db']:.2f} dB{reach}   MSE {p['mse']:.3e}")
        lines += _measured({k: p[k] for k in ("ssim", "lpips") if k in p}, {"lpips": p.get("lpips_network", "")})
        lines.append(f"    {p['num_images']} images, seeds from {p['seed']}{same}")
    if q := report.get("prompts"):
        lines += _measured(q["model"], {})
        lines += [f"    full precision: {line.strip()}" for line in _measured(q.get("full_precision", {}), {})]
        lines.append(f"    {q['num_images']} images and their prompts, seeds from {q['seed']}")
    if e := report.get("epsilon_error"):
        lines.append(f"{'epsilon error':<22} {e['overall']:.3e}   |e_q - e_fp|^2 / |e_fp|^2")
        lines.append(f"    {e['rows']} held-out calls, seeds from {e['seed']}; by timestep:")
        for b in e["bins"]:
            error = "-" if b["error"] is None else f"{b['error']:.3e}"
            lines.append(f"    {b['from']:>5} to {b['to']:<5} {error:>10}   ({b['rows']} calls)")
    if b := report.get("bytes"):
        lines.append(f"{'bytes of the denoiser':<22} {b['model']:,}" + _against(b))
    lines += [f"    {line}" for line in memory_lines(report.get("memory", {}))]
    if n := report.get("networks"):
        names = {kind: ", ".join(some) or "none" for kind, some in n.items()}
        lines.append(f"    quantized: {names['quantized']}; in full precision: {names['full_precision']}")
    if t := report.get("step_time"):
        ms = f": {t['milliseconds']:.3f} ms" if "milliseconds" in t else ""
        lines.append(
            f"{'speed of one step':<22} {_times(t['speedup'], 'faster', 'slower', 'fast')} full precision{ms}"
        )
        lines.append(f"    {t['device']}, batch {t['batch_size']}, median of {t['timed_steps']}, interleaved")
    if "not_measured" in report:
        label = report.get("frechet", {}).get("label", "FID")
        missing = report["not_measured"] | ({} if "frechet" in report else {"frechet": "--metric fid"})
        rows = rows_of(report)
        lines += ["", published_table(rows, label), directions(rows, _seeds(report)), not_measured_text(missing)]
    lines += [f"warning: {w}" for w in report.get("warnings", [])]
    return "\n".join(lines)


def _seeds(report: dict) -> int:
    """How many pictures the figures with intervals are means of; 0 where there are none."""
    return next((report[part]["num_images"] for part in ("paired", "prompts") if report.get(part)), 0)


def _measured(found: dict, networks: dict[str, str]) -> list[str]:
    """A line for each figure with its interval: "LPIPS (alex)  0.123 (95 %: 0.1 to 0.2)"."""
    lines = []
    for name, one in found.items():
        low, high = one["interval"] or (None, None)
        reach = "" if low is None else f" (95 %: {cell(name, low)} to {cell(name, high)})"
        label = LABELS[name] + (f" ({networks[name]})" if networks.get(name) else "")
        lines.append(f"{label:<22} {cell(name, one['mean'])}{reach}")
    return lines


def _against(b: dict) -> str:
    """How many times smaller or larger than full precision; "" where nothing is known of that."""
    if "ratio" not in b:
        return ""
    return f"   {_times(b['ratio'], 'smaller', 'larger', 'large')} full precision, {b['full_precision']:,}"


def _times(ratio: float, more: str, less: str, same: str) -> str:
    """A ratio in words: "1.24 times faster than", "1.50 times slower than", "as fast as"."""
    if f"{max(ratio, 1 / ratio):.2f}" == "1.00":
        return f"as {same} as"
    return f"{ratio:.2f} times {more} than" if ratio > 1 else f"{1 / ratio:.2f} times {less} than"


def write_report(report: dict, folder: Path) -> None:
    """report.json in `folder`: plain JSON, no NaN; written under a temporary name, then renamed.

    Raises:
        UserError: the file cannot be written, or a figure is NaN or infinite.
    """
    with replacing(folder / REPORT) as temporary:
        temporary.write_text(_json(report) + "\n")


def _json(report: dict) -> str:
    for name, part in report.items():
        try:
            json.dumps(part, allow_nan=False)
        except ValueError:
            raise UserError(f"the figures of '{name}' hold NaN or infinity; one of the models overflowed.") from None
    return json.dumps(report, indent=2, allow_nan=False)


def write_samples(rows: list[tuple[str, Tensor]], seeds: list[int], path: Path) -> None:
    """Write a PNG: one labelled row per model, one column per seed (the first eight).

    Args:
        rows: (label, images float [N,3,H,W] in [0,1]), the same N and H, W for all.
        seeds: N seeds, written above the columns.
    """
    columns = min(len(seeds), MAX_COLUMNS)
    images = torch.cat([to_uint8(x[:columns]) for _, x in rows])
    height, width = images.shape[2:]
    grid = image_grid(images, columns, max(1, CELL // width))
    if width > 2 * CELL:  # large pictures: the grid is for looking at, not for measuring
        grid = grid.resize((columns * 2 * CELL, round(len(rows) * 2 * CELL * height / width)), Image.LANCZOS)
    text = ImageDraw.Draw(grid).textlength
    left, top = 12 + int(max(text(label) for label, _ in rows)), 18
    canvas = Image.new("RGB", (left + grid.width, top + grid.height), "white")
    canvas.paste(grid, (left, top))
    draw = ImageDraw.Draw(canvas)
    for k, (label, _) in enumerate(rows):
        draw.text((6, top + (k + 0.5) * grid.height / len(rows)), label, "black", anchor="lm")
    for k, seed in enumerate(seeds[:columns]):
        draw.text((left + (k + 0.5) * grid.width / columns, top / 2), f"seed {seed}", "black", anchor="mm")
    save_picture(canvas, path)
