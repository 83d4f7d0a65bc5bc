"""One HTML page that holds all it shows: figures, pictures and a slider between any two models.

It asks nobody for anything: no server, no other file, no script from elsewhere (its own policy forbids it), so it
opens from a disk or an e-mail. All tables and pictures are in the HTML; the script moves the slider and works out the
PSNR between the two pictures that are looked at.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from ..evaluation.measures import LABELS, LOWER_IS_BETTER
from ..evaluation.published import COLUMNS, DIRECTIONS, INTERVAL, cell, ends
from ..files.pictures import opened_picture
from .rows import costs, frechet_label, published_rows, sizes_text

BEGINS = "<!doctype html>\n<!-- by ptq4dm compare -->\n"
DECIBELS = 40  # a bar of the worst layers is full at this SQNR


def page(report: dict, paths: Mapping[str, Sequence[Path]]) -> str:
    """The page of a report. paths: label -> picture files of the first seeds."""
    models, seeds = report["models"], report["seeds"][: len(next(iter(paths.values())))]
    title = f"{report['full_precision']}, {len(models) - 1} quantized"
    values = {
        "title": _text(title),
        "name": _text(report["full_precision"]),
        "conditions": _conditions(report),
        "figures": _figures(report),
        "options": "".join(f"<option>{_text(label)}</option>" for label in models),
        "pictures": _pictures(paths, seeds, report["prompts"]),
        "seeds": _by_seed(report),
        "layers": _layers(models),
        "notes": "".join(f"<p>{_text(one)}.</p>" for one in _notes(report)),
        "style": _part("css"),
        "script": _part("js"),
        "data": json.dumps(_data(report, seeds)).replace("<", "\\u003c"),
    }
    text = _part("html")
    for name in sorted(values, key=lambda name: name in ("data", "pictures")):  # what others wrote goes in last
        text = text.replace(f"@@{name}@@", values[name])
    return BEGINS + text


def _part(kind: str) -> str:
    return Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8")


def _text(value: object) -> str:
    return html.escape(str(value)).replace("@@", "@&#64;")


def _conditions(report: dict) -> str:
    seeds = report["seeds"]
    facts = [
        f"{len(seeds)} seeds from {seeds[0]}",
        report["sampler"],
        f"{report['num_inference_steps']} steps",
        f"{report['dtype']} on {report['device']}",
    ]
    return " · ".join(map(_text, facts))


def _notes(report: dict) -> list[str]:
    missing = [f"{LABELS[name]} ({why})" for name, why in report["not_measured"].items()]
    timed = next((entry["step_time"] for entry in report["models"].values() if "step_time" in entry), None)
    notes = [f"{DIRECTIONS[0].upper()}{DIRECTIONS[1:]}; small figures are {INTERVAL}"]
    notes += [f"Not measured: {', '.join(missing)}"] if missing else []
    notes.append(sizes_text(report))
    if timed:
        notes.append(
            f"Speed of a step is times full precision, in turns: {timed['device']}, batch {timed['batch_size']}, "
            f"median of {timed['timed_steps']}"
        )
    return notes + list(report["warnings"])


def _figures(report: dict) -> str:
    """The table of models: the published figures with their intervals, then costs."""
    rows, models = published_rows(report), report["models"]
    shown = [name for name in COLUMNS if any(row.get(name) for row in rows.values())]
    best = {name: _best(name, [row.get(name, {}).get("mean") for row in rows.values()]) for name in shown}
    head = [{**LABELS, "frechet": frechet_label(report)}[name] for name in shown]
    head += [what for what, _ in costs(next(iter(models.values())))]
    lines = ["<tr><th scope=col>model</th>" + "".join(f"<th scope=col>{_text(one)}</th>" for one in head) + "</tr>"]
    for label, entry in models.items():
        options = entry["quantization"]
        made = "full precision" if options is None else ", ".join(f"{k} {v}" for k, v in options.items())
        line = f"<tr><th scope=row>{_text(label)}<small>{_text(made)}</small></th>"
        for name in shown:
            figure = rows[label].get(name, {})
            value, reach = figure.get("mean"), ends(name, figure)
            small = f"<small>{reach}</small>" if reach else ""
            kind = " class=best" if value is not None and value == best[name] else ""
            line += f"<td{kind}>{cell(name, value) or '–'}{small}</td>"
        line += "".join(f"<td>{_text(text) or '–'}</td>" for _, text in costs(entry))
        lines.append(line + "</tr>")
    return f"<table><thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody></table>"


def _best(name: str, values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return None if len(there) < 2 else min(there) if name in LOWER_IS_BETTER else max(there)


def _pictures(paths: Mapping[str, Sequence[Path]], seeds: Sequence[int], prompts: Sequence[str] | None) -> str:
    """A table with a row for each model and a column for each seed; the slider takes its pictures from here."""
    head = "<th></th>" + "".join(f"<th scope=col>{seed}</th>" for seed in seeds)
    rows = []
    for label, some in paths.items():
        cells = "".join(
            f'<td><button type=button data-seed="{k}"><img alt="{_text(label)}, seed {seed}" '
            f'src="{_embedded(path)}"></button></td>'
            for k, (seed, path) in enumerate(zip(seeds, some, strict=True))
        )
        rows.append(f'<tr data-model="{_text(label)}"><th scope=row>{_text(label)}</th>{cells}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _embedded(path: Path) -> str:
    """A picture as a data URI: the same pixels, without the settings that its file carries."""
    buffer = io.BytesIO()
    with opened_picture(path) as opened:
        bare = Image.new("RGB", opened.size)
        bare.paste(opened.convert("RGB"))
    bare.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _by_seed(report: dict) -> str:
    """A table for each figure: seeds down, models across, a cell's tint is where it lies between worst and best."""
    models = report["models"]
    names = [name for name in COLUMNS if any(name in entry["seeds"] for entry in models.values())]
    found: list[str] = []
    for name in names:
        columns = {label: entry["seeds"][name] for label, entry in models.items() if name in entry["seeds"]}
        every = [value for values in columns.values() for value in values]
        low, high = min(every), max(every)
        head = "".join(f"<th scope=col>{_text(label)}</th>" for label in columns)
        body = ""
        for k, seed in enumerate(report["seeds"]):
            body += f"<tr><th scope=row>{seed}</th>"
            for values in columns.values():
                share = (values[k] - low) / (high - low) if high > low else 1.0
                share = 1 - share if name in LOWER_IS_BETTER else share
                body += f'<td style="--share:{share:.2f}">{cell(name, values[k])}</td>'
            body += "</tr>"
        table = f"<table><thead><tr><th scope=col>seed</th>{head}</tr></thead><tbody>{body}</tbody></table>"
        opened = "" if found else " open"
        found.append(f"<details{opened}><summary>{LABELS[name]}</summary><div class=scroll>{table}</div></details>")
    return "".join(found)


