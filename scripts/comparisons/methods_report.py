"""The rows of compare_methods.py as a markdown table, and as pictures: error against bytes, error against time."""

from __future__ import annotations

from pathlib import Path

from ptq4dm.calibration.plot import pyplot, save_figure

MARKS = {"method": ("o", "C0"), "baseline": ("s", "black"), "ablation": ("^", "C2"), "shuffled": ("x", "C3")}


def markdown(rows: list[dict]) -> str:
    """The table of one model; columns that no row fills are left out."""
    table = [cells(row) for row in rows]
    names = [name for name in dict.fromkeys(n for row in table for n in row) if any(row[name] for row in table)]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row[name] for name in names) + " |" for row in table)])


def cells(row: dict) -> dict[str, str]:
    """Column -> text of one row, empty where there is no figure."""

    def figure(value, form: str) -> str:
        return "" if value is None else f"{value:{form}}"

    interval = row.get("psnr_interval")
    reach = f" ± {(interval[1] - interval[0]) / 2:.2f}" if interval else ""
    memory = row.get("memory_to_quantize")
    return {
        "row": row["row"] + (" (simulated)" if row.get("simulated") else ""),
        "kind": row["kind"],
        "PSNR (dB, 95 %)": figure(row.get("psnr"), ".2f") + reach,
        "ε error": figure(row.get("eps_error"), ".2e"),
        "feature-FID": figure(row.get("feature_fid"), ".2f"),
        "bytes": f"{row['bytes']:,}",
        "of float16": f"{row['bytes_share']:.3f}",
        "step time": _time(row.get("step_time")),
        "step time, bf16 compiled": _time(row.get("step_time_bf16_compiled")),
        "quantized in (s)": figure(row.get("seconds_to_quantize"), ".1f"),
        "with memory (MB)": figure(None if memory is None else memory / 1e6, ".0f"),
        "kernels": ", ".join(f"{count} {name}" for name, count in row.get("kernels", {}).items()),
    }


def _time(times: dict | None) -> str:
    if times is None:
        return ""
    return "failed" if "failed" in times else f"{times['ratio']:.2f}"


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other point beats or equals in both coordinates (least is best), by the first."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def draw(rows: list[dict], path: Path) -> Path:
    """Noise prediction error against stored bytes and against the time of a step, one model: a PNG.

    Rows are marked by their kinds and numbered as in the legend; a line joins those that no other beats. Time is that
    of compiled bfloat16 where there is any.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    plt = pyplot()
    measured = [row for row in rows if row.get("eps_error")]
    compiled = any("ratio" in row.get("step_time_bf16_compiled", {}) for row in measured)
    key = "step_time_bf16_compiled" if compiled else "step_time"
    columns = {
        "stored bytes / those of float16": lambda row: row["bytes_share"],
        f"step time / full precision's ({'bf16 compiled' if compiled else 'float32'})": (
            lambda row: row.get(key, {}).get("ratio")
        ),
    }
    figure, panels = plt.subplots(1, 2, figsize=(14, 6), sharey=True)
    for axes, (title, place) in zip(panels, columns.items(), strict=True):
        points = [(place(row), row["eps_error"]) for row in measured]
        for number, (row, (x, y)) in enumerate(zip(measured, points, strict=True), 1):
            if x is None:
                continue
            mark, colour = MARKS[row["kind"]]
            name = f"{number} {row['row']}" if axes is panels[0] else None
            axes.plot([x], [y], mark, color=colour, ms=5, label=name)
            axes.annotate(f" {number}", (x, y), fontsize=7)
        best = front([point for point in points if point[0] is not None])
        if best:
            axes.plot(*zip(*best, strict=True), ":", color="grey", lw=1)
        axes.set(xlabel=title, yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("noise prediction error")
    if measured:
        names = panels[0].get_legend_handles_labels()
        panels[1].legend(*names, fontsize=6, loc="upper left", bbox_to_anchor=(1.01, 1))
    save_figure(figure, path)
    return path
