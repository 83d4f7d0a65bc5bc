"""The rows of compare_gradptq.py as markdown tables: one for each model, width and stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable

LONGEST = "20000 steps"
COLUMNS = (
    "row", "seeds", "ε error", "of base", "of nearest", "of gptq", "held-out / calibration", "of the longest's gain",
    "flips", "PSNR (dB)", "rate", "seconds", "memory (MB)",
)  # fmt: skip


class Table:
    """Rows of one model and one width. Ratios are taken seed by seed; only seeds that both rows have count."""

    def __init__(self, rows: Iterable[dict]):
        self.rows: dict[str, dict[int, dict]] = {}
        for row in rows:
            self.rows.setdefault(row["row"], {})[row["seed"]] = row

    def markdown(self, names: list[str]) -> str:
        """The table of the rows of these names that are there; columns that none fills are left out."""
        cells = [self.cells(name) for name in names if name in self.rows]
        columns = [column for column in COLUMNS if any(row[column] for row in cells)]
        lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        return "\n".join([*lines, *("| " + " | ".join(row[column] for column in columns) + " |" for row in cells)])

    def cells(self, name: str) -> dict[str, str]:
        """Column -> text, empty where there is no figure."""
        own = self.rows[name]
        first = next(iter(own.values()))
        rounded = ", ".join(key for key in (_grid(first), _inputs(first)) if key)
        nearest, gptq = (f"{label}, {rounded}" if rounded else label for label in ("nearest", "gptq"))
        return {
            "row": name,
            "seeds": str(len(own)),
            "ε error": _mean(self.values(name, "eps_error"), ".2e"),
            "of base": self.ratio(name, "base"),
            "of nearest": self.ratio(name, nearest),
            "of gptq": self.ratio(name, gptq),
            "held-out / calibration": _mean(self.values(name, _generalizes), ".3f"),
            "of the longest's gain": self.gain(name, nearest),
            "flips": _mean(self.values(name, "flips"), ".1%"),
            "PSNR (dB)": _mean(self.values(name, "psnr"), ".2f"),
            "rate": "" if first.get("learning_rate") is None else f"{first['learning_rate']:g}",
            "seconds": _mean(self.values(name, "seconds_to_quantize"), ".0f"),
            "memory (MB)": _mean(self.values(name, lambda row: _megabytes(row.get("memory_to_quantize"))), ".0f"),
        }

    def values(self, name: str, key: str | Callable[[dict], float | None]) -> list[float]:
        read = key if callable(key) else lambda row: row.get(key)
        return [value for row in self.rows[name].values() if (value := read(row)) is not None]

    def ratio(self, name: str, other: str) -> str:
        """The ratio of errors with, of several seeds, its least and largest value."""
        ratios = self.ratios(name, other)
        reach = f" ({min(ratios):.3f} to {max(ratios):.3f})" if len(ratios) > 1 else ""
        return _mean(ratios, ".3f") + reach

    def ratios(self, name: str, other: str) -> list[float]:
        """A row's error over another's, for each seed that both have."""
        own, beside = self.rows[name], self.rows.get(other, {})
        return [row["eps_error"] / beside[seed]["eps_error"] for seed, row in own.items() if seed in beside]

    def near(self, share: float) -> set[str]:
        """The rows whose error is at most 1 + share times the base's, in the mean over the seeds that are there."""
        found = {name: self.ratios(name, "base") for name in self.rows}
        return {name for name, ratios in found.items() if ratios and sum(ratios) <= (1 + share) * len(ratios)}

    def gain(self, name: str, nearest: str) -> str:
        """The part of the longest run's gain over nearest that a row has, where there is such a run."""
        own, longest, rounded = (self.rows.get(one, {}) for one in (name, LONGEST, nearest))
        shared = [seed for seed in own if seed in longest and seed in rounded]
        if name == nearest or not shared or next(iter(own.values()))["stage"] not in ("", "steps"):
            return ""
        start = [rounded[seed]["eps_error"] for seed in shared]
        gained = sum(start) - sum(own[seed]["eps_error"] for seed in shared)
        most = sum(start) - sum(longest[seed]["eps_error"] for seed in shared)
        return f"{gained / most:.1%}" if most > 0 else "the longest gains nothing"


def _generalizes(row: dict) -> float | None:
    return row["eps_error"] / row["calibration_error"] if row.get("calibration_error") else None


def _grid(row: dict) -> str:
    return "weight_grid power" if row["options"].get("weight_grid") == "power" else ""


def _inputs(row: dict) -> str:
    return "activations static" if row["options"].get("activations") == "static" else ""


def _megabytes(value: float | None) -> float | None:
    return None if value is None else value / 1e6


def _mean(values: list[float], form: str) -> str:
    return f"{sum(values) / len(values):{form}}" if values else ""