def _layers(models: dict) -> str:
    """A card for each model with its worst layers, a bar for each."""
    cards = []
    for label, entry in models.items():
        if not entry.get("worst"):
            continue
        what = "the layer's output" if entry["worst"][0]["basis"] == "output" else "the weight"
        items = ""
        for row in entry["worst"]:
            sqnr = row["sqnr"]
            number = isinstance(sqnr, (int, float))
            told = f"{sqnr:.1f} dB" if number else "NaN" if sqnr == "nan" else "no error"
            reach = min(max(sqnr / DECIBELS, 0.02), 1) if number else 0 if sqnr == "nan" else 1
            items += (
                f"<li><span class=layer>{_text(row['layer'])}</span><span class=format>{_text(row['format'])}</span>"
                f'<span class=meter><i style="width:{reach:.0%}"></i></span><b>{told}</b></li>'
            )
        cards.append(f"<article><h3>{_text(label)}</h3><p>SQNR of {what}</p><ol>{items}</ol></article>")
    return "".join(cards) or "<p>No model here has a report of its layers.</p>"


def _data(report: dict, seeds: Sequence[int]) -> dict:
    """What the script needs besides the pictures."""
    names = [name for name in COLUMNS if name in LABELS]
    figures = {
        label: [
            [f"{LABELS[name]} {cell(name, entry['seeds'][name][k])}" for name in names if name in entry["seeds"]]
            for k in range(len(seeds))
        ]
        for label, entry in report["models"].items()
    }
    prompts = report["prompts"]
    return {"seeds": list(seeds), "figures": figures, "prompts": prompts and prompts[: len(seeds)]}
