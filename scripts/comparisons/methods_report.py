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
    """Noise prediction error against stored bytes and, where steps were timed, against their time, one model: a PNG.

    Methods and baselines are named, ablations and shuffled controls are small marks; a line joins the rows that no
    other beats. Time is that of compiled bfloat16 where there is any.

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
            lambda row: (row.get(key) or {}).get("ratio")
        ),
    }
    columns = {title: place for title, place in columns.items() if any(place(row) is not None for row in measured)}
    figure, panels = plt.subplots(
        1, len(columns) or 1, figsize=(7.5 * len(columns) or 7.5, 7), sharey=True, squeeze=False
    )
    panels = panels[0]
    for axes, (title, place) in zip(panels, columns.items(), strict=False):
        points = [(row, place(row), row["eps_error"]) for row in measured if place(row) is not None]
        for kind, (mark, colour) in MARKS.items():
            own = [(x, y) for row, x, y in points if row["kind"] == kind]
            small = kind in ("ablation", "shuffled")
            if own:
                axes.plot(*zip(*own, strict=True), mark, color=colour, ms=4 if small else 7, alpha=0.6, label=kind)
        best = front([(x, y) for _, x, y in points])
        if best:
            axes.plot(*zip(*best, strict=True), ":", color="grey", lw=1)
        axes.set(xlabel=title, yscale="log")
        axes.margins(x=0.05, y=0.05)
        axes.grid(alpha=0.3)
        _name(axes, [(row["row"], x, y) for row, x, y in points if row["kind"] in ("method", "baseline")])
    panels[0].set_ylabel("noise prediction error")
    panels[0].legend(fontsize=8)
    save_figure(figure, path)
    return path


def _name(axes, points: list[tuple[str, float, float]]) -> None:
    """Write the names of points in a column beside the axes, in their order from above, each with a thin line."""
    if not points:
        return
    names = sorted(points, key=lambda point: -point[2])
    for number, (name, x, y) in enumerate(names):
        height = 1 - (number + 0.5) / len(names)
        axes.annotate(
            name, (x, y), (1.03, height), textcoords="axes fraction", fontsize=7, va="center",
            arrowprops={"arrowstyle": "-", "color": "grey", "lw": 0.4, "relpos": (0, 0.5)},
        )  # fmt: skip
