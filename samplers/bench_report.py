"""The bench's figures as a table and as a picture with one line per sampler."""

from __future__ import annotations

from pathlib import Path

from ptq4dm.files import replacing


def table(rows: list[dict], best: bool = True) -> str:
    """A Markdown table: a line per sampler, a column per budget; the best of a column in bold.

    A sampler that cannot use up a budget (Heun's method takes odd numbers) shows what it used in brackets.
    """
    budgets = sorted({row["budget"] for row in rows})
    names = list(dict.fromkeys(row["sampler"] for row in rows))
    found = {(row["sampler"], row["budget"]): row for row in rows}
    lowest = {b: min(row["feature_fid"] for row in rows if row["budget"] == b) for b in budgets}

    def cell(name: str, budget: int) -> str:
        row = found.get((name, budget))
        if row is None:
            return ""
        text = f"{row['feature_fid']:.2f}"
        text = f"**{text}**" if best and row["feature_fid"] == lowest[budget] else text
        return text if row["evaluations"] == budget else f"{text} ({row['evaluations']})"

    lines = ["| sampler | " + " | ".join(map(str, budgets)) + " |", "|---" * (len(budgets) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cell(name, b) for b in budgets) + " |" for name in names]
    return "\n".join(lines)


def plot_rows(panels: dict[str, list[dict]], path: Path) -> bool:
    """Frechet distance over evaluations, a panel per model, a line per sampler; False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from matplotlib.ticker import NullFormatter, ScalarFormatter
    except ImportError:
        return False
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 4.5), squeeze=False)
    for ax, (title, rows) in zip(axes[0], panels.items(), strict=True):
        for name in dict.fromkeys(row["sampler"] for row in rows):
            own = sorted((r["evaluations"], r["feature_fid"]) for r in rows if r["sampler"] == name)
            ours = not name.startswith("diffusers/")
            ax.plot(*zip(*own, strict=True), "o-" if ours else "x--", label=name, lw=1.8 if ours else 1.1, ms=4)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ticks = sorted({row["budget"] for row in rows})
        ax.set_xticks(ticks, [str(t) for t in ticks])
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.set_yticks([3, 4, 5, 7, 10, 15, 20, 30, 50, 100, 200])
        ax.set_ylim(bottom=0.95 * min(row["feature_fid"] for row in rows))
        ax.set_xlabel("evaluations of the model")
        ax.set_ylabel("feature-FID")
        ax.set_title(title)
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    return True
